"""A worker process of `segnet verify` that sees a GPU, the stand-in for CuPy: `python -m support.gpu_worker`."""

import tempfile
from pathlib import Path

import pytest

from segnet_scratch.lab.proof.processes import main
from support.fake_cupy import FakeCupy

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        FakeCupy().install(pytest.MonkeyPatch(), Path(folder))
        main()
