#!/usr/bin/env bash
# Everything that needs a GPU, in one command, from the tree and without a network: `segnet verify --device cuda`, first a few
# cases of everything, then more until 8 minutes are over (docs/explanation/proof.md). The report in JSON is written as it
# goes on, and says what was not reached. Takes the options of that command: a second `--minutes` counts.
set -euo pipefail
cd "$(dirname "$0")/.."
python=python3
[ -x .venv/bin/python ] && .venv/bin/python -c 'import cupy' 2>/dev/null && python=.venv/bin/python
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
exec "$python" -m segnet_scratch verify --device cuda --minutes 8 --json "benchmarks/gpu-check-$(date +%F).json" "$@"
