"""A stand-in for CuPy on a machine without a GPU: records what the cuda device asks of it, validates it as the driver
would, and runs the kernels through the host device, so that whole training steps can be checked.

It knows only what segnet_scratch/device.py may use; anything else raises AttributeError. What it cannot show: that CuPy
and a driver agree. That takes a GPU.
"""

import types
from pathlib import Path

import numpy as np

from segnet_scratch.kernels import ElementTypes, find_kernel
from segnet_scratch.kernels import host as host_kernels
from segnet_scratch.kernels.host import HostOptions

MAX_GRID = (2**31 - 1, 65535, 65535)


class _Pointer:
    def __init__(self, ptr):
        self.ptr = ptr


class ndarray(np.ndarray):  # noqa: N801  (CuPy's name)
    """A NumPy array that only answers what a CuPy array would."""

    @property
    def device(self):
        return Device()

    @property
    def data(self):
        return _Pointer(self.__array_interface__["data"][0])

    def set(self, values):
        assert type(values) is np.ndarray, "cupy.ndarray.set takes NumPy arrays"
        assert values.dtype == self.dtype
        assert values.shape == self.shape
        np.copyto(self.view(np.ndarray), values)


class Device:
    compute_capability = "90"

    def __eq__(self, other):
        return isinstance(other, Device)

    __hash__ = None


class OutOfMemoryError(MemoryError):
    pass


class FakeCupy(types.ModuleType):
    """`sys.modules["cupy"]`. `launches` are (kernel, grid, block, arguments, shared) in order."""

    def __init__(self, capability="90", available=True, memory=2**34):
        super().__init__("cupy")
        self.ndarray = ndarray
        self.launches = []
        self.loaded = []
        self.free = memory
        self.synchronisations = 0
        Device.compute_capability = capability
        stream = types.SimpleNamespace(synchronize=self._synchronise)
        self.cuda = types.SimpleNamespace(
            Device=Device,
            is_available=lambda: available,
            get_current_stream=lambda: stream,
            memory=types.SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
            runtime=types.SimpleNamespace(memGetInfo=lambda: (self.free, 2**34)),
        )

    def _synchronise(self):
        self.synchronisations += 1

    def empty(self, shape, dtype):
        array = np.empty(shape, dtype)
        if array.nbytes > self.free:
            raise OutOfMemoryError(f"Out of memory allocating {array.nbytes:,} bytes")
        array.view(np.uint8 if array.ndim else array.dtype)[...] = 0xFF  # a GPU's memory is not zeroed either
        return array.view(ndarray)

    def zeros(self, shape, dtype):
        array = self.empty(shape, dtype)
        array.view(np.ndarray)[...] = 0
        return array

    def asarray(self, array):
        return array if isinstance(array, ndarray) else np.array(array, order="C").view(ndarray)

    def asnumpy(self, array):
        assert isinstance(array, ndarray)
        return np.array(array.view(np.ndarray))

    def ascontiguousarray(self, array):
        assert isinstance(array, ndarray)
        return array

    def from_dlpack(self, array):
        return np.array(np.from_dlpack(array)).view(ndarray)

    def RawModule(self, *, path):  # noqa: N802
        assert Path(path).read_bytes()[:4] == b"\x7fELF", "a cubin is an ELF file"
        self.loaded.append(path)
        return types.SimpleNamespace(get_function=lambda name: RawKernel(self, name, Path(path).name))


class RawKernel:
    def __init__(self, cupy, name, cubin):
        self.cupy, self.kernel = cupy, find_kernel(name)
        self.types = ElementTypes.of(np.float64 if "-float64-" in cubin else np.float32)

    def __call__(self, grid, block, args, *, shared_mem=0):
        assert len(grid) == len(block) == 3
        assert all(type(n) is int and 1 <= n <= limit for n, limit in zip(grid, MAX_GRID, strict=True))
        assert all(type(n) is int and n >= 1 for n in block)
        assert block[0] * block[1] * block[2] <= 1024
        assert block[2] <= 64
        assert 0 <= shared_mem <= 48 * 1024
        assert len(args) == len(self.kernel.parameters)
        values = [self._check(p, a) for p, a in zip(self.kernel.parameters, args, strict=True)]
        self.cupy.launches.append((self.kernel.name, grid, block, args, shared_mem))
        host_kernels.run(self.kernel, self.types, grid, block, values, shared_mem, HostOptions())

    def _check(self, parameter, argument):
        """CuPy passes arrays by address and NumPy scalars by their bytes; Python numbers would travel as 64 bits."""
        if not parameter.pointer:
            assert isinstance(argument, np.generic), f"{parameter.name} would travel as 64 bits"
            assert argument.dtype == parameter.dtype(self.types)
            return argument
        if isinstance(argument, np.generic):
            assert argument.dtype == np.uint64
            assert argument == 0
            return None
        assert isinstance(argument, ndarray)
        assert argument.flags.c_contiguous
        assert argument.dtype == parameter.dtype(self.types)
        return argument.view(np.ndarray)
