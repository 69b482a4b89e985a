"""The host device's compiler and launcher: the same `.cu` files, built by a C++ compiler, every CUDA thread a fiber.

How a launch is carried out is in cuda/common/host_runtime.h; this file builds the shared library and calls into it.
"""

import ctypes
import functools
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from segnet_scratch.errors import CompileError, ConfigError, KernelFault
from segnet_scratch.kernels.cache import cache_directory, cache_key, publish
from segnet_scratch.kernels.signature import ElementTypes, Kernel, parse_kernels
from segnet_scratch.kernels.source import Source, cuda_directory

log = logging.getLogger(__name__)

ORDERS = ("ascending", "descending", "shuffled")


@dataclass(frozen=True)
class HostOptions:
    """How the host device runs threads and blocks.

    `order` is the order of the threads of a block between two barriers, and of the blocks; `seed` is that of the
    shuffled order. A kernel whose result depends on it has a race. `workers` is the number of operating-system threads
    that share the blocks; 0 takes one for each core. ConfigError for a value that is none of these.
    """

    order: str = "ascending"
    seed: int = 0
    workers: int = 0

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ConfigError(f"host device: order is {self.order!r}; expected one of {', '.join(ORDERS)}")
        for name, limit in (("seed", 2**64 - 1), ("workers", 1024)):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value <= limit:
                raise ConfigError(f"host device: {name} is {value!r}; expected an integer, 0 to {limit}")


class _Launch(ctypes.Structure):
    """host::Launch of host_runtime.h."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("dynamic_shared", ctypes.c_ulonglong),
        ("seed", ctypes.c_ulonglong),
        ("order", ctypes.c_int),
        ("workers", ctypes.c_int),
        ("message", ctypes.c_char * 512),
    )


def find_compiler() -> list[str]:
    """The command of a C++17 compiler: `$CXX`, c++, g++, clang++, else the `ziglang` wheel. CompileError if none."""
    chosen = os.environ.get("CXX", "").strip()
    if chosen:
        command = chosen.split()
        if shutil.which(command[0]) is None:
            raise CompileError(
                f"$CXX is '{chosen}', but there is no program '{command[0]}'; correct CXX, or unset it: then c++, g++, "
                "clang++ are tried, or a compiler that pip brings: pip install ziglang"
            )
        return command
    for name in ("c++", "g++", "clang++"):
        path = shutil.which(name)
        if path:
            return [path]
    try:
        import ziglang  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        raise CompileError(
            "the host device needs a C++17 compiler and found none ($CXX, c++, g++, clang++); install one "
            "(Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install), or let pip "
            "bring one: pip install ziglang. The numpy device needs no compiler: --device numpy"
        ) from None
    return [sys.executable, "-m", "ziglang", "c++"]


@functools.cache
def _compiler_identity(command: tuple[str, ...]) -> str:
    try:
        result = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise CompileError(f"the C++ compiler '{' '.join(command)}' does not run: {error}") from error
    if result.returncode != 0:
        raise CompileError(f"the C++ compiler '{' '.join(command)}' does not run: {result.stderr.strip()[:500]}")
    return " ".join(command) + result.stdout


@functools.cache
def _processor_identity() -> str:
    """What `-march=native` depends on: a home folder may be shared by unlike machines."""
    try:
        features = re.findall(r"^(?:flags|Features|model name)\s*:.*$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        return platform.machine() + "\n".join(sorted(set(features)))
    except OSError:
        return platform.machine() + platform.processor() + platform.platform()


def compiler_flags() -> list[str]:
    """Optimised for this processor, with line information and IEEE semantics.

    Multiplications and additions are fused only where a kernel says fma: otherwise each compiler would fuse others, and
    the host's results would not be the GPU's (see nvrtc.py).
    """
    native = "-march=native" if platform.machine().lower() in ("x86_64", "amd64", "i686") else "-mcpu=native"
    return [
        *("-x", "c++", "-std=c++17", "-O3", native, "-fno-math-errno", "-ffp-contract=off", "-g1"),
        *("-fPIC", "-shared", "-pthread", "-fvisibility=hidden", "-Wno-unknown-pragmas", "-DSEGNET_HOST"),
    ]


@functools.cache
def build(source: Source, types: ElementTypes) -> Path:
    """The shared library of a source, compiled unless the cache has it. CompileError shows the compiler's lines."""
    command = find_compiler()
    flags = [*compiler_flags(), *types.defines]
    runtime = (cuda_directory() / "common" / "host_runtime.h").read_text(encoding="utf-8")
    entries = "".join(f"HOST_ENTRY({k.name}, {str(k.cooperative).lower()})\n" for k in parse_kernels(source))
    key = cache_key(source.digest, entries, runtime, flags, _compiler_identity(tuple(command)), _processor_identity())
    library = cache_directory() / "host" / f"{source.path.stem}-{types.storage.name}-{key}.so"
    if library.is_file():
        return library
    log.info("compiling %s for the host device (%s)", source.path.name, types.storage.name)
    # Included by its own path, so that errors, debuggers and sanitizers name the line of the .cu file.
    unit = f'#include "common/host_runtime.h"\n#include "{source.path.as_posix()}"\n{entries}'
    includes = [f"-I{directory}" for directory in source.include_directories]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "kernel.so"
        unit_path = Path(folder) / "unit.cpp"
        unit_path.write_text(unit, encoding="utf-8")
        result = subprocess.run(
            [*command, *flags, *includes, str(unit_path), "-o", str(output)], capture_output=True, text=True
        )
        if result.returncode != 0:
            raise CompileError(
                f"{source.path.name} does not compile for the host device:\n{_first_errors(result.stderr)}"
            )
        if not output.is_file():
            raise CompileError(
                f"the C++ compiler '{' '.join(command)}' wrote no library; unset CXX or set it to another"
            )
        source.check_unchanged()
        publish(library, output.read_bytes())
    return library


