"""The three devices behind one interface, and the compiler of the cuda device, as far as they go without a GPU."""

import ast
import ctypes
import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from kernel_support import FLOAT32, FLOAT64, INCLUDE, ROOT, needs_compiler, parse, valid_call, written_kernel

from segnet_scratch import device as device_module
from segnet_scratch.device import CudaDevice, Device, HostDevice, NumpyDevice, cuda_missing, get_device
from segnet_scratch.errors import CompileError, DeviceError
from segnet_scratch.kernels import find_kernel, launch, nvrtc
from segnet_scratch.kernels.host import HostOptions


class FakeCupy:
    """As much of CuPy as the cuda device uses, on NumPy arrays."""

    class ndarray:
        def __init__(self, cupy: "FakeCupy", values: np.ndarray) -> None:
            if cupy.full:
                raise cupy.OutOfMemoryError("Out of memory allocating 9 bytes")
            self.cupy, self.values, self.dtype, self.shape = cupy, values, values.dtype, values.shape
            self.data, self.device = SimpleNamespace(ptr=values.ctypes.data), "gpu 0"

        def set(self, values: np.ndarray) -> None:
            assert values.dtype == self.dtype
            self.values[...] = values

        def copy(self) -> "FakeCupy.ndarray":
            return FakeCupy.ndarray(self.cupy, self.values.copy())

        def __setitem__(self, index: Any, value: Any) -> None:
            self.values[index] = value.values if isinstance(value, FakeCupy.ndarray) else value

    class OutOfMemoryError(Exception):
        pass

    def __init__(self, available: Any = True, capability: str = "90") -> None:
        def is_available() -> bool:
            if isinstance(available, Exception):
                raise available
            return available

        class Gpu:
            compute_capability = capability

            def __eq__(self, other: object) -> bool:
                return other == "gpu 0"

            __hash__ = None  # type: ignore[assignment]

        self.full = False
        self.modules: list[str] = []
        self.launches: list[tuple[Any, ...]] = []
        self.cuda = SimpleNamespace(
            is_available=is_available,
            Device=Gpu,
            memory=SimpleNamespace(OutOfMemoryError=self.OutOfMemoryError),
            runtime=SimpleNamespace(memGetInfo=lambda: (3 << 20, 5 << 20)),
        )

    def empty(self, shape: Any, dtype: Any) -> "FakeCupy.ndarray":
        return self.ndarray(self, np.empty(shape, dtype))

    def zeros(self, shape: Any, dtype: Any) -> "FakeCupy.ndarray":
        return self.ndarray(self, np.zeros(shape, dtype))

    def asarray(self, array: np.ndarray) -> "FakeCupy.ndarray":
        return self.ndarray(self, array.copy())

    def asnumpy(self, array: "FakeCupy.ndarray") -> np.ndarray:
        return array.values.copy()

    def RawModule(self, path: str) -> Any:
        self.modules.append(path)

        def get_function(name: str) -> Any:
            return lambda *launched, shared_mem: self.launches.append((path, name, *launched, shared_mem))

        return SimpleNamespace(get_function=get_function)


@pytest.fixture
def devices(monkeypatch):
    """get_device without memory of other tests; a call with a module or an exception puts it in CuPy's place."""
    monkeypatch.setattr(device_module, "_shared_device", functools.cache(device_module._shared_device.__wrapped__))

    def put(cupy: Any) -> Any:
        def fake_import() -> Any:
            if isinstance(cupy, Exception):
                raise cupy
            return cupy

        monkeypatch.setattr(device_module, "_import_cupy", fake_import)
        return cupy

    return put


