#!/usr/bin/env bash
# Everything that needs a GPU, in one command of at most 8 minutes, without a network, from the bare tree: every kernel
# against its reference, gradients, training, graphs, uploads, compute-sanitizer, the demo, timings beside PyTorch.
# See scripts/gpu_check.sh --help.
set -euo pipefail
cd "$(dirname "$0")/.."
python=python3
[ -x .venv/bin/python ] && .venv/bin/python -c 'import cupy' 2>/dev/null && python=.venv/bin/python
PYTHONPATH="$PWD:$PWD/scripts" PYTHONUNBUFFERED=1 exec "$python" -m gpu_check "$@"
