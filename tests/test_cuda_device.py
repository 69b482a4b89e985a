"""The cuda device and its compiler as far as they go without a GPU: against a stand-in for CuPy that validates what it
is asked for and executes it (fake_cupy.py). That a GPU then does the right thing needs a GPU."""

import ast
import ctypes
import functools
from typing import Any

import numpy as np
import pytest
from support import ROOT
from support.fake_cupy import Cubin, FakeCupy, RawKernel, ndarray
from support.fake_streams import Event, Graph, Stream
from support.kernels import FLOAT32, FLOAT64, INCLUDE, needs_compiler, parse, written_kernel

from segnet_scratch.errors import CompileError, DeviceError, DeviceMemoryError, DTypeError
from segnet_scratch.nn.autograd import tensor
from segnet_scratch.nn.functions import cross_entropy
from segnet_scratch.optim import SGD
from segnet_scratch.runtime import nvrtc
from segnet_scratch.runtime.devices import CudaDevice, HostDevice
from segnet_scratch.runtime.launch import find_kernel, launch
from segnet_scratch.segnet import SegNet


def test_cupy_is_imported_in_one_place():
    importing = []
    for path in (ROOT / "segnet_scratch").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] in ("cupy", "cupy_backends") for name in names):
                importing.append(path.relative_to(ROOT).as_posix())
    assert set(importing) == {"segnet_scratch/runtime/devices/cupy_library.py"}


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


@needs_compiler
class TestTraining:
    def test_steps_are_those_of_the_host_device(self, cupy):
        losses, state = training_losses(CudaDevice())
        expected, expected_state = training_losses(HostDevice())
        assert losses == expected
        assert state.keys() == expected_state.keys()
        assert all(np.array_equal(state[name], expected_state[name]) for name in expected_state)
        assert {"conv2d_forward_tiled", "batch_norm_backward", "max_unpool_forward", "sgd_step"} <= {
            launched.name for launched in cupy.launches
        }
        assert len(cupy.loaded) == len(set(cupy.loaded)), "a module is loaded once"
        assert {cubin.architecture for cubin in cupy.loaded} == {"sm_90"}

    def test_nothing_waits_for_the_gpu_between_forward_and_update(self, cupy):
        device = CudaDevice()
        model = SegNet(5, 1 / 16, device)
        downloads = []
        device.download = lambda array: downloads.append(array)
        loss = cross_entropy(model(np.zeros((2, 32, 32, 3), np.float32)), np.zeros((2, 32, 32), np.uint8))
        loss.backward()
        SGD(model).step(1e-3)
        assert downloads == []
        assert cupy.synchronisations == 0
        assert cupy.launches


class TestLaunches:
    """What the cuda device tells CuPy."""

    SCALARS = (1, 2, 3, 4, 5, 6, 0.1, 0.2)

    def test_arguments_are_passed_with_their_exact_types(self, dry_cupy):
        device, kernel = CudaDevice(), written_kernel("scalars")
        out = device.zeros((8,), np.float64)
        launch(device, kernel, (2, 3), 32, (out, None, *self.SCALARS), FLOAT32, shared=16)
        (launched,) = dry_cupy.launches
        assert (launched.name, launched.cubin) == ("scalars", Cubin(kernel.source, FLOAT32, "sm_90"))
        assert (launched.grid, launched.block, launched.shared) == ((2, 3, 1), (32, 1, 1), 16)
        assert launched.arguments[0] == device.address(out)
        kinds = ["uint64", "int8", "uint8", "int16", "int32", "uint32", "int64", "float32", "float64"]
        assert [a.dtype.name for a in launched.arguments[1:]] == kinds
        assert launched.arguments[1] == 0

    @needs_compiler
    def test_arguments_arrive(self, cupy):
        device, kernel = CudaDevice(), written_kernel("scalars")
        out = device.zeros((8,), np.float64)
        for types, may_be_null, last in ((FLOAT32, None, 0.2), (FLOAT64, device.upload(np.array([2.0])), 2.2)):
            launch(device, kernel, 1, 1, (out, may_be_null, *self.SCALARS), types)
            np.testing.assert_array_equal(device.download(out), [*range(1, 7), np.float32(0.1), last])

    def test_kernels_of_one_name_in_two_files_are_told_apart(self, dry_cupy, tmp_path):
        device, text = CudaDevice(), 'extern "C" __global__ void relu_forward(int n) {}'
        expected = []
        for folder in ("a", "b"):
            (tmp_path / folder).mkdir()
            (kernel,) = parse(tmp_path / folder, f"// {folder}\n{text}")  # files of one text share what is compiled
            for types in (FLOAT32, FLOAT64, FLOAT32):
                launch(device, kernel, 1, 1, (1,), types)
                expected.append(Cubin(kernel.source, types, "sm_90"))
        assert [launched.cubin for launched in dry_cupy.launches] == expected
        assert len(dry_cupy.loaded) == len(set(expected)) == 4, "a module is loaded once"

    @pytest.mark.parametrize("capability", ["75", "120"])
    def test_kernels_are_compiled_for_this_gpu(self, monkeypatch, tmp_path, capability):
        cupy = FakeCupy(capability=capability, dry=True).install(monkeypatch, tmp_path)
        device = CudaDevice()
        x = device.zeros((3,), np.float32)
        launch(device, "relu_forward", 1, 32, (x, device.copy(x), 3), FLOAT32)
        launch(device, "relu_backward", 1, 32, (x, device.copy(x), device.copy(x), 3), FLOAT32)
        assert cupy.loaded == [Cubin(find_kernel("relu_forward").source, FLOAT32, f"sm_{capability}")]

    def test_arrays_of_the_cpu_do_not_reach_a_kernel(self, cupy):
        device = CudaDevice()
        model = SegNet(5, 1 / 16, device)
        with pytest.raises(DTypeError):
            model(np.zeros((1, 32, 32, 3)))
        cpu_tensor = tensor(np.zeros((1, 32, 32, 3), np.float32), "numpy")
        with pytest.raises(DeviceError, match="input 1 is on cuda, expected numpy; create both on one device"):
            model(cpu_tensor)
        assert cupy.launches == []