class TestDevices:
    def test_names(self, devices):
        devices(ImportError("No module named 'cupy'"))
        assert isinstance(get_device("numpy"), NumpyDevice)
        assert get_device("numpy") is get_device("numpy")
        device = NumpyDevice()
        assert get_device(device) is device
        assert repr(device) == "<device numpy>"
        for name in ("gpu", "", "CUDA", "cuda:0", None, 0):
            with pytest.raises(DeviceError, match=r"there is no device .*expected one of auto, cuda, host, numpy"):
                get_device(name)

    @needs_compiler
    def test_host(self):
        device = get_device("host")
        assert isinstance(device, HostDevice)
        assert (device.name, device.runs_kernels, device.options) == ("host", True, HostOptions())

    @pytest.mark.parametrize(
        ("cupy", "expected"),
        [
            (
                ImportError("No module named 'cupy'"),
                ["No module named 'cupy'", "pip install 'segnet_scratch[cuda13]'", "[cuda12]"],
            ),
            (FakeCupy(available=False), ["sees no NVIDIA GPU or driver", "nvidia-smi", "CUDA_VISIBLE_DEVICES"]),
            (
                FakeCupy(available=RuntimeError("cudaErrorInsufficientDriver")),
                ["cudaErrorInsufficientDriver", "nvidia-smi"],
            ),
        ],
        ids=["no CuPy", "no GPU", "no driver"],
    )
    def test_no_gpu(self, devices, cupy, expected):
        devices(cupy)
        with pytest.raises(DeviceError) as caught:
            get_device("cuda")
        for needed in (*expected, "--device numpy"):
            assert needed in str(caught.value)
        assert cuda_missing() == str(caught.value)
        assert get_device("auto") is get_device("numpy")
        assert get_device() is get_device("numpy")

    def test_a_gpu(self, devices):
        devices(FakeCupy(capability="120"))
        device = get_device("auto")
        assert isinstance(device, CudaDevice)
        assert device is get_device("cuda")
        assert device.architecture == "sm_120"
        assert cuda_missing() is None

    def test_a_gpu_that_is_too_old(self, devices):
        devices(FakeCupy(capability="70"))
        with pytest.raises(DeviceError, match=r"compute capability 7\.0; 7\.5 .* is needed"):
            get_device("cuda")

    def test_numpy_runs_no_kernels(self):
        with pytest.raises(DeviceError, match="the numpy device runs no kernels; use host or cuda"):
            valid_call(find_kernel("relu_forward")).launch(NumpyDevice())

    def test_cupy_is_imported_in_one_place(self):
        importing = []
        for path in (ROOT / "segnet_scratch").rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                if any(name.split(".")[0] in ("cupy", "cupy_backends") for name in names):
                    importing.append(path.relative_to(ROOT).as_posix())
        assert importing == ["segnet_scratch/device.py"]


def memory_devices() -> list[Any]:
    devices = [pytest.param(NumpyDevice, id="numpy"), pytest.param(HostDevice, id="host", marks=needs_compiler)]
    return [*devices, pytest.param(CudaDevice, id="cuda")]


@pytest.mark.parametrize("kind", memory_devices())
class TestMemory:
    """The same promises on every device; cuda stands on a CuPy of NumPy arrays, on a GPU it is the same code."""

    @pytest.fixture
    def device(self, kind, devices) -> Device:
        devices(FakeCupy())
        return kind()

    def test_empty_and_zeros(self, device):
        for shape in ((), (3,), [2, 3], (2, 0)):
            for dtype in (np.float32, "float64", np.uint8):
                array = device.zeros(shape, dtype)
                assert (array.shape, array.dtype) == (tuple(shape), np.dtype(dtype))
                assert (device.download(array) == 0).all()
                assert device.empty(shape, dtype).shape == tuple(shape)

    @pytest.mark.parametrize(
        "source", [np.arange(6.0).reshape(2, 3).T, np.arange(6)[::2], np.float32(3), np.zeros((2, 0))]
    )
    def test_upload_and_download(self, device, source):
        array = device.upload(source)
        back = device.download(array)
        assert device.owns(array)
        assert isinstance(back, np.ndarray)
        assert (back.shape, back.dtype) == (np.shape(source), np.asarray(source).dtype)
        np.testing.assert_array_equal(back, source)
        assert back.flags.c_contiguous

    def test_copy_is_another_array(self, device):
        array = device.upload(np.arange(4.0))
        copy = device.copy(array)
        assert device.address(copy) != device.address(array)
        device.write(array, 0)
        np.testing.assert_array_equal(device.download(copy), np.arange(4.0))

    def test_write_in_place(self, device):
        array = device.zeros((2, 3), np.float32)
        address = device.address(array)
        for values in (7, np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(6).reshape(3, 2).T):
            device.write(array, values)
            np.testing.assert_array_equal(device.download(array), np.broadcast_to(values, (2, 3)))
        device.write(array, device.upload(np.ones((2, 3), np.float32)))
        np.testing.assert_array_equal(device.download(array), 1)
        assert device.address(array) == address
        assert array.dtype == np.float32

    def test_owns(self, device):
        for foreign in ([1.0], None, 3, "x", memoryview(b"x")):
            assert not device.owns(foreign)

    def test_synchronise_is_there(self, device):
        if device.name != "cuda":  # the fake CuPy has no streams
            device.synchronise()


