# A few commands. Each sets up what it needs, on a fresh Debian machine too, and is quick the second time.
#
#   make demo    real environments, with a word on each
#   make test    every test but the soak tests (ARGS='-k name' chooses, ARGS='-n 0' runs one after the other)
#   make lint    style, types, C warnings and the C compiler's static analysis
#   make soak    the large sizes and long runs
#   make bench   the measurements, also against what else there is (installs docker.io)
#   make setup   all set-up and nothing else
#   make clean   what was built; images and environments stay (`isolat system reset` removes those)

SHELL := /bin/bash
PY := .venv/bin/python
SETUP := MAKE_TARGET=$(firstword $(MAKECMDGOALS) test) scripts/setup.sh
# Files of tests side by side: what they do is mostly waiting. Each worker has a state root of its own.
BESIDE := -n auto --maxprocesses 4 --dist loadfile
C_SOURCES := $(wildcard native/*.c)

.PHONY: demo test lint soak bench setup tools root clean
.DEFAULT_GOAL := test

root:
	@[ "$$(id -u)" = 0 ] || { echo "make: this makes real environments, which needs root" >&2; \
	  echo "hint: sudo make $(firstword $(MAKECMDGOALS) test); without root: .venv/bin/pytest tests/unit" >&2; exit 125; }

tools:
	@$(SETUP) packages
	@$(SETUP) venv
	@$(SETUP) native
	@$(SETUP) launcher

setup: root tools
	@$(SETUP) image
	@$(SETUP) guest

demo: setup
	@scripts/demo.sh

test: setup
	$(PY) -m pytest $(BESIDE) $(ARGS)

soak: setup
	$(PY) -m pytest -m soak $(ARGS)
	@for script in tests/soak/*.sh; do [ ! -e "$$script" ] || { echo "== $$script"; bash "$$script" || exit 1; }; done

bench: setup
	@$(SETUP) packages bench
	@for name in start exec microvm throughput density neighbour pull; do echo "== $$name"; $(PY) -m bench.$$name $(ARGS) || exit 1; done

lint: tools
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	@for source in $(C_SOURCES); do \
	  gcc -std=c11 -D_GNU_SOURCE -D_FILE_OFFSET_BITS=64 -O2 -Wall -Wextra -Wshadow -Wstrict-prototypes \
	    -Wno-format-truncation -Werror -c -o /dev/null $$source || exit 1; done
	@scripts/analyze.sh $(C_SOURCES)
	@bash -n .ci/run scripts/*.sh

clean:
	rm -rf build .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis src/*.egg-info
	$(MAKE) -C native clean
	find . -name __pycache__ -prune -exec rm -rf {} +
