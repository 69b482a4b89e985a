"""A stand-in for CuPy on a machine without a GPU: it records what the cuda device asks of it, validates it as CuPy and
a driver would, and runs the kernels through the host runtime, so that whole training steps can be checked.

It knows only what segnet_scratch may use of CuPy; anything else raises AttributeError. Work on several streams is
checked for races (fake_streams.py), except where a kernel follows addresses in memory (sgd_step). What it cannot show:
that CuPy and a driver agree. That takes a GPU.
"""

import contextlib
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from segnet_scratch.errors import CompileError
from segnet_scratch.runtime import host as host_kernels
from segnet_scratch.runtime import nvrtc, observe, tensor_map
from segnet_scratch.runtime.host import HostOptions
from segnet_scratch.runtime.launch import ElementTypes
from segnet_scratch.runtime.signature import parse_kernels
from segnet_scratch.runtime.source import Source
from support import fake_streams as streams
from support.fake_nccl import FakeNccl

# A driver's limits, not taken from the launch gate: a mistake there is to show here.
MAX_GRID, MAX_BLOCK, MAX_THREADS, MAX_SHARED = (2**31 - 1, 65535, 65535), (1024, 1024, 64), 1024, 48 * 1024
MAX_SHARED_ASKED_FOR = {"75": 65536, "80": 166912, "86": 101376, "89": 101376, "90": 232448, "120": 101376}
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


class FakeMap:
    """What FakeDriver made, as the host runtime takes a tensor map."""

    def __init__(self, contents: bytes) -> None:
        self.contents = contents

    def host_bytes(self) -> np.ndarray:
        blob = tensor_map.aligned_bytes()
        blob[:] = np.frombuffer(self.contents, np.uint8)
        return blob


class FakeDriver:
    """The functions of libcuda that make tensor maps: they check what the driver checks and make the host device's."""

    def cuTensorMapEncodeTiled(self, to, dtype, rank, address, sizes, strides, box, steps, *rest):
        return self._encode(to, dtype, rank, address, sizes, strides, list(box), steps, rest, None)

    def cuTensorMapEncodeIm2col(
        self, to, dtype, rank, address, sizes, strides, lower, upper, channels, pixels, steps, *rest
    ):
        corners = (list(lower), list(upper))
        return self._encode(to, dtype, rank, address, sizes, strides, [channels, pixels], steps, rest, corners)

    def _encode(self, to, dtype, rank, address, sizes, strides, box, steps, rest, corners):
        interleave, swizzle, promotion, fill = rest
        assert to.value % 64 == 0
        assert address.value % 16 == 0
        assert all(stride % 16 == 0 for stride in strides)
        assert [len(sizes), len(strides), len(steps)] == [rank, rank - 1, rank]
        assert (interleave, swizzle, fill, set(steps)) == (0, 3, 0, {1})
        assert promotion in range(4)
        fields = tensor_map._HostMap.from_address(to.value)
        fields.magic, fields.rank, fields.im2col = int.from_bytes(b"TMAP", "little"), rank, corners is not None
        fields.element = {0: 1, 7: 4, 8: 8, 9: 2}[dtype]
        assert box[0] * fields.element <= 128, "CUDA_ERROR_INVALID_VALUE"
        fields.address = address.value
        fields.strides[: rank - 1], fields.sizes[:rank] = list(strides), list(sizes)
        fields.box[: len(box)] = box
        if corners:
            fields.lower[:], fields.upper[:] = corners
        return 0


class Launch(NamedTuple):
    """What a kernel was launched with; arrays by their address, so that they may be freed."""

    name: str
    cubin: Cubin
    grid: tuple[int, ...]
    block: tuple[int, ...]
    arguments: tuple[Any, ...]
    shared: int


class OutOfMemoryError(MemoryError):
    def __init__(self, size: int, total: int, limit: int = 0) -> None:
        so_far = "" if total == -1 else f" (allocated so far: {total:,} bytes)."
        super().__init__(f"Out of memory allocating {size:,} bytes{so_far}")


