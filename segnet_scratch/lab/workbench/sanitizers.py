"""Runs a kernel built with AddressSanitizer and UndefinedBehaviorSanitizer, which name the line of the `.cu` file.

The sanitizer's library has to be in a process before anything else, so the run happens in a Python of its own, started
with the library preloaded. It finds the launch in a folder.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np

from segnet_scratch.errors import CompileError, KernelFault
from segnet_scratch.lab.workbench.execution import launch_once
from segnet_scratch.lab.workbench.guards import FIRST, Region
from segnet_scratch.lab.workbench.memory import place
from segnet_scratch.lab.workbench.reports import read_reports, sanitized_environment
from segnet_scratch.lab.workbench.setup import Setup, load_kernel
from segnet_scratch.runtime.devices import HostDevice
from segnet_scratch.runtime.host import HostOptions, build
from segnet_scratch.runtime.launch import ElementTypes


def find_memory_errors(setup: Setup) -> list[str]:
    """What the sanitizers report; nothing when the list is empty. CompileError where the compiler has none."""
    environment = sanitized_environment()
    build(setup.kernel.source, setup.types, sanitize=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write(setup, folder)
        result = subprocess.run(
            [sys.executable, "-P", "-c", f"from {__name__} import run_sanitized; run_sanitized()", name],
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
        )
        return _read_reports(setup, result, folder)


def _read_reports(setup: Setup, result: subprocess.CompletedProcess[str], folder: Path) -> list[str]:
    regions = folder / "regions.json"  # missing where the process did not get as far
    arrays = json.loads(regions.read_text()) if regions.is_file() else {}
    reports = read_reports(result.stderr, setup.kernel.name, {name: Region(*r) for name, r in arrays.items()})
    if not reports and result.returncode != 0:
        raise CompileError(f"the sanitized run of {setup.kernel.name} failed:\n{result.stderr.strip()[-2000:]}")
    if (folder / "fault").is_file():
        reports.append((folder / "fault").read_text())
    return reports


def _write(setup: Setup, folder: Path) -> None:
    job = {
        "kernel": f"{setup.kernel.source.path}:{setup.kernel.name}",
        "type": setup.types.storage.name,
        "scalars": setup.scalars,
        "shapes": setup.shapes,
        "contents": {name: array is not None for name, array in setup.contents.items()},
        "geometry": [setup.grid, setup.block, setup.shared],
    }
    (folder / "job.json").write_text(json.dumps(job))
    for name, array in setup.contents.items():
        if array is not None:
            np.save(folder / f"{name}.npy", array)


def _read(folder: Path) -> Setup:
    job: dict[str, Any] = json.loads((folder / "job.json").read_text())
    contents = {
        name: np.load(folder / f"{name}.npy", allow_pickle=False) if present else None
        for name, present in job["contents"].items()
    }
    grid, block, shared = job["geometry"]
    types = ElementTypes.of(np.dtype(job["type"]))
    shapes = {name: tuple(shape) for name, shape in job["shapes"].items()}
    return Setup(load_kernel(job["kernel"]), types, job["scalars"], contents, shapes, tuple(grid), tuple(block), shared)


def run_sanitized() -> None:
    """The process under the sanitizers: one run of the launch in the folder argv[1], guard zones out of bounds."""
    os.environ.pop("LD_PRELOAD")  # not for the compiler's --version
    folder = Path(sys.argv[1])
    setup = _read(folder)
    device = HostDevice(HostOptions(workers=1, sanitize=True))
    guarded, arrays = place(setup, device, FIRST)
    (folder / "regions.json").write_text(json.dumps({n: astuple(r) for n, r in guarded.forbid().items()}))
    try:
        launch_once(setup, arrays, device)
    except KernelFault as error:
        (folder / "fault").write_text(str(error))
    os._exit(0)  # nothing is left to be done, and Python's end under a sanitizer is slow
