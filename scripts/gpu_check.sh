#!/usr/bin/env bash
# Everything that needs a GPU, in one command, from the tree and without a network: `segnet verify --device cuda`,
# with a report in JSON. Takes the options of that command.
set -euo pipefail
cd "$(dirname "$0")/.."
python=python3
[ -x .venv/bin/python ] && .venv/bin/python -c 'import cupy' 2>/dev/null && python=.venv/bin/python
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
exec "$python" -m segnet_scratch verify --device cuda --minutes 8 --json "benchmarks/gpu-check-$(date +%F).json" "$@"
