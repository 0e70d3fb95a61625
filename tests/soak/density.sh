#!/usr/bin/env bash
# 1,000 idle containers at once: how fast they start, what each costs, how soon `ps` answers, that nothing is left.
set -euo pipefail
cd "$(dirname "$0")/../.."
exec .venv/bin/python -m bench.density 1000