class TestCudaDevice:
    """What the cuda device tells CuPy; that a GPU then does the right thing needs a GPU."""

    @pytest.fixture
    def cupy(self, devices, monkeypatch) -> FakeCupy:
        monkeypatch.setattr(nvrtc, "cached_cubin", lambda source, types, arch: f"{source.path}:{types.storage}:{arch}")
        return devices(FakeCupy())

    def test_arguments_are_passed_with_their_exact_types(self, cupy):
        device, kernel = CudaDevice(), written_kernel("scalars")
        out = device.zeros((8,), np.float64)
        out.flags, out.size, out.itemsize, out.nbytes = SimpleNamespace(c_contiguous=True), 8, 8, 64
        launch(device, kernel, (2, 3), 32, (out, None, 1, 2, 3, 4, 5, 6, 0.1, 0.2), FLOAT32, shared=16)
        ((path, name, grid, block, arguments, shared),) = cupy.launches
        assert (path, name) == (f"{kernel.source.path}:float32:sm_90", "scalars")
        assert (grid, block, shared) == ((2, 3, 1), (32, 1, 1), 16)
        assert arguments[0] is out
        kinds = ["uint64", "int8", "uint8", "int16", "int32", "uint32", "int64", "float32", "float64"]
        assert [a.dtype.name for a in arguments[1:]] == kinds
        assert arguments[1] == 0

    def test_kernels_of_one_name_in_two_files_are_told_apart(self, cupy, tmp_path):
        device, text = CudaDevice(), 'extern "C" __global__ void relu_forward(int n) {}'
        for folder in ("a", "b"):
            (tmp_path / folder).mkdir()
            (kernel,) = parse(tmp_path / folder, text)
            for types in (FLOAT32, FLOAT64, FLOAT32):
                launch(device, kernel, 1, 1, (1,), types)
        assert [launched[0] for launched in cupy.launches] == [
            f"{tmp_path / folder / 'written.cu'}:{types}:sm_90"
            for folder in "ab"
            for types in ("float32", "float64", "float32")
        ]
        assert len(cupy.modules) == 4, "a module is loaded once"

    def test_arrays_of_another_gpu_are_foreign(self, cupy):
        device = CudaDevice()
        array = device.zeros((4,), np.float32)
        assert device.owns(array)
        array.device = "gpu 1"
        assert not device.owns(array)
        assert not device.owns(np.zeros(4, np.float32))

    def test_out_of_memory(self, cupy):
        device = CudaDevice()
        array = device.zeros((4,), np.float32)
        cupy.full = True
        for allocate in (
            lambda: device.empty((4,), np.float32),
            lambda: device.zeros((4,), np.float32),
            lambda: device.upload(np.zeros(4)),
            lambda: device.copy(array),
        ):
            with pytest.raises(DeviceError, match=r"out of memory: .* 9 bytes; 3 of 5 MiB are free; .*smaller batch"):
                allocate()


