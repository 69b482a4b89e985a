"""Compiles kernels to cubin for a GPU architecture through libnvrtc. Needs neither CuPy nor a driver nor a GPU."""

import contextlib
import ctypes
import ctypes.util
import functools
import importlib.metadata
import importlib.util
import os
import re
import sys
from pathlib import Path

from segnet_scratch.errors import CompileError
from segnet_scratch.runtime.cache import cache_directory, cache_key, cached
from segnet_scratch.runtime.signature import ElementTypes
from segnet_scratch.runtime.source import Source

MISSING = (
    "libnvrtc, NVIDIA's run-time compiler, was not found; pip install 'segnet_scratch[cuda13]' (or [cuda12]) "
    "brings it, and so does a CUDA toolkit named by CUDA_PATH"
)


def _candidates() -> list[Path]:
    """Every libnvrtc in pip's nvidia wheels, in this Python's environment and in a CUDA toolkit, best first.

    Best is the CUDA version of the CuPy that is installed, because a driver refuses code of a newer major version than
    its own; then the newest.
    """
    folders: list[Path] = []
    try:
        spec = importlib.util.find_spec("nvidia")
    except ValueError:  # an entry of sys.modules without a specification
        spec = None
    for location in (spec.submodule_search_locations or ()) if spec else ():
        folders += sorted(Path(location).glob("*/lib"))  # nvidia/cuda_nvrtc/lib for CUDA 12, nvidia/cu13/lib for 13
    folders.append(Path(sys.prefix) / "lib")  # conda's
    for toolkit in (os.environ.get("CUDA_PATH"), os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if toolkit:
            folders += [Path(toolkit) / "lib64", Path(toolkit) / "lib"]
    found = [path for folder in folders for path in sorted(folder.glob("libnvrtc.so*"))]
    wanted = _cupy_major()
    return sorted(found, key=lambda path: (_file_version(path)[:1] == wanted, _file_version(path)), reverse=True)


def _file_version(library: Path) -> tuple[int, ...]:
    """(13, 0, 48) of a link to libnvrtc.so.13.0.48; a wheel's file says only (13,)."""
    return tuple(int(part) for part in re.findall(r"\d+", library.resolve().name.partition(".so")[2]))


def _cupy_major() -> tuple[int, ...]:
    """(13,) where the package cupy-cuda13x is installed; () without CuPy."""
    for major in (13, 12):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.distribution(f"cupy-cuda{major}x")
            return (major,)
    return ()


@functools.cache
def _library() -> ctypes.CDLL:
    names = [*map(str, _candidates()), ctypes.util.find_library("nvrtc")]
    for name in filter(None, names):
        try:
            # It opens its builtins by name, which the loader finds only where they are loaded already: a wheel's folder
            # is on nobody's path.
            for builtins in sorted(Path(name).parent.glob("libnvrtc-builtins.so*")):
                ctypes.CDLL(str(builtins))
            library = ctypes.CDLL(name)
        except OSError:
            continue
        if hasattr(library, "nvrtcGetCUBIN"):  # older ones, before CUDA 11.1, make PTX only
            return library
    raise CompileError(MISSING)


def library_path() -> str:
    """The file of the libnvrtc in use; CompileError where there is none."""
    return _library()._name


def nvrtc_version() -> tuple[int, int]:
    """(major, minor) of the libnvrtc in use; CompileError where there is none."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(_library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "nvrtcVersion")
    return major.value, minor.value


def supported_architectures() -> tuple[str, ...]:
    """The architectures that this libnvrtc compiles for: sm_75, sm_80, ...; CompileError where there is none."""
    count = ctypes.c_int()
    _check(_library().nvrtcGetNumSupportedArchs(ctypes.byref(count)), "nvrtcGetNumSupportedArchs")
    numbers = (ctypes.c_int * count.value)()
    _check(_library().nvrtcGetSupportedArchs(numbers), "nvrtcGetSupportedArchs")
    return tuple(f"sm_{number}" for number in numbers)


def _check(status: int, what: str) -> None:
    if status != 0:
        library = _library()
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise CompileError(f"{what} failed: {library.nvrtcGetErrorString(status).decode()}")


def compiler_options(types: ElementTypes, architecture: str) -> list[str]:
    """No fused multiply-add but where a kernel says fma, as on the host device: both give the same bits."""
    fixed = ("-std=c++17", "-fmad=false", "-lineinfo", "--ptxas-options=-v")
    return [f"-arch={architecture}", *fixed, *types.defines]


def compile_cubin(source: Source, types: ElementTypes, architecture: str, log: list[str] | None = None) -> bytes:
    """Compiles a source for one architecture, such as "sm_90", and returns the cubin.

    The program carries the source's own path and line information, so that profilers and debuggers show the `.cu`
    file. `log` receives the compiler's output, with the registers, spills and stack of every kernel.
    Raises CompileError with the lines at fault.
    """
    if not source.compiles_for(architecture):
        needed = source.target(architecture)
        needed = f"is for {needed} only, not for" if needed != architecture else "needs a newer GPU than"
        raise CompileError(f"{source.path.name} {needed} {architecture}; convolutions: use rung 'tiled'")
    library = _library()
    program = ctypes.c_void_p()
    text, name = source.text.encode(), os.fsencode(source.path)
    _check(library.nvrtcCreateProgram(ctypes.byref(program), text, name, 0, None, None), "nvrtcCreateProgram")
    try:
        options = compiler_options(types, source.target(architecture))
        options += [f"-I{directory}" for directory in source.include_directories]
        array = (ctypes.c_char_p * len(options))(*(os.fsencode(option) for option in options))
        status = library.nvrtcCompileProgram(program, len(options), array)
        output = _read(library, program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
        if status != 0:
            report = output.strip().expandtabs()[:4000].splitlines()
            raise CompileError(f"{source.path.name} does not compile for {architecture}:", *report)
        if log is not None:
            log.append(output)
        return _read(library, program, "CUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _read(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)), f"nvrtcGet{what}Size")
    data = ctypes.create_string_buffer(size.value)
    _check(getattr(library, f"nvrtcGet{what}")(program, data), f"nvrtcGet{what}")
    return data.raw


def cache_path(folder: str, ending: str, source: Source, types: ElementTypes, architecture: str) -> Path:
    """Where the cache has what came of compiling a source, or would have it: `cuda`, `.cubin`.

    The key is what the compiler sees, not where it lies: clones share their cubins. Line information then names the
    file of the clone that compiled first, which reads the same.
    """
    key = cache_key(source.digest, compiler_options(types, architecture), nvrtc_version())
    return cache_directory() / folder / f"{source.path.stem}-{types.name}-{architecture}-{key}{ending}"


def cached_cubin(source: Source, types: ElementTypes, architecture: str) -> Path:
    """The path of the cubin of a source, compiled unless the cache has it."""

    def compiled() -> bytes:
        cubin = compile_cubin(source, types, architecture)
        source.check_unchanged()
        return cubin

    return cached(cache_path("cuda", ".cubin", source, types, architecture), compiled)