class CUDARuntimeError(RuntimeError):
    def __init__(self, status: int) -> None:
        names = {2: "cudaErrorMemoryAllocation: out of memory", 100: "cudaErrorNoDevice: no CUDA-capable device"}
        super().__init__(names[status])
        self.status = status


class ndarray:
    """An array in the memory of a GPU. As with CuPy's, NumPy cannot read it."""

    __array_ufunc__ = None
    __hash__ = None

    def __init__(
        self, cupy: "FakeCupy", values: np.ndarray, gpu: int | None = None, block: streams.Block | None = None
    ) -> None:
        self._cupy, self._values, self._gpu = cupy, values, cupy.gpu if gpu is None else gpu
        self._block = block or streams.Block(cupy.timeline, values)  # somebody else's memory
        cupy.views[id(self)] = self

    def _view(self, values: np.ndarray) -> "ndarray":
        return ndarray(self._cupy, values, self._gpu, self._block)

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
        return self._view(self._values.T)

    def reshape(self, *shape: Any) -> "ndarray":
        return self._view(self._values.reshape(*shape))

    def view(self, dtype: Any) -> "ndarray":
        return self._view(self._values.view(dtype))

    def __getitem__(self, index: Any) -> "ndarray":
        indices = index if isinstance(index, tuple) else (index,)
        assert all(i is Ellipsis or isinstance(i, int | slice) for i in indices), "others make copies"
        return self._view(self._values[index])

    def copy(self) -> "ndarray":
        copy = self._cupy.empty(self.shape, self.dtype)
        copy[...] = self
        return copy

    def set(self, values: np.ndarray, stream: streams.Stream | None = None) -> None:
        assert type(values) is np.ndarray, "cupy.ndarray.set takes NumPy arrays"
        assert values.dtype == self.dtype
        assert values.shape == self.shape
        assert self._values.flags.forc
        self._cupy.copy_in(self, values, stream or self._cupy.timeline.current_stream())

    def get(self, *, out: np.ndarray, blocking: bool) -> None:
        assert type(out) is np.ndarray
        assert (out.dtype, out.shape, out.flags.c_contiguous) == (self.dtype, self.shape, True)
        pinned = streams.pinned_memory_of(out)
        assert blocking == (pinned is None), "only into pinned memory does a copy go on by itself"
        stream, contents = self._cupy.timeline.current_stream(), np.empty_like(out)
        assert stream.capture is None, "the current stream is capturing, so D2H transfers are disallowed"
        self._cupy.work("copy to the host", [self], [False], lambda source: np.copyto(contents, source))
        if blocking:
            stream.synchronize()
            np.copyto(out, contents)
        else:
            self._cupy.timeline.pending.append(streams.Arrival(out, contents, stream.last))

    def __setitem__(self, index: Any, value: Any) -> None:
        assert isinstance(value, int | float | np.generic | ndarray), "CuPy assigns scalars and its own arrays"
        if isinstance(value, ndarray):
            self._cupy.work("assignment", [self, value], [True, False], lambda t, s: t.__setitem__(index, s))
        else:
            self._cupy.work("assignment", [self], [True], lambda t: t.__setitem__(index, value))

    def __dlpack_device__(self) -> tuple[int, int]:
        return DLPACK_GPU, self._gpu

    def __dlpack__(self, *, stream: int | None = None, max_version: Any = None, copy: Any = None) -> Any:
        if stream is None:
            raise BufferError("whoever names no stream, such as NumPy, cannot read the memory of a GPU")
        return self._values.__dlpack__()