class TestNvrtcWithoutTheLibrary:
    def test_it_is_missed_with_a_hint(self, monkeypatch):
        monkeypatch.setattr(nvrtc, "_library", functools.cache(nvrtc._library.__wrapped__))
        monkeypatch.setattr(nvrtc, "_candidates", list)
        monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
        with pytest.raises(
            CompileError, match=r"libnvrtc.* was not found; pip install 'segnet_scratch\[cuda13\]'.*CUDA_PATH"
        ):
            nvrtc.nvrtc_version()

    def test_a_toolkit_named_by_the_environment(self, tmp_path, monkeypatch):
        (tmp_path / "lib64").mkdir()
        for name in ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc-builtins.so.13"):
            (tmp_path / "lib64" / name).touch()
        monkeypatch.setenv("CUDA_PATH", str(tmp_path))
        found = [path for path in nvrtc._candidates() if path.is_relative_to(tmp_path)]
        assert [path.name for path in found] == ["libnvrtc.so.13", "libnvrtc.so.12"]

    def test_cubins_are_cached_by_everything_they_depend_on(self, tmp_path, monkeypatch):
        monkeypatch.setenv("SEGNET_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(nvrtc, "nvrtc_version", lambda: (13, 0))
        compiled: list[Any] = []

        def compile_cubin(*what: Any) -> bytes:
            compiled.append(what)
            return b"cubin %d" % len(compiled)

        monkeypatch.setattr(nvrtc, "compile_cubin", compile_cubin)
        text = 'extern "C" __global__ void f(int n) {}'
        source = parse(tmp_path, text)[0].source
        path = nvrtc.cached_cubin(source, FLOAT32, "sm_90")
        assert path == nvrtc.cached_cubin(source, FLOAT32, "sm_90")
        assert (path.read_bytes(), len(compiled)) == (b"cubin 1", 1)
        paths = {path, nvrtc.cached_cubin(source, FLOAT64, "sm_90"), nvrtc.cached_cubin(source, FLOAT32, "sm_80")}
        options = nvrtc.compiler_options
        monkeypatch.setattr(nvrtc, "compiler_options", lambda *what: [*options(*what), "-G"])
        paths.add(nvrtc.cached_cubin(source, FLOAT32, "sm_90"))
        monkeypatch.setattr(nvrtc, "nvrtc_version", lambda: (13, 1))
        paths.add(nvrtc.cached_cubin(source, FLOAT32, "sm_90"))
        changed = parse(tmp_path, text + "\n")[0].source
        paths.add(nvrtc.cached_cubin(changed, FLOAT32, "sm_90"))
        assert len(paths) == len(compiled) == 6
        with pytest.raises(CompileError, match=r"written\.cu or a header of it has changed since it was read"):
            nvrtc.cached_cubin(source, FLOAT32, "sm_100")
        assert len(list((tmp_path / "cache").rglob("*.cubin"))) == 6


@pytest.fixture(scope="class")
def libnvrtc() -> tuple[int, int]:
    try:
        return nvrtc.nvrtc_version()
    except CompileError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("libnvrtc")
class TestNvrtc:
    def test_a_kernel_compiles_without_a_gpu(self):
        log: list[str] = []
        cubin = nvrtc.compile_cubin(find_kernel("relu_forward").source, FLOAT32, "sm_90", log)
        assert cubin[:4] == b"\x7fELF"
        for name in (b"relu_forward", b"relu_backward", b"relu.cu"):
            assert name in cubin
        assert "registers" in log[0]

    def test_an_error_names_its_line(self, tmp_path):
        (kernel,) = parse(
            tmp_path, INCLUDE + 'extern "C" __global__ void f(float* x) {\n    x[0] = undeclared;\n}\n', "broken.cu"
        )
        with pytest.raises(CompileError, match=r"broken\.cu\(3\).*undeclared"):
            nvrtc.compile_cubin(kernel.source, FLOAT32, "sm_90")

    def test_an_architecture_that_does_not_exist(self):
        with pytest.raises(CompileError, match=r"relu\.cu does not compile for sm_1"):
            nvrtc.compile_cubin(find_kernel("relu_forward").source, FLOAT32, "sm_1")
