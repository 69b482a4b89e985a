#!/usr/bin/env bash
# Sets up .venv and runs the tests; arguments go to pytest, for example: scripts/test.sh -k conv2d
set -euo pipefail
source "$(dirname "$0")/environment.sh"
environment test
exec .venv/bin/python -m pytest "$@"
