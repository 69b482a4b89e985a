"""The host device's compiler and launcher: the same `.cu` files, built by a C++ compiler, every CUDA thread a fiber.

How a launch is carried out is in cuda/common/host_runtime.cpp; this file builds the shared library and calls into it.
"""

import ctypes
import errno
import functools
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from segnet_scratch.errors import CompileError, ConfigError, KernelFault
from segnet_scratch.files import reason
from segnet_scratch.runtime import observe
from segnet_scratch.runtime.cache import cache_directory, cache_key, cached
from segnet_scratch.runtime.shared_memory import rewrite_shared
from segnet_scratch.runtime.signature import ElementTypes, Kernel, Parameter, blank, parse_kernels
from segnet_scratch.runtime.source import Source, cuda_directory
from segnet_scratch.runtime.workers import worker_count

log = logging.getLogger(__name__)

ORDERS = ("ascending", "descending", "shuffled")
VARIABLES = ("zero", "pattern")


@dataclass(frozen=True)
class HostOptions:
    """How the host device runs threads and blocks.

    `order` is the order of the threads of a block between two barriers, and of the blocks unless `block_order` says
    otherwise; `seed` is that of the shuffled order. A kernel whose result depends on it has a race. `workers` is the
    number of operating-system threads that share the blocks; 0 takes one for each core. `sanitize` builds with
    AddressSanitizer and UndefinedBehaviorSanitizer; it works in a process that was started with `sanitizer_runtime`
    preloaded. `variables` builds so that automatic variables hold "zero" or a "pattern" before they get a value: a
    kernel whose result depends on it reads one too early, and so does one whose result depends on `shared_byte`, which
    fills shared memory before every block. ConfigError for a value that is none of these.

    Two ways to look closer: `part` (mask, value) runs only those threads of the grid (with barriers: blocks) whose
    number, masked, has this value; `trace` is filled with hashes of the shared arrays at every barrier, or compared
    with them where `compare_trace` is set: then a KernelFault names the first array that differs. It needs one worker.
    """

    order: str = "ascending"
    seed: int = 0
    workers: int = 0
    block_order: str | None = None
    sanitize: bool = False
    variables: str | None = None
    shared_byte: int = 0xFF  # 0xFF... is a NaN in every floating-point format
    part: tuple[int, int] = (0, 0)
    trace: np.ndarray | None = field(default=None, compare=False)  # uint64
    compare_trace: bool = False

    def __post_init__(self) -> None:
        for name, order in (("order", self.order), ("block_order", self.block_order or self.order)):
            if order not in ORDERS:
                raise ConfigError(f"host device: {name} is {order!r}; expected one of {', '.join(ORDERS)}")
        if self.variables not in (None, *VARIABLES):
            expected = f"None or one of {', '.join(VARIABLES)}"
            raise ConfigError(f"host device: variables is {self.variables!r}; expected {expected}")
        for name, limit in (("seed", 2**64 - 1), ("workers", 1024), ("shared_byte", 255)):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value <= limit:
                raise ConfigError(f"host device: {name} is {value!r}; expected an integer, 0 to {limit}")