class MemoryPool:
    """A pool that somebody makes hands freed memory out again. The common pool always takes new memory: nothing is
    hidden by what an array held before."""

    def __init__(self, cupy: "FakeCupy", allocator: Callable[[int], Any] | None = None) -> None:
        self.cupy, self.allocator, self.common = cupy, allocator or cupy.memory, allocator is None
        self.free: dict[int, list[np.ndarray]] = {}
        self.in_use = 0
        self.held = 0  # bytes of blocks that nobody has, of the common pool as many as a test says

    def malloc(self, nbytes: int) -> streams.Block:
        if self.free.get(nbytes):
            buffer = self.free[nbytes].pop()
        else:
            try:
                buffer = self.allocator(nbytes)
            except CUDARuntimeError as error:
                raise OutOfMemoryError(nbytes, self.in_use) from error
        self.in_use += nbytes
        return streams.Block(self.cupy.timeline, buffer, self)

    def give_back(self, buffer: np.ndarray) -> None:
        self.in_use -= buffer.nbytes
        if not self.common:
            self.free.setdefault(buffer.nbytes, []).append(buffer)

    def free_bytes(self) -> int:
        return self.held

    def set_limit(self, size: int) -> None:
        assert size == 0, "at a limit a pool gives blocks back, whoever has recorded their addresses"

    def free_all_blocks(self) -> None:
        assert self.common, "a graph's memory is not to be given back"


