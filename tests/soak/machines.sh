#!/usr/bin/env bash
# The conformance suite on what takes too long for every day: machines that are booted for each case.
set -euo pipefail
cd "$(dirname "$0")/../.."
.venv/bin/python -m pytest tests/conformance --layer microvm@booted "$@"
