"""CuPy: the only file that imports it. Whether it can be used, and what it knows of the GPUs."""

import ctypes
import importlib.util
from contextlib import suppress
from pathlib import Path
from typing import Any

from segnet_scratch.errors import MissingLibraryError

NO_DEVICE = 100  # cudaErrorNoDevice
ON_THE_CPU = "--device numpy and --device host need no GPU"


def import_cupy() -> Any:
    """The module."""
    import cupy

    return cupy


def nccl_library() -> Any:
    """CuPy's module of NCCL; MissingLibraryError where that is not to be had."""
    wheel = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.nccl")
    for library in (Path(place) / "lib/libnccl.so.2" for place in (wheel and wheel.submodule_search_locations) or ()):
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # the wheel's, which the linker would not find
    import_cupy()
    try:
        from cupy.cuda import nccl  # from CuPy 14.2 on a module that its package does not import
    except ImportError:
        nccl = None
    if not getattr(nccl, "available", False):
        raise MissingLibraryError(
            "several GPUs: CuPy finds no NCCL; pip install 'segnet_scratch[nccl13]' for a driver of CUDA 13, [nccl12] "
            "for CUDA 12"
        )
    return nccl


def cuda_missing() -> str | None:
    """Why the cuda device cannot be used, with the fix; None where it can.

    CuPy's own is_available() says no more than that it cannot: a missing driver, one that is too old and a missing
    GPU look alike there.
    """
    try:
        cupy = import_cupy()
    except Exception as error:  # a CuPy that does not fit NumPy or the CUDA libraries fails in many ways
        return (
            f"the cuda device needs CuPy, which does not import ({error}); pip install 'segnet_scratch[cuda13]' for a "
            f"driver of CUDA 13, [cuda12] for CUDA 12; {ON_THE_CPU}"
        )
    runtime = cupy.cuda.runtime
    try:
        driver, built = runtime.driverGetVersion(), runtime.runtimeGetVersion()
        if driver == 0:
            return (
                "there is no NVIDIA driver (libcuda does not load); install it and check that nvidia-smi works (in a "
                f"container: start it with --gpus all); {ON_THE_CPU}"
            )
        if driver // 1000 < built // 1000:  # a driver runs every CUDA of its own major version
            return _too_old(driver, built)
        if runtime.getDeviceCount() > 0:
            return None
    except Exception as error:  # CuPy raises driver errors of several kinds
        if getattr(error, "status", None) != NO_DEVICE:
            return f"CuPy cannot use the GPU: {error}; check that nvidia-smi works; {ON_THE_CPU}"
    return (
        f"the NVIDIA driver (CUDA {_version(driver)}) sees no GPU; check that nvidia-smi lists one and that "
        f"CUDA_VISIBLE_DEVICES does not hide it; {ON_THE_CPU}"
    )


def _too_old(driver: int, built: int) -> str:
    fix = "update the driver (580 or newer for CUDA 13, 525 or newer for CUDA 12)"
    if driver // 1000 == 12:
        fix += f", or pip uninstall cupy-cuda{built // 1000}x and pip install 'segnet_scratch[cuda12]'"
    return (
        f"the NVIDIA driver is too old: it runs CUDA {_version(driver)} at most, the installed CuPy is made for "
        f"CUDA {_version(built)}; {fix}; {ON_THE_CPU}"
    )


def _version(number: int) -> str:
    """13.2 for CUDA's 13020."""
    return f"{number // 1000}.{number % 1000 // 10}"


def cupy_facts() -> dict[str, Any]:
    """What CuPy knows of itself and of the GPUs, for `segnet doctor`. Raises whatever CuPy raises where it is broken.

    "nccl" is its version where there is one, "runtime" and "driver" are CUDA versions (13020 is 13.2; a driver of 0 is
    none), "gpus" have "name", "capability" (major, minor) and "bytes", "problem" is CuPy's reason for an empty list.
    """
    cupy = import_cupy()
    runtime = cupy.cuda.runtime
    facts: dict[str, Any] = {"version": cupy.__version__, "problem": "", "gpus": []}
    facts |= {"runtime": runtime.runtimeGetVersion(), "driver": runtime.driverGetVersion()}
    with suppress(Exception):  # whatever a library that is missing or broken raises
        facts["nccl"] = str(nccl_library().get_version())
    try:
        for index in range(runtime.getDeviceCount()):
            properties = runtime.getDeviceProperties(index)
            capability = properties["major"], properties["minor"]
            name, memory = properties["name"].decode(errors="replace"), properties["totalGlobalMem"]
            facts["gpus"].append({"name": name, "capability": capability, "bytes": memory})
    except Exception as error:  # CuPy raises driver errors of several kinds
        facts["problem"] = str(error)
    return facts