class FakeCupy(types.ModuleType):
    """What stands in `sys.modules["cupy"]`.

    `launches` and `loaded` (a Cubin for each module) are in order; `copies` says of each copy to the GPU on which
    stream it was and whether from pinned memory. `free` bytes are what one array may take, `gpu` is the current one,
    allocation number `fails_at`, from 1, fails; all may be changed. `gpus` may be an exception. A `dry` one runs no
    kernels and does not let NVRTC compile them, and needs no compiler therefore.
    """

    def __init__(
        self,
        capability: str = "90",
        driver: int = 13000,
        gpus: int | Exception = 1,
        free: int = 2**34,
        total: int = 2**34,
        dry: bool = False,
    ) -> None:
        super().__init__("cupy")
        self.__version__ = "a stand-in"
        self.ndarray = ndarray
        self.capability, self.gpus, self.free, self.dry = capability, gpus, free, dry
        self.gpu = 0
        self.cubins: dict[str, Cubin] = {}  # by path
        self.loaded: list[Cubin] = []
        self.launches: list[Launch] = []
        self.copies: list[tuple[int, bool]] = []
        self.allocations, self.fails_at = 0, 0
        self.timeline = streams.Timeline()
        self.common_pool = MemoryPool(self)
        self._thread = threading.local()
        self.views: weakref.WeakValueDictionary[int, ndarray] = weakref.WeakValueDictionary()
        self.cuda = SimpleNamespace(
            Device=lambda gpu=None: Gpu(self.gpu if gpu is None else gpu, capability),
            Stream=self.timeline.new_stream,
            Event=lambda disable_timing=False: streams.Event(self.timeline, disable_timing),
            get_elapsed_time=self.timeline.milliseconds,
            Memory=self.memory,
            MemoryPointer=lambda memory, offset: memory,
            MemoryPool=lambda allocator: MemoryPool(self, allocator),
            get_current_stream=self.timeline.current_stream,
            get_allocator=lambda: getattr(self._thread, "allocator", self.common_pool.malloc),
            using_allocator=self._using_allocator,
            alloc_pinned_memory=self._pinned_memory,
            memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
            nccl=FakeNccl(self),
            runtime=SimpleNamespace(
                CUDARuntimeError=CUDARuntimeError,
                memGetInfo=lambda: (self.free, total),
                driverGetVersion=lambda: driver,
                runtimeGetVersion=lambda: 13020,
                getDeviceProperties=lambda index: {"name": b"a stand-in", "multiProcessorCount": 4},
                getDeviceCount=self._count_gpus,
            ),
        )

    @property
    def synchronisations(self) -> int:
        """How often the host has waited."""
        return self.timeline.synchronisations

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
        monkeypatch.setattr(tensor_map, "_driver", FakeDriver)
        monkeypatch.setitem(sys.modules, "cupy", self)
        monkeypatch.setitem(sys.modules, "cupy.cuda", self.cuda)
        return self

    def _count_gpus(self) -> int:
        if isinstance(self.gpus, Exception):
            raise self.gpus
        return self.gpus

    def get_default_memory_pool(self) -> MemoryPool:
        return self.common_pool

    @contextlib.contextmanager
    def _using_allocator(self, allocator: Callable[[int], streams.Block]) -> Iterator[None]:
        before, self._thread.allocator = self.cuda.get_allocator(), allocator
        try:
            yield
        finally:
            self._thread.allocator = before

    def _count_allocation(self, nbytes: int) -> None:
        self.allocations += 1
        if nbytes > self.free or self.allocations == self.fails_at:
            raise CUDARuntimeError(2)

    def memory(self, nbytes: int) -> np.ndarray:
        """cudaMalloc, which CuPy's relaxed kind of recording allows."""
        self._count_allocation(nbytes)
        return np.full(nbytes, 0xFF, np.uint8)  # a GPU's memory is not zeroed either

    def _pinned_memory(self, nbytes: int) -> streams.PinnedMemory:
        self._count_allocation(nbytes)
        return streams.PinnedMemory(b"\xff" * nbytes)

    def _allocate(self, shape: Any, dtype: Any, order: Any = "C") -> ndarray:
        block = self.cuda.get_allocator()(prod(shape) * np.dtype(dtype).itemsize)
        return ndarray(self, np.ndarray(shape, dtype, block.buffer, order=order), block=block)

    def work(
        self,
        what: str,
        arrays: Sequence[ndarray],
        writes: Sequence[bool],
        carry_out: Callable[..., None],
        stream: streams.Stream | None = None,
    ) -> None:
        """Does something with the contents of arrays on a stream, or records it. `carry_out` gets NumPy arrays."""
        stream = stream or self.timeline.current_stream()
        values = [a._values for a in arrays]
        # A recording knows addresses. Memory of its own pool stays; other memory must still be there.
        blocks = [(weakref.ref(a._block), a._block.pool is None or a._block.pool.common) for a in arrays]

        def run(on: streams.Stream) -> None:
            stamp = on.tick()
            for (reference, from_outside), write, part in zip(blocks, writes, values, strict=True):
                block = reference()
                if block is not None:
                    block.access(on, stamp, write, what, part)
                elif from_outside:
                    raise streams.Race(f"{what} is replayed on memory that has been freed")
            carry_out(*values)

        stream.run(run)

    def copy_in(self, target: ndarray, values: np.ndarray, stream: streams.Stream) -> None:
        """From the host. Only from pinned memory does a copy go on by itself; other memory has been read by now."""
        if stream.capture is not None:
            raise RuntimeError("the current stream is capturing, so H2D transfers are disallowed")
        self.work("copy to the GPU", [target], [True], lambda t: np.copyto(t, values), stream)
        pinned = streams.pinned_memory_of(values)
        self.copies.append((stream.number, pinned is not None))
        if pinned is not None:
            self.timeline.pending.append(streams.PinnedCopy(pinned, values, stream.last))

    def empty(self, shape: Any, dtype: Any) -> ndarray:
        return self._allocate(shape, dtype)

    def zeros(self, shape: Any, dtype: Any) -> ndarray:
        array = self.empty(shape, dtype)
        array[...] = 0
        return array

    def asarray(self, array: Any) -> ndarray:
        """As CuPy's, this keeps the order of an array in Fortran's order, and copies from pinned memory of its own."""
        if isinstance(array, ndarray):
            return array
        assert type(array) is np.ndarray
        assert array.dtype.kind in "biufc" or array.dtype.name == "bfloat16"  # as CuPy 14
        on_gpu = self._allocate(array.shape, array.dtype, "F" if array.flags.fnc else "C")
        self.copy_in(on_gpu, array.copy("K"), self.timeline.current_stream())
        return on_gpu

    def asnumpy(self, array: ndarray) -> np.ndarray:
        assert isinstance(array, ndarray)
        stream = self.timeline.current_stream()
        assert stream.capture is None, "the current stream is capturing, so D2H transfers are disallowed"
        result = np.empty(array.shape, array.dtype)
        self.work("copy to the host", [array], [False], lambda source: np.copyto(result, source))
        stream.synchronize()
        return result

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


