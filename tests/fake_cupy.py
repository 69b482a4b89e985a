"""A stand-in for CuPy on a machine without a GPU: it records what the cuda device asks of it, validates it as CuPy and
a driver would, and runs the kernels through the host runtime, so that whole training steps can be checked.

It knows only what segnet_scratch may use of CuPy; anything else raises AttributeError. What it cannot show: that CuPy
and a driver agree. That takes a GPU.
"""

import sys
import types
from math import prod
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from segnet_scratch.errors import CompileError
from segnet_scratch.kernels import ElementTypes, nvrtc
from segnet_scratch.kernels import host as host_kernels
from segnet_scratch.kernels.host import HostOptions
from segnet_scratch.kernels.signature import parse_kernels
from segnet_scratch.kernels.source import Source

# A driver's limits, not taken from the launch gate: a mistake there is to show here.
MAX_GRID, MAX_BLOCK, MAX_THREADS, MAX_SHARED = (2**31 - 1, 65535, 65535), (1024, 1024, 64), 1024, 48 * 1024
DLPACK_GPU = 2  # kDLCUDA


def has_nvrtc() -> bool:
    try:
        nvrtc.nvrtc_version()
    except CompileError:
        return False
    return True


class Cubin(NamedTuple):
    """What a cubin was compiled from."""

    source: Source
    types: ElementTypes
    architecture: str


class Launch(NamedTuple):
    name: str
    cubin: Cubin
    grid: tuple[int, ...]
    block: tuple[int, ...]
    arguments: tuple[Any, ...]
    shared: int


class OutOfMemoryError(MemoryError):
    pass


class ndarray:
    """An array in the memory of a GPU. As with CuPy's, NumPy cannot read it."""

    __array_ufunc__ = None
    __hash__ = None

    def __init__(self, cupy: "FakeCupy", values: np.ndarray, gpu: int | None = None) -> None:
        self._cupy, self._values, self._gpu = cupy, values, cupy.gpu if gpu is None else gpu

    def __getattr__(self, name: str) -> Any:
        if name in ("shape", "dtype", "ndim", "size", "nbytes", "itemsize", "strides"):
            return getattr(self._values, name)
        raise AttributeError(f"the stand-in for CuPy has no ndarray.{name}")

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed.")

    @property
    def device(self) -> Any:
        return self._cupy.cuda.Device(self._gpu)

    @property
    def data(self) -> Any:
        return SimpleNamespace(ptr=self._values.__array_interface__["data"][0])

    @property
    def flags(self) -> Any:
        flags = self._values.flags
        return SimpleNamespace(c_contiguous=flags.c_contiguous, f_contiguous=flags.f_contiguous)

    @property
    def T(self) -> "ndarray":
        return ndarray(self._cupy, self._values.T, self._gpu)

    def reshape(self, *shape: Any) -> "ndarray":
        return ndarray(self._cupy, self._values.reshape(*shape), self._gpu)

    def __getitem__(self, index: Any) -> "ndarray":
        assert isinstance(index, slice)
        return ndarray(self._cupy, self._values[index], self._gpu)

    def copy(self) -> "ndarray":
        copy = self._cupy.empty(self.shape, self.dtype)
        copy._values[...] = self._values
        return copy

    def set(self, values: np.ndarray) -> None:
        assert type(values) is np.ndarray, "cupy.ndarray.set takes NumPy arrays"
        assert values.dtype == self.dtype
        assert values.shape == self.shape
        assert self._values.flags.forc
        self._values[...] = values

    def __setitem__(self, index: Any, value: Any) -> None:
        assert isinstance(value, int | float | np.generic | ndarray), "CuPy assigns scalars and its own arrays"
        self._values[index] = value._values if isinstance(value, ndarray) else value

    def __dlpack_device__(self) -> tuple[int, int]:
        return DLPACK_GPU, self._gpu

    def __dlpack__(self, *, stream: int | None = None, max_version: Any = None, copy: Any = None) -> Any:
        if stream is None:
            raise BufferError("whoever names no stream, such as NumPy, cannot read the memory of a GPU")
        return self._values.__dlpack__()