def _first_errors(stderr: str, limit: int = 40) -> str:
    """The compiler's report from its first error on: `file.cu:line:column: error: ...` and the line itself."""
    lines = stderr.strip().splitlines()
    start = next((i for i, line in enumerate(lines) if "error" in line), 0)
    return "\n".join(lines[start : start + limit])


@functools.cache
def _entry(source: Source, types: ElementTypes, name: str) -> Any:
    path = build(source, types)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise CompileError(
            f"the compiled kernels {path} do not load: {error}; delete the file; if that does not help, set "
            "SEGNET_CACHE to a folder from which programs may be run"
        ) from error
    function = getattr(library, f"host_launch_{name}")
    function.argtypes = (ctypes.POINTER(_Launch), ctypes.POINTER(ctypes.c_void_p))
    function.restype = ctypes.c_int
    return function


@functools.cache
def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(
    kernel: Kernel,
    types: ElementTypes,
    grid: Sequence[int],
    block: Sequence[int],
    values: Sequence[Any],
    shared: int,
    options: HostOptions,
) -> None:
    """Runs a kernel whose arguments the gate has checked. KernelFault names the block and what went wrong."""
    entry = _entry(kernel.source, types, kernel.name)
    launch = _Launch(
        grid=(ctypes.c_uint * 3)(*grid),
        block=(ctypes.c_uint * 3)(*block),
        dynamic_shared=shared,
        seed=options.seed,
        order=ORDERS.index(options.order),
        workers=options.workers or _cores(),
    )
    # cuLaunchKernel's convention: the address of each value; for a pointer parameter the value is an address itself.
    cells = [
        np.array(0 if value is None else value.ctypes.data, dtype=np.uint64) if parameter.pointer else np.array(value)
        for parameter, value in zip(kernel.parameters, values, strict=True)
    ]
    addresses = (ctypes.c_void_p * len(cells))(*(cell.ctypes.data for cell in cells))
    if entry(ctypes.byref(launch), addresses) != 0:
        raise KernelFault(f"{kernel.source.path.name}: {launch.message.decode(errors='replace')}")