class Gpu:
    def __init__(self, number: int, capability: str) -> None:
        self.id, self.compute_capability, self.pci_bus_id = number, capability, f"0000:0{number}:00.0"

    def __enter__(self) -> "Gpu":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Gpu) and self.id == other.id

    __hash__ = None


class RawKernel:
    def __init__(self, cupy: FakeCupy, cubin: Cubin, name: str) -> None:
        self.cupy, self.cubin = cupy, cubin
        (self.kernel,) = (kernel for kernel in parse_kernels(cubin.source) if kernel.name == name)
        self._max_dynamic = MAX_SHARED

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        return self._max_dynamic

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, size: int) -> None:
        assert type(size) is int
        assert 0 <= size <= MAX_SHARED_ASKED_FOR[self.cupy.capability], "CUDA_ERROR_INVALID_VALUE"
        self._max_dynamic = size

    def __call__(self, grid: Any, block: Any, args: Any, *, shared_mem: Any = 0) -> None:
        for what, sizes, limits in (("grid", grid, MAX_GRID), ("block", block, MAX_BLOCK)):
            assert type(sizes) is tuple, f"CuPy takes the {what} as a tuple"
            assert len(sizes) == 3, f"{what} is {sizes}"
            for n, limit in zip(sizes, limits, strict=True):
                assert type(n) is int, f"{what} is {sizes!r}"
                assert 1 <= n <= limit, f"{what} is {sizes}, the limit {limits}"
        assert prod(block) <= MAX_THREADS, f"the block has {prod(block)} threads"
        assert type(shared_mem) is int, f"shared memory is {shared_mem!r}"
        assert 0 <= shared_mem <= self._max_dynamic, f"shared memory is {shared_mem}"
        assert type(args) is tuple, "CuPy takes the arguments as a tuple"
        assert len(args) == len(self.kernel.parameters), f"got {len(args)} arguments"
        values = [self._check(p, a) for p, a in zip(self.kernel.parameters, args, strict=True)]
        places = [index for index, value in enumerate(values) if isinstance(value, ndarray)]
        writes = [not self.kernel.parameters[index].const for index in places]
        noted = tuple(a.data.ptr if isinstance(a, ndarray) else a for a in args)
        launch = Launch(self.kernel.name, self.cubin, grid, block, noted, shared_mem)
        scalars = [None if isinstance(value, ndarray) else value for value in values]

        def carry_out(*arrays: np.ndarray) -> None:
            self.cupy.launches.append(launch)
            if not self.cupy.dry:
                complete = list(scalars)
                for index, array in zip(places, arrays, strict=True):
                    complete[index] = array
                whole = observe.Launch(self.kernel, self.cubin.types, grid, block, shared_mem, complete)
                host_kernels.run(whole, HostOptions())

        self.cupy.work(self.kernel.name, [values[index] for index in places], writes, carry_out)

    def _check(self, parameter: Any, argument: Any) -> Any:
        """CuPy passes its arrays by address and NumPy scalars by their bytes; Python's numbers would travel as 64 bits,
        and None, depending on its version, as nothing at all."""
        expected = parameter.dtype(self.cubin.types)
        if parameter.tensor_map:
            assert (argument.shape, argument.dtype) == ((1,), np.dtype("V128")), f"{parameter.name} is {argument!r}"
            assert argument.tobytes()[:4] == b"TMAP", f"{parameter.name} was not made by the driver"
            return FakeMap(argument.tobytes())
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
        return argument