class _Launch(ctypes.Structure):
    """host::Launch of host_runtime.h."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        *((name, ctypes.c_ulonglong) for name in ("dynamic_shared", "seed", "part_mask", "part_value")),
        ("trace", ctypes.c_void_p),
        ("trace_size", ctypes.c_ulonglong),
        *((name, ctypes.c_int) for name in ("compare_trace", "order", "block_order", "workers", "shared_byte")),
        ("barriers", ctypes.c_ulonglong),
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


def compiler_name() -> str:
    """The command of the compiler and the first line of what it says about itself."""
    command = find_compiler()
    return f"{' '.join(command)}: {_compiler_identity(tuple(command))[len(' '.join(command)) :].splitlines()[0]}"


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
        "-fno-strict-aliasing",  # kernels look at 16 bytes as pieces, and as numbers
        *("-fPIC", "-pthread", "-fvisibility=hidden", "-Wno-unknown-pragmas", "-DSEGNET_HOST"),
    ]


def sanitizer_flags() -> list[str]:
    """What a sanitized build adds to the other flags, over some of which it has the last word."""
    clang = "clang" in _compiler_identity(tuple(find_compiler()))
    shared = ["-shared-libasan"] if clang else []  # as g++ does without being asked
    return ["-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", *shared]


def sanitizer_runtime() -> Path:
    """The library of AddressSanitizer that goes with the compiler: LD_PRELOAD of a process with sanitized kernels.

    CompileError where there is none.
    """
    if sys.platform != "linux":
        raise CompileError(f"kernels can be sanitized on Linux only, not on {sys.platform}")
    command = find_compiler()
    for name in ("libasan.so", f"libclang_rt.asan-{platform.machine()}.so", "libclang_rt.asan.so"):
        result = subprocess.run([*command, f"-print-file-name={name}"], capture_output=True, text=True)
        path = Path(result.stdout.strip())
        if path.is_absolute() and path.is_file():
            if path.read_bytes()[:4] == b"\x7fELF":
                return path.resolve()
            # A linker script in its place names the library: INPUT ( /usr/lib64/libasan.so.8.0.0 )
            named = re.search(r"/\S+libasan\.so\S*", path.read_text(errors="replace"))
            if named:
                return Path(named.group())
    raise CompileError(
        f"the C++ compiler '{' '.join(command)}' brings no AddressSanitizer; install its runtime library (Debian, "
        "Ubuntu: apt install g++, or libclang-rt-dev for clang++; Fedora: dnf install libasan libubsan), or set CXX=g++"
    )


def variable_flags(variables: str | None) -> list[str]:
    """What automatic variables hold before they get a value; CompileError where the compiler cannot choose.

    Not optimised: from -O1 on g++ (12.2) takes a variable without a value for whatever suits it, in spite of the flag.
    """
    if variables is None:
        return []
    flag = f"-ftrivial-auto-var-init={variables}"
    command = find_compiler()
    if not _takes_flag(tuple(command), flag):
        raise CompileError(
            f"the C++ compiler '{' '.join(command)}' does not know {flag}; g++ 12, clang++ 16 and later do: set CXX"
        )
    return ["-O0", flag]


@functools.cache
def _takes_flag(command: tuple[str, ...], flag: str) -> bool:
    empty = [*command, flag, "-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run(empty, capture_output=True).returncode == 0


def _unit(source: Source) -> str:
    """The C++ text that is compiled: the runtime, the source, an entry for each kernel."""
    path = source.path.as_posix()
    kernels = parse_kernels(source)
    # What cannot be launched is left out: its types may be known to CUDA alone.
    unknown = [kernel.span for kernel in kernels if not kernel.launchable]
    text = blank(source.text, unknown)
    # Lines keep the names and numbers of the .cu file: errors, debuggers and sanitizers point there.
    name = json.dumps(path, ensure_ascii=False)
    # An #include knows no escapes.
    rewritten = bool(unknown) or "__shared__" in text or name != f'"{path}"'
    body = f"#line 1 {name}\n{rewrite_shared(text)}\n" if rewritten else f"#include {name}\n"
    entries = "".join(f"HOST_ENTRY({k.name}, {str(k.cooperative).lower()})\n" for k in kernels if k.launchable)
    return f'#include "common/host_runtime.h"\n{body}{entries}'


def _runtime() -> list[str]:
    """What every unit includes or is linked to, whether its source includes it or not."""
    names = ("host_runtime.cpp", "host_runtime.h", "host_warp.h")
    return [(cuda_directory() / "common" / name).read_text(encoding="utf-8") for name in names]


@functools.cache
def build(source: Source, types: ElementTypes, sanitize: bool = False, variables: str | None = None) -> Path:
    """The shared library of a source, compiled unless the cache has it. CompileError shows the compiler's lines."""
    flags = [*compiler_flags(), *(sanitizer_flags() if sanitize else ()), *variable_flags(variables)]
    unit = _unit(source)
    # Clones share libraries, except those whose reports name the file by its path.
    text = unit if sanitize else unit.replace(source.path.as_posix(), source.path.name)
    key = _key(flags, source.digest, text, types.defines)

    def make() -> bytes:
        runtime = _runtime_object(flags)
        log.info("compiling %s for the host device (%s)", source.path.name, types.name)
        options = [*flags, *types.defines, *(f"-I{directory}" for directory in source.include_directories)]
        library = _compile(source.path.name, unit, options, "-shared", "-x", "none", runtime)
        source.check_unchanged()
        return library

    return cached(cache_directory() / "host" / f"{source.path.stem}-{types.name}-{key}.so", make)


def _runtime_object(flags: Sequence[str]) -> Path:
    """What every library is linked to, compiled unless the cache has it."""
    path = cache_directory() / "host" / f"runtime-{_key(flags)}.o"
    unit = '#include "common/host_runtime.cpp"\n'
    return cached(path, lambda: _compile("host_runtime.cpp", unit, [*flags, f"-I{cuda_directory()}"], "-c"))


