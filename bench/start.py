"""How long it takes to run one program: `isolat run --rm IMAGE true` against Docker and against the OCI runtime alone.

In turns, in one run: the command line as a user has it (with its daemon up), `docker run --rm --network none` of the
same files, `crun run` of an equal bundle that is ready, and a bare `python -IS -c pass`, which is the least that a
command line written in Python can take.
"""

from __future__ import annotations

import argparse
import contextlib
import sys

from bench import bare, docker, lib, subject

WORDS = ("true",)
DOCKER_RATIO = 0.20
CRUN_PLUS_MS = 60.0
DOCKER, CRUN, ISOLAT, PYTHON = "docker run", "crun run", "isolat run", "python -IS"


def measure(options: argparse.Namespace) -> lib.Report:
    report = lib.Report("start", versions=subject.versions(), base=DOCKER)
    argv = subject.argv("run", "--rm", options.image, *WORDS)
    samples: dict[str, lib.Sample] = {
        ISOLAT: lambda: lib.spend(argv),
        PYTHON: lambda: lib.spend([sys.executable, "-IS", "-c", "pass"]),
    }
    with contextlib.ExitStack() as stack:
        lib.spend(argv)  # starts the daemon where none runs
        _add_docker(stack, report, samples, options)
        _add_crun(stack, report, samples, options)
        report.series = lib.interleave(samples, options.runs)
    return report


def _add_docker(
    stack: contextlib.ExitStack, report: lib.Report, samples: dict[str, lib.Sample], options: argparse.Namespace
) -> None:
    why = "left out by --no-docker" if options.no_docker else docker.missing()
    if why:
        report.missing[DOCKER] = why
        return
    peer = stack.enter_context(docker.running(subject.image_file(options.image)))
    report.versions["docker"] = docker.version(peer)
    samples[DOCKER] = lambda: lib.spend(peer.run(WORDS))


def _add_crun(
    stack: contextlib.ExitStack, report: lib.Report, samples: dict[str, lib.Sample], options: argparse.Namespace
) -> None:
    why = bare.missing()
    if why:
        report.missing[CRUN] = why
        return
    config = bare.config_of(subject.plan(options.image, WORDS))
    peer = stack.enter_context(bare.ready(subject.image_file(options.image), config, WORDS))
    samples[CRUN] = peer.run


def judge(report: lib.Report) -> None:
    """What is promised of the medians of this one run."""
    if report.has(ISOLAT, DOCKER):
        ratio = lib.ratio(report, ISOLAT, DOCKER)
        report.promises.append(lib.Promise(f"{ISOLAT} / {DOCKER}", ratio, DOCKER_RATIO))
    if report.has(ISOLAT, CRUN):
        more = lib.difference(report, ISOLAT, CRUN)
        report.promises.append(lib.Promise(f"{ISOLAT} - {CRUN}", more, CRUN_PLUS_MS, unit=" ms"))
    if report.has(ISOLAT, PYTHON):
        report.figures["share of isolat run that is the interpreter's start"] = lib.ratio(report, PYTHON, ISOLAT)


def main(argv: list[str] | None = None) -> int:
    parser = lib.parser(__doc__)
    parser.add_argument("--image", default=subject.IMAGE, help="the image to run (default %(default)s)")
    parser.add_argument("--no-docker", action="store_true", help="leave Docker out (the promise is then not checked)")
    options = parser.parse_args(argv)
    report = measure(options)
    judge(report)
    return lib.finish(report, as_json=options.json)


if __name__ == "__main__":
    sys.exit(lib.guarded(main))
