"""The three devices behind one interface, and how one is chosen. The rest of the cuda device: test_cuda_device.py."""

import functools
from typing import Any

import numpy as np
import pytest
from support.fake_cupy import CUDARuntimeError, FakeCupy
from support.kernels import FLOAT32, needs_compiler, valid_call

from segnet_scratch.errors import DeviceError
from segnet_scratch.runtime import devices as device_module
from segnet_scratch.runtime.devices import (
    CudaDevice,
    Device,
    HostDevice,
    NumpyDevice,
    cuda_missing,
    cupy_library,
    get_device,
)
from segnet_scratch.runtime.host import HostOptions
from segnet_scratch.runtime.launch import find_kernel, launch


@pytest.fixture
def devices(monkeypatch, tmp_path):
    """get_device without memory of other tests; a call with a module or an exception puts it in CuPy's place."""
    monkeypatch.setattr(device_module, "_shared_device", functools.cache(device_module._shared_device.__wrapped__))

    def put(cupy: Any) -> None:
        def fail() -> Any:
            raise cupy

        if isinstance(cupy, Exception):
            monkeypatch.setattr(cupy_library, "import_cupy", fail)
        else:
            cupy.install(monkeypatch, tmp_path)

    return put


class TestGetDevice:
    def test_names(self, devices):
        devices(ImportError("No module named 'cupy'"))
        assert isinstance(get_device("numpy"), NumpyDevice)
        assert get_device("numpy") is get_device("numpy")
        device = NumpyDevice()
        assert get_device(device) is device
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
            (AttributeError("no attribute 'product'"), ["no attribute 'product'", "does not import", "[cuda13]"]),
            (FakeCupy(gpus=0), ["CUDA 13.0) sees no GPU", "nvidia-smi", "CUDA_VISIBLE_DEVICES"]),
            (FakeCupy(gpus=CUDARuntimeError(100)), ["CUDA 13.0) sees no GPU", "nvidia-smi", "CUDA_VISIBLE_DEVICES"]),
            (FakeCupy(driver=0), ["there is no NVIDIA driver", "install it", "--gpus all"]),
            (
                FakeCupy(driver=12040),
                [
                    "driver is too old: it runs CUDA 12.4 at most",
                    "the installed CuPy is made for CUDA 13.2",
                    "update the driver (580 or newer for CUDA 13",
                    "pip uninstall cupy-cuda13x",
                    "[cuda12]",
                ],
            ),
            (FakeCupy(driver=11080), ["driver is too old: it runs CUDA 11.8 at most", "525 or newer for CUDA 12"]),
            (FakeCupy(gpus=RuntimeError("cudaErrorSystemNotReady")), ["cudaErrorSystemNotReady", "nvidia-smi"]),
        ],
        ids=["no CuPy", "broken", "0 GPUs", "no GPU", "no driver", "old driver", "older driver", "not ready"],
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

    @pytest.mark.parametrize("driver", [13000, 13020, 14000])
    def test_a_driver_runs_what_is_not_of_a_newer_major_version(self, devices, driver):
        devices(FakeCupy(driver=driver))
        assert cuda_missing() is None

    @pytest.mark.parametrize("capability", ["75", "89", "90", "120"])
    def test_a_gpu(self, devices, capability):
        devices(FakeCupy(capability=capability))
        device = get_device("auto")
        assert isinstance(device, CudaDevice)
        assert device is get_device("cuda")
        assert device.architecture == f"sm_{capability}"
        assert cuda_missing() is None

    @pytest.mark.parametrize("capability", ["70", "72", "61"])
    def test_a_gpu_that_is_too_old(self, devices, capability):
        devices(FakeCupy(capability=capability))
        with pytest.raises(
            DeviceError,
            match=rf"compute capability {capability[0]}\.{capability[1]}; 7\.5 .* is needed.*--device numpy",
        ):
            get_device("cuda")


NUMPY = pytest.param(NumpyDevice, id="numpy")
HOST = pytest.param(HostDevice, id="host", marks=needs_compiler)
CUDA = pytest.param(CudaDevice, id="cuda")
CUDA_KERNELS = pytest.param(CudaDevice, id="cuda", marks=needs_compiler)


