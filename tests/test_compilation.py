"""Kernels compiled ahead of their launches, on all cores; libnvrtc from a wheel; logs that say nothing."""

import numpy as np
import pytest
from support.kernels import needs_compiler

from segnet_scratch.config import Config
from segnet_scratch.engine.convolutions import Convolutions
from segnet_scratch.engine.inference import InferenceProgram
from segnet_scratch.engine.network import Network
from segnet_scratch.engine.program import BoundProgram
from segnet_scratch.errors import CompileError
from segnet_scratch.runtime import nvrtc, resources
from segnet_scratch.runtime.compilation import compile_for, launched_by, on_all_cores
from segnet_scratch.runtime.devices import HostDevice, get_device
from segnet_scratch.runtime.launch import ElementTypes, find_kernel, launch
from segnet_scratch.runtime.resources import LogError
from segnet_scratch.segnet import SegNet
from segnet_scratch.train import Listener, Trainer

F32 = ElementTypes.of(np.dtype(np.float32))


class Compiling(HostDevice):
    """Writes down what is compiled and what is launched."""

    def __init__(self):
        super().__init__()
        self.compiled, self.executed = [], []

    def compile(self, kernel, types):
        self.compiled.append((kernel.source.path.name, types.name))

    def execute(self, launch):
        assert (launch.kernel.source.path.name, launch.types.name) in self.compiled, "launched before it was compiled"
        self.executed.append(launch.kernel.name)


@needs_compiler
def test_a_program_compiles_each_source_once_before_it_launches():
    network, device = Network(SegNet.blocks_of(0.125), 2, 1, (32, 32)), Compiling()
    program = InferenceProgram(network, Convolutions("tf32"))
    given = {name: np.zeros(s.shape, s.dtype) for name, s in program.external.items()}
    bound, told = BoundProgram(program, device, given), []
    bound.compile(lambda done, total: told.append((done, total)))
    assert not device.executed
    assert len(device.compiled) == len(set(device.compiled)) > 2
    assert told == [(i + 1, len(device.compiled)) for i in range(len(device.compiled))]
    compiled = list(device.compiled)
    bound.run()
    assert device.compiled == compiled
    assert "norm_relu_unpool_forward" in device.executed


@needs_compiler
def test_what_a_run_launches_is_listed_and_nothing_runs():
    x, y = np.zeros(4, np.float32), np.full(4, 7, np.float32)
    device = get_device("host")

    def run() -> None:
        launch(device, "relu_forward", 1, 32, (x, y, 4), F32)

    assert launched_by(run) == [(find_kernel("relu_forward"), F32)]
    assert (y == 7).all()
    compile_for(device, launched_by(run))


@needs_compiler
@pytest.mark.parametrize("engine", ["layers", "fused"])
def test_what_a_run_needs_is_compiled_before_its_first_step(sample, tmp_path, engine):
    compiled, late, told = [], [], []

    class Watched(HostDevice):
        def compile(self, kernel, types):
            compiled.append((kernel.source.path.name, types.name))
            super().compile(kernel, types)

        def execute(self, launch):
            if compiled:
                late.append((launch.kernel.source.path.name, launch.types.name))
            super().execute(launch)

    class Told(Listener):
        def compiling(self, done, total):
            assert late == []
            told.append((done, total))

    settings = {"size": 32, "width": 1 / 8, "batch": 2, "steps": 1, "workers": 0, "engine": engine}
    Trainer(Config(model="segnet-basic", **settings), sample, tmp_path, Watched()).run(Told())
    needed = set(compiled)  # validation asks for its own again, which are there by then
    assert told == [(n + 1, len(needed)) for n in range(len(needed))]
    assert set(compiled[: len(needed)]) == needed
    # Scores take little, and are left to their first launch.
    assert {name for name, _ in set(late) - set(compiled)} <= {"cross_entropy.cu"}
    host = Trainer(Config(model="segnet-basic", **settings), sample, tmp_path / "host", "host")
    host._compile = lambda: None
    host.run()
    assert (tmp_path / "metrics.jsonl").read_bytes() == (tmp_path / "host" / "metrics.jsonl").read_bytes()


def test_an_error_ends_it_and_names_the_kernel():
    def fail(item):
        raise CompileError(f"{item} does not compile")

    with pytest.raises(CompileError, match="a does not compile"):
        on_all_cores(fail, ["a", "b"])


class TestLogs:
    """NVRTC 13.0 was seen to leave a log empty while many threads compiled."""

    @pytest.fixture(autouse=True)
    def compiler(self, monkeypatch, tmp_path):
        monkeypatch.setenv("SEGNET_CACHE", str(tmp_path))
        monkeypatch.setattr(nvrtc, "nvrtc_version", lambda: (13, 0))
        self.logs = []

        def compile_cubin(source, types, architecture, log):
            log.append(self.logs.pop(0))
            return b"cubin"

        monkeypatch.setattr(resources, "compile_cubin", compile_cubin)

    SOURCE = find_kernel("add_forward").source
    LOG = (
        "ptxas info    : Compiling entry function 'add_forward' for 'sm_90'\n"
        "ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 16 registers\n"
    )

    def compile(self):
        return resources.compile_all([self.SOURCE], ["sm_90"], ["float32"])

    def test_an_empty_log_is_asked_for_again_and_not_kept(self):
        self.logs = ["", self.LOG]
        assert self.compile()[0].usages[0].registers == 16
        assert self.compile()[0].usages[0].registers == 16, "from the cache"

    def test_one_that_stays_empty_is_an_error_of_its_own(self):
        self.logs = ["", ""]
        with pytest.raises(LogError, match=r"add\.cu, sm_90: the log of ptxas names the kernels none"):
            self.compile()


def test_the_builtins_are_loaded_before_the_library_that_opens_them_by_name(tmp_path, monkeypatch):
    loaded = []

    class Library:
        nvrtcGetCUBIN = None

        def __init__(self, name):
            loaded.append(name.rpartition("/")[2])

    for name in ("libnvrtc.so.13", "libnvrtc-builtins.so.13.0"):
        (tmp_path / name).touch()
    monkeypatch.setattr(nvrtc, "_candidates", lambda: [tmp_path / "libnvrtc.so.13"])
    monkeypatch.setattr(nvrtc.ctypes, "CDLL", Library)
    nvrtc._library.__wrapped__()
    assert loaded == ["libnvrtc-builtins.so.13.0", "libnvrtc.so.13"]
