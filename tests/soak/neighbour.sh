#!/usr/bin/env bash
# How long a container's answers take beside a CPU-bound neighbour with equal shares.
set -euo pipefail
cd "$(dirname "$0")/../.."
exec .venv/bin/python -m bench.neighbour