def _key(flags: Sequence[str], *parts: object) -> str:
    """Stands for what is compiled with these flags, by this compiler, for this processor."""
    return cache_key(*parts, _runtime(), flags, _compiler_identity(tuple(find_compiler())), _processor_identity())


def _compile(name: str, unit: str, flags: Sequence[str], *more: str | Path) -> bytes:
    """What the compiler makes of the text of a file with this name."""
    command = find_compiler()
    try:
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "kernel.so"
            unit_path = Path(folder) / "unit.cpp"
            unit_path.write_text(unit, encoding="utf-8", errors="surrogateescape")  # the names of folders
            result = subprocess.run(
                [*command, *flags, str(unit_path), *map(str, more), "-o", str(output)],
                capture_output=True,
                text=True,
                errors="replace",
            )
            if result.returncode != 0:
                raise CompileError(
                    f"{name} does not compile for the host device:",
                    *_first_errors(result.stderr),
                    *_hint(result.stderr),
                )
            if not output.is_file():
                raise CompileError(
                    f"the C++ compiler '{' '.join(command)}' wrote no library; unset CXX or set it to another"
                )
            return output.read_bytes()
    except OSError as error:
        place = error.filename or "the folder for temporary files"
        raise CompileError(f"{place}: {reason(error)}; compilers need room there: set TMPDIR to another") from error


def _first_errors(stderr: str, limit: int = 40) -> list[str]:
    """The compiler's report from its first error on: `file.cu:line:column: error: ...` and the line itself."""
    lines = stderr.strip().expandtabs().splitlines()
    start = next((i for i, line in enumerate(lines) if "error" in line), 0)
    return lines[start : start + limit]


def _hint(stderr: str) -> list[str]:
    """What to do about names that the C++ compiler does not know, and about a full disk."""
    if os.strerror(errno.ENOSPC) in stderr:
        return [f"{tempfile.gettempdir()} is full: make room there, or set TMPDIR to another folder"]
    unknown = "was not declared|has not been declared|does not name a type"
    found = re.findall(rf"['‘](\w+)['’] (?:{unknown})|(?:undeclared identifier|unknown type name) '(\w+)'", stderr)
    names = list(dict.fromkeys(a or b for a, b in found))
    if {"storage_t", "accumulate_t", "int64", "uint8", "uint64"} & set(names):
        return ['storage_t, int64 and the like come with #include "common/types.cuh"']
    if names:
        return [f"If CUDA knows {', '.join(names)}: cuda/common/host_runtime.h does not; --device cuda may"]
    return []


@functools.cache
def _entry(source: Source, types: ElementTypes, name: str, sanitize: bool, variables: str | None) -> Any:
    path = build(source, types, sanitize, variables)
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


def prepare(kernel: Kernel, types: ElementTypes, options: HostOptions) -> None:
    """Compiles and loads a kernel without running it, so that a process forked now finds it in memory."""
    _entry(kernel.source, types, kernel.name, options.sanitize, options.variables)


def _cell(parameter: Parameter, value: Any) -> np.ndarray:
    if parameter.tensor_map:
        return value.host_bytes()
    return np.array(0 if value is None else value.ctypes.data, np.uint64) if parameter.pointer else np.array(value)


def run(launch: observe.Launch, options: HostOptions) -> None:
    """Runs a kernel whose arguments the gate has checked. KernelFault names the block and what went wrong."""
    kernel = launch.kernel
    entry = _entry(kernel.source, launch.types, kernel.name, options.sanitize, options.variables)
    call = _Launch(
        grid=(ctypes.c_uint * 3)(*launch.grid),
        block=(ctypes.c_uint * 3)(*launch.block),
        dynamic_shared=launch.shared,
        seed=options.seed,
        part_mask=options.part[0],
        part_value=options.part[1],
        trace=None if options.trace is None else options.trace.ctypes.data,
        trace_size=0 if options.trace is None else options.trace.size,
        compare_trace=options.compare_trace,
        order=ORDERS.index(options.order),
        block_order=ORDERS.index(options.block_order or options.order),
        workers=options.workers or worker_count(),
        shared_byte=options.shared_byte,
    )
    # cuLaunchKernel's convention: the address of each value; for a pointer parameter the value is an address itself.
    cells = [_cell(parameter, value) for parameter, value in zip(kernel.parameters, launch.arguments, strict=True)]
    addresses = (ctypes.c_void_p * len(cells))(*(cell.ctypes.data for cell in cells))
    if entry(ctypes.byref(call), addresses) != 0:
        raise KernelFault(f"{kernel.source.path.name}: {call.message.decode(errors='replace')}")
    observe.current_observer().barriers(call.barriers)