class TestMemory:
    """What the devices do not have in common; the rest is in test_device.py."""

    def test_arrays_of_another_gpu_are_foreign(self, cupy):
        device = CudaDevice()
        array = device.zeros((4,), np.float32)
        assert device.owns(array)
        cupy.gpu = 1
        assert not device.owns(array)
        assert device.owns(device.zeros((4,), np.float32))
        assert not device.owns(np.zeros(4, np.float32))

    def test_out_of_memory_says_how_much_and_what_to_try(self, cupy, monkeypatch, tmp_path):
        cupy = FakeCupy(total=5 << 20).install(monkeypatch, tmp_path)
        device = CudaDevice()
        array = device.zeros((1024, 1024), np.float32)
        cupy.free = 3 << 20
        for allocate in (
            lambda: device.empty((1024, 1024), np.float32),
            lambda: device.zeros((1024, 1024), np.float32),
            lambda: device.upload(np.zeros((1024, 1024), np.float32)),
            lambda: device.copy(array),
            lambda: device.from_dlpack(array.T),
            lambda: device.from_dlpack(np.zeros((1024, 1024), np.float32)),
        ):
            with pytest.raises(
                DeviceMemoryError, match=r"out of memory: .* 4,194,304 bytes .*; 3,145,728 of 5,242,880 bytes are free$"
            ) as caught:
                allocate()
            assert (caught.value.asked, caught.value.free) == (4 << 20, 3 << 20)

    def test_dlpack_in_and_out(self, cupy):
        device = CudaDevice()
        values = np.arange(12, dtype=np.float32).reshape(3, 4)
        on_gpu = device.upload(values)

        class Foreign:
            """An array of another library: all it has is DLPack."""

            def __init__(self, array: Any) -> None:
                self.__dlpack__, self.__dlpack_device__ = array.__dlpack__, array.__dlpack_device__

        for source in (values, on_gpu):
            taken = tensor(Foreign(source), device)
            assert isinstance(taken.data, cupy.ndarray)
            assert np.array_equal(taken.numpy(), values)
            assert taken.__dlpack_device__() == (2, 0)
            assert device.address(device.from_dlpack(taken)) == device.address(taken.data)
        assert device.address(taken.data) == device.address(on_gpu)
        assert np.array_equal(np.from_dlpack(tensor(Foreign(values), "numpy")), values)


NULL = np.uint64(0)


