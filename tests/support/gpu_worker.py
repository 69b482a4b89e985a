"""A worker process of `segnet verify` that sees a GPU, the stand-in for CuPy, and knows the faulty rows:
`python -m support.gpu_worker`."""

import tempfile
from pathlib import Path

import pytest

from segnet_scratch.lab.proof import table
from segnet_scratch.lab.proof.processes import main
from support.fake_cupy import FakeCupy
from support.faulty_rows import ROWS

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        table.ROWS = (*table.ROWS, *ROWS.values())
        FakeCupy().install(pytest.MonkeyPatch(), Path(folder))
        main()