class FakeCupy(types.ModuleType):
    """What stands in `sys.modules["cupy"]`.

    `launches` and `loaded` (a Cubin for each module) are in order. `free` bytes are what one array may take, `gpu` is
    the current one; both may be changed. `available` may be an exception. A `dry` one runs no kernels and does not let
    NVRTC compile them, and needs no compiler therefore.
    """

    def __init__(
        self,
        capability: str = "90",
        available: bool | Exception = True,
        free: int = 2**34,
        total: int = 2**34,
        dry: bool = False,
    ) -> None:
        super().__init__("cupy")
        self.ndarray = ndarray
        self.capability, self.available, self.free, self.dry = capability, available, free, dry
        self.gpu = 0
        self.cubins: dict[str, Cubin] = {}  # by path
        self.loaded: list[Cubin] = []
        self.launches: list[Launch] = []
        self.events: list[Event] = []
        self.synchronisations = 0
        self.cuda = SimpleNamespace(
            Device=lambda gpu=None: Gpu(self.gpu if gpu is None else gpu, capability),
            Event=lambda: Event(self),
            get_elapsed_time=lambda first, last: 1e3 * (last.reached() - first.reached()),
            is_available=self._is_available,
            get_current_stream=lambda: SimpleNamespace(synchronize=self._synchronise),
            memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
            runtime=SimpleNamespace(memGetInfo=lambda: (self.free, total)),
        )

    def install(self, monkeypatch: Any, folder: Path) -> "FakeCupy":
        """Puts this in CuPy's place for one test. `folder` takes the cubins that NVRTC does not compile.

        Those are empty ELF files: nothing reads them here.
        """
        compile_source, real = nvrtc.cached_cubin, has_nvrtc() and not self.dry

        def cached_cubin(source: Source, types: ElementTypes, architecture: str) -> Path:
            if real:
                path = compile_source(source, types, architecture)
            else:
                path = folder / f"{len(self.cubins)}.cubin"
                path.write_bytes(b"\x7fELF")
            self.cubins[str(path)] = Cubin(source, types, architecture)
            return path

        monkeypatch.setattr(nvrtc, "cached_cubin", cached_cubin)
        monkeypatch.setitem(sys.modules, "cupy", self)
        return self

    def _is_available(self) -> bool:
        if isinstance(self.available, Exception):
            raise self.available
        return self.available

    def _synchronise(self) -> None:
        self.synchronisations += 1

    def _allocate(self, shape: Any, dtype: Any, order: str = "C") -> np.ndarray:
        size = prod(shape) * np.dtype(dtype).itemsize
        if size > self.free:
            raise OutOfMemoryError(f"Out of memory allocating {size:,} bytes")
        values = np.empty(shape, dtype, order)
        values.ravel("K").view(np.uint8)[...] = 0xFF  # a GPU's memory is not zeroed either
        return values

    def empty(self, shape: Any, dtype: Any) -> ndarray:
        return ndarray(self, self._allocate(shape, dtype))

    def zeros(self, shape: Any, dtype: Any) -> ndarray:
        array = self.empty(shape, dtype)
        array[...] = 0
        return array

    def asarray(self, array: Any) -> ndarray:
        """As CuPy's, this keeps the order of an array in Fortran's order."""
        if isinstance(array, ndarray):
            return array
        assert type(array) is np.ndarray
        assert array.dtype.kind in "biufc"
        values = self._allocate(array.shape, array.dtype, "F" if array.flags.fnc else "C")
        values[...] = array
        return ndarray(self, values)

    def asnumpy(self, array: ndarray) -> np.ndarray:
        assert isinstance(array, ndarray)
        return np.array(array._values, order="C")

    def ascontiguousarray(self, array: ndarray) -> ndarray:
        assert isinstance(array, ndarray)
        return array if array.flags.c_contiguous else array.copy()

    def from_dlpack(self, array: Any) -> ndarray:
        kind, gpu = array.__dlpack_device__()
        if kind != DLPACK_GPU:
            raise TypeError("CPU arrays cannot be directly imported to CuPy.")
        capsule = array.__dlpack__(stream=1, max_version=(1, 0), copy=None)
        on_cpu = np.from_dlpack(SimpleNamespace(__dlpack__=lambda **_: capsule, __dlpack_device__=lambda: (1, 0)))
        interface = on_cpu.__array_interface__
        interface["data"] = interface["data"][0], False  # NumPy would have it read-only; CuPy knows no such thing
        return ndarray(self, np.asarray(SimpleNamespace(__array_interface__=interface, memory=on_cpu)), gpu)

    def RawModule(self, *, path: str) -> Any:
        assert type(path) is str
        assert Path(path).read_bytes()[:4] == b"\x7fELF", "a cubin is an ELF file"
        cubin = self.cubins[path]
        assert cubin.architecture == f"sm_{self.capability}", "CUDA_ERROR_NO_BINARY_FOR_GPU"
        self.loaded.append(cubin)
        return SimpleNamespace(get_function=lambda name: RawKernel(self, cubin, name))


