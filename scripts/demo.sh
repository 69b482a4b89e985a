#!/usr/bin/env bash
# The whole thing in one command: sets up .venv, then `segnet demo`, which writes a sample data set, trains a small SegNet
# on the best device there is, evaluates it and segments images. Everything lands in runs/; arguments go to `segnet demo`.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
environment ""
exec .venv/bin/segnet demo "$@"
