"""What the cuda device asks of CuPy, without a GPU: against a stand-in that validates and executes it (fake_cupy.py)."""

import sys

import numpy as np
import pytest
from fake_cupy import FakeCupy

import segnet_scratch.device as device_module
from segnet_scratch.autograd import tensor
from segnet_scratch.device import CudaDevice, HostDevice
from segnet_scratch.errors import DeviceError, DTypeError, SegnetError
from segnet_scratch.kernels import nvrtc
from segnet_scratch.kernels.nvrtc import nvrtc_version
from segnet_scratch.ops import cross_entropy
from segnet_scratch.optim import SGD
from segnet_scratch.segnet import SegNet

try:
    HAVE_NVRTC = bool(nvrtc_version())
except SegnetError:
    HAVE_NVRTC = False


@pytest.fixture
def cupy(monkeypatch, tmp_path):
    """The stand-in in CuPy's place. Without libnvrtc the cubins are empty ELF files: nothing reads them here."""
    fake = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    if not HAVE_NVRTC:

        def pretend(source, types, architecture):
            path = tmp_path / f"{source.path.stem}-{types.storage.name}-{architecture}-0.cubin"
            path.write_bytes(b"\x7fELF")
            return path

        monkeypatch.setattr(nvrtc, "cached_cubin", pretend)
    return fake


def training_losses(device, steps=3):
    rng = np.random.default_rng(3)
    images, labels = rng.standard_normal((2, 40, 33, 3)), rng.integers(0, 5, (2, 40, 33))
    model = SegNet(5, 1 / 16, device, seed=1, dropout=True, dtype=np.float64)
    optimiser = SGD(model)
    losses = []
    for step in range(steps):
        model.zero_grad()
        model.set_random_state(7, step)
        loss = cross_entropy(model(images), labels, class_weights=np.arange(1.0, 6.0))
        loss.backward()
        optimiser.step(1e-3)
        losses.append(loss.item())
    return losses, model.state_dict()


def test_training_steps_are_those_of_the_host_device(cupy):
    losses, state = training_losses(CudaDevice())
    expected, expected_state = training_losses(HostDevice())
    assert losses == expected
    assert all(np.array_equal(state[name], expected_state[name]) for name in expected_state)
    assert {"conv2d_forward_tiled", "batch_norm_backward", "max_unpool_forward", "sgd_step"} <= {
        launch[0] for launch in cupy.launches
    }


def test_each_module_is_loaded_once_and_for_this_gpu(cupy):
    training_losses(CudaDevice(), steps=2)
    assert len(cupy.loaded) == len(set(cupy.loaded))
    assert all("-sm_90-" in path for path in cupy.loaded)


def test_nothing_waits_for_the_gpu_between_forward_and_update(cupy):
    device = CudaDevice()
    model = SegNet(5, 1 / 16, device)
    downloads = []
    device.download = lambda array: downloads.append(array)
    loss = cross_entropy(model(np.zeros((2, 32, 32, 3), np.float32)), np.zeros((2, 32, 32), np.uint8))
    loss.backward()
    SGD(model).step(1e-3)
    assert downloads == []
    assert cupy.synchronisations == 0


def test_out_of_memory_says_how_much_and_what_to_try(cupy):
    device = CudaDevice()
    cupy.free = 1000
    with pytest.raises(DeviceError, match=r"1,600 bytes.*free.*smaller batch"):
        device.empty((400,), np.float32)


@pytest.mark.parametrize(
    ("fake", "message"),
    [
        (FakeCupy(capability="70"), "compute capability 7.0; 7.5"),
        (FakeCupy(available=False), "sees no NVIDIA GPU or driver"),
    ],
)
def test_gpus_that_cannot_be_used(monkeypatch, fake, message):
    monkeypatch.setitem(sys.modules, "cupy", fake)
    fake.cuda.Device.compute_capability = "70"
    with pytest.raises(DeviceError, match=message):
        CudaDevice()


def test_a_driver_error_is_a_device_error(monkeypatch):
    fake = FakeCupy()

    def broken():
        raise RuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient")

    fake.cuda.is_available = broken
    monkeypatch.setitem(sys.modules, "cupy", fake)
    with pytest.raises(DeviceError, match="driver version is insufficient"):
        CudaDevice()


def test_auto_takes_the_gpu(cupy):
    device_module._shared_device.cache_clear()
    try:
        assert device_module.get_device("auto").name == "cuda"
    finally:
        device_module._shared_device.cache_clear()


def test_arrays_of_the_cpu_do_not_reach_a_kernel(cupy):
    device = CudaDevice()
    model = SegNet(5, 1 / 16, device)
    with pytest.raises(DTypeError):
        model(np.zeros((1, 32, 32, 3)))
    cpu_tensor = tensor(np.zeros((1, 32, 32, 3), np.float32), "numpy")
    with pytest.raises(DeviceError, match="input 1 is on cuda, expected numpy; create both on one device"):
        model(cpu_tensor)
    assert cupy.launches == []


def test_dlpack_in_and_out(cupy):
    device = CudaDevice()
    values = np.arange(12, dtype=np.float32).reshape(3, 4)

    class Foreign:
        """An array of another library: all it has is DLPack."""

        __dlpack__, __dlpack_device__ = values.__dlpack__, values.__dlpack_device__

    taken = tensor(Foreign(), device)
    assert isinstance(taken.data, cupy.ndarray)
    assert np.array_equal(taken.numpy(), values)
    assert np.array_equal(np.from_dlpack(tensor(Foreign(), "numpy")), values)