class TestStandIn:
    """The stand-in lets through no more than CuPy and a driver would."""

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"args": ("out", None)}, "may_be_null is None"),
            ({"args": (0x1000, NULL)}, "out is 4096"),
            ({"args": (np.uint64(0x1000), NULL)}, "out is an address from nowhere"),
            ({"args": (np.int32(0), NULL)}, "out is no 64-bit address"),
            ({"args": (np.zeros(8), NULL)}, "out is array"),
            ({"args": ("float32", NULL)}, "out is float32, expected float64"),
            ({"args": ("turned", NULL)}, "out is no contiguous array"),
            ({"args": ("another GPU", NULL)}, "out is on another GPU"),
            ({"first": 1}, "a would travel as 64 bits"),
            ({"first": np.int32(1)}, "a is int32, expected int8"),
            ({"grid": [2, 1, 1]}, "the grid as a tuple"),
            ({"grid": (2, 1)}, r"grid is \(2, 1\)"),
            ({"grid": (np.int64(2), 1, 1)}, "grid is .*, 1, 1"),
            ({"grid": (1, 65536, 1)}, "grid is .*the limit"),
            ({"grid": (0, 1, 1)}, "grid is .*the limit"),
            ({"block": [32, 1, 1]}, "the block as a tuple"),
            ({"block": (1025, 1, 1)}, "block is .*the limit"),
            ({"block": (32, 64, 1)}, "the block has 2048 threads"),
            ({"block": (1, 1, 128)}, "block is .*the limit"),
            ({"shared": 48 * 1024 + 1}, "shared memory is 49153"),
            ({"shared": np.int64(16)}, "shared memory is .*16"),
            ({"args": ("out",)}, "got 9 arguments"),
        ],
    )
    def test_it_refuses(self, dry_cupy, wrong, message):
        arrays = {
            "out": dry_cupy.zeros((8,), np.float64),
            "float32": dry_cupy.zeros((8,), np.float32),
            "turned": dry_cupy.zeros((2, 4), np.float64).T,
            "another GPU": ndarray(dry_cupy, np.zeros(8), gpu=1),
        }
        dtypes = (np.int8, np.uint8, np.int16, np.int32, np.uint32, np.int64, np.float32, np.float64)
        scalars = [dtype(1) for dtype in dtypes]
        kernel = written_kernel("scalars")
        function = RawKernel(dry_cupy, Cubin(kernel.source, FLOAT32, "sm_90"), "scalars")

        def call(args=("out", NULL), first=scalars[0], grid=(2, 1, 1), block=(32, 1, 1), shared=16) -> None:
            pointers = [arrays[a] if isinstance(a, str) else a for a in args]
            function(grid, block, (*pointers, first, *scalars[1:]), shared_mem=shared)

        call()
        with pytest.raises(AssertionError, match=message):
            call(**wrong)
        assert len(dry_cupy.launches) == 1

    def test_numpy_cannot_read_its_arrays(self, cupy):
        array = cupy.zeros((4,), np.float32)
        for read in (np.asarray, np.sum, lambda a: a + np.ones(4), lambda a: np.ones(4) + a, np.from_dlpack):
            with pytest.raises((TypeError, RuntimeError, BufferError)):
                read(array)
        with pytest.raises(AttributeError, match="no ndarray"):
            array.sum()

    def test_it_takes_no_arrays_of_the_cpu(self, cupy):
        with pytest.raises(TypeError, match="CPU arrays cannot be directly imported"):
            cupy.from_dlpack(np.zeros(4))

    @pytest.mark.parametrize("architecture", ["sm_80", "compute_90"])
    def test_it_loads_cubins_of_its_gpu_only(self, dry_cupy, architecture):
        path = nvrtc.cached_cubin(find_kernel("relu_forward").source, FLOAT32, architecture)
        with pytest.raises(AssertionError, match="NO_BINARY_FOR_GPU"):
            dry_cupy.RawModule(path=str(path))
        assert dry_cupy.loaded == []

    def test_cupy_has_what_it_has(self):
        real = pytest.importorskip("cupy")
        fake = FakeCupy()
        of_its_own = {"capability", "driver", "gpus", "free", "dry", "gpu", "cubins", "loaded", "launches", "copies"}
        of_its_own |= {"install", "synchronisations", "allocations", "fails_at", "timeline", "common_pool"}
        of_its_own |= {"memory", "work", "copy_in"}
        public = {name for name in (*dir(FakeCupy), *vars(fake)) if not name.startswith("_")} - of_its_own
        assert {"empty", "zeros", "asarray", "asnumpy", "RawModule", "ndarray", "cuda"} <= public
        assert [name for name in public if not hasattr(real, name)] == []
        for name in vars(fake.cuda):
            assert hasattr(real.cuda, name)
        for name in vars(fake.cuda.runtime):
            assert hasattr(real.cuda.runtime, name)
        assert issubclass(real.cuda.memory.OutOfMemoryError, MemoryError)
        for ours, theirs in ((Stream, real.cuda.Stream), (Event, real.cuda.Event), (Graph, real.cuda.Graph)):
            of_its_own = {"run", "tick", "last", "capture", "number", "clock"}
            public = {name for name in dir(ours) if not name.startswith("_")} - of_its_own
            assert [name for name in public if not hasattr(theirs, name)] == []
        for name in ("malloc", "set_limit", "free_all_blocks"):
            assert hasattr(real.cuda.MemoryPool, name)
        array = fake.zeros((4,), np.float32)
        names = {"shape", "dtype", "ndim", "size", "nbytes", "itemsize", "strides"}
        names |= {name for name in dir(ndarray) if not name.startswith("_")} | {"__dlpack__", "__dlpack_device__"}
        assert [name for name in names if not (hasattr(array, name) and hasattr(real.ndarray, name))] == []


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