class Event:
    """A moment on the current stream, whose work is done at once here."""

    def __init__(self, cupy: FakeCupy) -> None:
        self._cupy, self._time, self._waited = cupy, None, False

    def record(self) -> None:
        self._time = perf_counter()
        self._cupy.events.append(self)

    def synchronize(self) -> None:
        assert self._time is not None, "an event that nobody recorded"
        self._waited = True
        self._cupy.synchronisations += 1

    def reached(self) -> float:
        """CuPy's get_elapsed_time takes events that the GPU has come to: the later one must have been waited for."""
        assert any(event._waited for event in self._cupy.events[self._cupy.events.index(self) :]), "cudaErrorNotReady"
        return self._time


class Gpu:
    def __init__(self, number: int, capability: str) -> None:
        self.id, self.compute_capability = number, capability

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Gpu) and self.id == other.id

    __hash__ = None


class RawKernel:
    def __init__(self, cupy: FakeCupy, cubin: Cubin, name: str) -> None:
        self.cupy, self.cubin = cupy, cubin
        (self.kernel,) = (kernel for kernel in parse_kernels(cubin.source) if kernel.name == name)

    def __call__(self, grid: Any, block: Any, args: Any, *, shared_mem: Any = 0) -> None:
        for what, sizes, limits in (("grid", grid, MAX_GRID), ("block", block, MAX_BLOCK)):
            assert type(sizes) is tuple, f"CuPy takes the {what} as a tuple"
            assert len(sizes) == 3, f"{what} is {sizes}"
            for n, limit in zip(sizes, limits, strict=True):
                assert type(n) is int, f"{what} is {sizes!r}"
                assert 1 <= n <= limit, f"{what} is {sizes}, the limit {limits}"
        assert prod(block) <= MAX_THREADS, f"the block has {prod(block)} threads"
        assert type(shared_mem) is int, f"shared memory is {shared_mem!r}"
        assert 0 <= shared_mem <= MAX_SHARED, f"shared memory is {shared_mem}"
        assert type(args) is tuple, "CuPy takes the arguments as a tuple"
        assert len(args) == len(self.kernel.parameters), f"got {len(args)} arguments"
        values = [self._check(p, a) for p, a in zip(self.kernel.parameters, args, strict=True)]
        self.cupy.launches.append(Launch(self.kernel.name, self.cubin, grid, block, args, shared_mem))
        if not self.cupy.dry:
            host_kernels.run(self.kernel, self.cubin.types, grid, block, values, shared_mem, HostOptions())

    def _check(self, parameter: Any, argument: Any) -> Any:
        """CuPy passes its arrays by address and NumPy scalars by their bytes; Python's numbers would travel as 64 bits,
        and None, depending on its version, as nothing at all."""
        expected = parameter.dtype(self.cubin.types)
        if not parameter.pointer:
            assert isinstance(argument, np.generic), f"{parameter.name} would travel as 64 bits"
            assert argument.dtype == expected, f"{parameter.name} is {argument.dtype}, expected {expected}"
            return argument
        if isinstance(argument, np.generic):
            assert argument.dtype == np.uint64, f"{parameter.name} is no 64-bit address"
            assert argument == 0, f"{parameter.name} is an address from nowhere"
            return None
        assert isinstance(argument, ndarray), f"{parameter.name} is {argument!r}"
        assert argument.device == self.cupy.cuda.Device(), f"{parameter.name} is on another GPU"
        assert argument.flags.c_contiguous, f"{parameter.name} is no contiguous array"
        assert argument.dtype == expected, f"{parameter.name} is {argument.dtype}, expected {expected}"
        return argument._values
