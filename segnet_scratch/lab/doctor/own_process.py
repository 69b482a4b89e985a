"""Runs what loads foreign code (CuPy, NVRTC, a kernel just compiled) in a process of its own: it may crash or hang."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from segnet_scratch.lab.doctor.findings import PACKAGE, last_line

TIMEOUT = 120  # seconds
_PROBE = Path(__file__).with_name("probe.cu")


def ask(task: str) -> dict[str, Any]:
    """The answer of one of TASKS; {"error": message, "type": name of the exception} where it fails or crashes."""
    path = os.pathsep.join(filter(None, (str(PACKAGE.parent), os.environ.get("PYTHONPATH"))))
    try:
        result = subprocess.run(
            [sys.executable, "-P", "-m", "segnet_scratch.lab.doctor.own_process", task],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
        return json.loads(result.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError) as error:
        return {"error": str(error)}
    except (IndexError, ValueError):
        code = result.returncode
        end = f"exit code {code}" if code >= 0 else signal.Signals(-code).name  # SIGSEGV, SIGILL, ...
        return {"error": f"the process that tried ended with {end}: {last_line(result.stderr)}"}


def _run_kernel(name: str) -> dict[str, Any]:
    """Compiles a kernel and launches it through the gate, on the host or the cuda device."""
    import numpy as np

    from segnet_scratch.errors import KernelFault
    from segnet_scratch.runtime.devices import get_device
    from segnet_scratch.runtime.launch import ElementTypes, launch
    from segnet_scratch.runtime.signature import parse_kernels
    from segnet_scratch.runtime.source import read_source

    with tempfile.TemporaryDirectory() as folder:
        os.environ["SEGNET_CACHE"] = folder  # a compiler that broke since the last run must not hide behind the cache
        device = get_device(name)
        x = np.arange(64, dtype=np.float32)
        y = device.zeros(x.shape, x.dtype)
        types = ElementTypes.of(x.dtype)
        (kernel,) = parse_kernels(read_source(_PROBE))
        launch(device, kernel, 1, x.size, [device.upload(x), y, x.size], types)
        if not np.array_equal(device.download(y), x[::-1]):
            raise KernelFault(f"a kernel compiled for the {name} device gives wrong values")
    return {}


def _use_nvrtc() -> dict[str, Any]:
    """Which libnvrtc there is. It also has to compile something, since it loads a second library for that."""
    import numpy as np

    from segnet_scratch.runtime import nvrtc
    from segnet_scratch.runtime.launch import ElementTypes
    from segnet_scratch.runtime.source import read_source

    architectures = nvrtc.supported_architectures()
    nvrtc.compile_cubin(read_source(_PROBE), ElementTypes.of(np.dtype(np.float32)), "sm_90")
    return {"version": nvrtc.nvrtc_version(), "path": nvrtc.library_path(), "architectures": architectures}


def _ask_cupy() -> dict[str, Any]:
    from segnet_scratch.runtime.devices import cupy_facts

    return cupy_facts()


def _ask_mpi() -> dict[str, Any]:
    """Which MPI library mpi4py loads; nothing is started."""
    import mpi4py

    mpi4py.rc.initialize = False
    from mpi4py import MPI

    return {"text": f"mpi4py {mpi4py.__version__}, {MPI.Get_library_version().splitlines()[0]}"}


TASKS: dict[str, Callable[[], dict[str, Any]]] = {
    "host": lambda: _run_kernel("host"),
    "cuda": lambda: _run_kernel("cuda"),
    "nvrtc": _use_nvrtc,
    "cupy": _ask_cupy,
    "mpi": _ask_mpi,
}

if __name__ == "__main__":
    try:
        answer = TASKS[sys.argv[1]]()
    except Exception as error:
        answer = {"error": str(error) or type(error).__name__, "type": type(error).__name__}
    print(json.dumps(answer))
