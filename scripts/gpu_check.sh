#!/usr/bin/env bash
# Everything that needs a GPU, in one command, without a network, from the bare tree: every kernel against its NumPy
# reference, gradients, training steps, compute-sanitizer, the demo, timings. See scripts/gpu_check.py --help.
set -euo pipefail
cd "$(dirname "$0")/.."
python=python3
[ -x .venv/bin/python ] && .venv/bin/python -c 'import cupy' 2>/dev/null && python=.venv/bin/python
PYTHONPATH="$PWD:$PWD/scripts" PYTHONUNBUFFERED=1 exec "$python" scripts/gpu_check.py "$@"
