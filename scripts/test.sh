#!/usr/bin/env bash
# Sets up .venv and runs the tests on all cores; arguments go to pytest, for example: scripts/test.sh -k conv2d -n 0
# With --full first, longer proofs run at their full counts (SEGNET_TEST_FULL=1).
set -euo pipefail
source "$(dirname "$0")/environment.sh"
environment test
if [[ "${1:-}" == --full ]]; then
    export SEGNET_TEST_FULL=1
    shift
fi
exec .venv/bin/python -m pytest -n auto --maxprocesses 8 --dist worksteal "$@"