@pytest.mark.parametrize("kind", [NUMPY, HOST, CUDA])
class TestMemory:
    """The same promises on every device; cuda stands on a stand-in for CuPy, on a GPU it is the same code."""

    @pytest.fixture
    def cupy(self) -> FakeCupy:
        return FakeCupy()

    @pytest.fixture
    def device(self, kind, devices, cupy) -> Device:
        devices(cupy)
        return kind()

    def test_name(self, device):
        assert get_device(device) is device
        assert type(get_device(device.name)) is type(device)
        assert repr(device) == f"<device {device.name}>"

    def test_empty_and_zeros(self, device):
        for shape in ((), (3,), [2, 3], (2, 0)):
            for dtype in (np.float32, "float64", np.uint8):
                array = device.zeros(shape, dtype)
                assert (array.shape, array.dtype) == (tuple(shape), np.dtype(dtype))
                assert (device.download(array) == 0).all()
                assert device.owns(array)
                array = device.empty(shape, dtype)
                assert (array.shape, array.dtype) == (tuple(shape), np.dtype(dtype))
                assert device.owns(array)

    @pytest.mark.parametrize(
        "source", [np.arange(6.0).reshape(2, 3).T, np.arange(6)[::2], np.float32(3), np.zeros((2, 0))]
    )
    def test_upload_and_download(self, device, source):
        array = device.upload(source)
        back = device.download(array)
        assert device.owns(array)
        assert array.flags.c_contiguous
        assert isinstance(back, np.ndarray)
        assert (back.shape, back.dtype) == (np.shape(source), np.asarray(source).dtype)
        np.testing.assert_array_equal(back, source)
        assert back.flags.c_contiguous

    def test_copy_is_another_array(self, device):
        array = device.upload(np.arange(4.0))
        copy = device.copy(array)
        assert device.owns(copy)
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

    def test_arrays_of_a_library_on_the_device_are_shared(self, device):
        array = device.upload(np.arange(6.0).reshape(2, 3))
        taken = device.from_dlpack(array)
        assert device.owns(taken)
        assert device.address(taken) == device.address(array)
        turned = device.from_dlpack(array.T)
        assert device.owns(turned)
        assert turned.flags.c_contiguous
        np.testing.assert_array_equal(device.download(turned), np.arange(6.0).reshape(2, 3).T)

    @pytest.mark.parametrize("memory", [1, 3], ids=["pageable", "pinned"])
    def test_arrays_of_a_library_on_the_cpu(self, device, memory):
        values = np.arange(6.0).reshape(2, 3)

        class Foreign:
            """An array of another library: all it has is DLPack."""

            def __dlpack_device__(self) -> tuple[int, int]:
                return memory, 0

            def __dlpack__(self, **_: Any) -> Any:
                return values.T.__dlpack__()

        taken = device.from_dlpack(Foreign())
        assert device.owns(taken)
        assert taken.flags.c_contiguous
        np.testing.assert_array_equal(device.download(taken), values.T)

    def test_owns(self, device, cupy):
        for foreign in ([1.0], None, 3, "x", memoryview(b"x")):
            assert not device.owns(foreign)
        assert device.owns(np.zeros(4)) == (device.name != "cuda")
        assert device.owns(cupy.zeros((4,), np.float32)) == (device.name == "cuda")

    def test_synchronise(self, device, cupy):
        device.synchronise()
        assert cupy.synchronisations == (device.name == "cuda")


class TestKernels:
    @pytest.mark.parametrize("kind", [HOST, CUDA_KERNELS])
    def test_they_run(self, kind, devices):
        devices(FakeCupy())
        device = kind()
        assert device.runs_kernels
        x, y = device.upload(np.array([-1, 2, 3], np.float32)), device.empty((3,), np.float32)
        launch(device, "relu_forward", 1, 32, (x, y, 3), FLOAT32)
        np.testing.assert_array_equal(device.download(y), [0, 2, 3])

    def test_numpy_runs_none(self):
        assert not NumpyDevice().runs_kernels
        with pytest.raises(DeviceError, match="the numpy device runs no kernels; use host or cuda"):
            valid_call(find_kernel("relu_forward")).launch(NumpyDevice())
