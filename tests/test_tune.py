"""Tiles: any of them gives the same map, the fastest is kept for its GPU, and a bad file is no obstacle."""

import logging
from contextlib import contextmanager

import numpy as np
import pytest

from segnet_scratch.engine.convolutions import Convolutions
from segnet_scratch.engine.network import Network
from segnet_scratch.engine.training import Objective, TrainingProgram, two_branches
from segnet_scratch.errors import DeviceError
from segnet_scratch.lab.profile.tune import convolutions, tune
from segnet_scratch.ops.convolution import conv2d_mma as mma
from segnet_scratch.ops.convolution.conv2d_fused import Below, FusedBackwardData, FusedForward
from segnet_scratch.ops.convolution.tile_table import TileTable, key_of, table_of
from segnet_scratch.ops.op import spec
from segnet_scratch.runtime import host
from segnet_scratch.runtime.devices import HostDevice, Timer, get_device
from segnet_scratch.runtime.precision import BFLOAT16
from segnet_scratch.segnet import SegNet, SegNetBasic

GPU = "NVIDIA Test 1"


class TunedDevice(HostDevice):
    """A host device that says it is a GPU, and whose clock runs faster with some kernels."""

    gpu = GPU

    def __init__(self, microseconds=None):
        super().__init__(host.HostOptions())
        self.now, self.microseconds, self.launched = 0.0, microseconds or {}, []

    def execute(self, launch):
        kernel = launch.kernel
        self.launched.append(kernel.name)
        self.now += 1e-6 * next((us for name, us in self.microseconds.items() if kernel.name.endswith(name)), 50)

    def compile(self, kernel, types):
        pass  # nothing is executed

    @contextmanager
    def side_stream(self):
        before = self.now
        yield
        self.now = before  # a second stream that costs nothing

    def timer(self):
        device = self

        class FakeTimer(Timer):
            def mark(self):
                return device.now

        return FakeTimer()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SEGNET_CACHE", str(tmp_path))
    return tmp_path


class TestTable:
    def test_round_trip(self, cache):
        table = TileTable.load(GPU)
        assert table.choices == {}
        path = table.save(GPU, {"a": "128x64"})
        assert path.is_relative_to(cache)
        assert TileTable.load(GPU).choices == {"a": "128x64"}
        assert TileTable.load("another").choices == {}

    @pytest.mark.parametrize("content", ["", "[]", "{}", '{"gpu": "NVIDIA Test 1", "choices": {"a": 3}}', "\x00"])
    def test_a_bad_file_is_named_and_shape_decides(self, cache, caplog, content):
        path = TileTable.path(GPU)
        path.parent.mkdir(parents=True)
        path.write_text(content)
        with caplog.at_level(logging.WARNING):
            assert TileTable.load(GPU).choices == {}
        assert str(path) in caplog.text
        assert "tune again" in caplog.text

    def test_a_device_without_a_gpu_has_none(self):
        assert table_of(get_device("host")).choices == {}


class TestSameBits:
    @pytest.mark.parametrize("tile", [mma.NARROW, mma.MEDIUM, mma.WIDE], ids=lambda tile: tile.name)
    def test_whatever_the_tile(self, tile):
        rng = np.random.default_rng(3)
        x, weight = spec((2, 7, 9, 16), BFLOAT16), spec((40, 3, 3, 16), BFLOAT16)
        forward = FusedForward.plan(x, weight, "bf16", statistics=True)
        backward = FusedBackwardData.plan(spec((2, 7, 9, 40), BFLOAT16), weight, Below(x), "bf16")
        keys = {
            key_of("fused_forward", "bf16", forward.geometry): forward,
            key_of("fused_backward_data", "bf16", backward.geometry.mirrored): backward,
        }
        for key, op in keys.items():
            arrays = {n: rng.standard_normal(s.shape, np.float32).astype(s.dtype) for n, s in op.inputs.items()}
            expected = op(HostDevice(), **arrays)
            device = HostDevice()
            table_of(device).choices[key] = tile.name
            found = op(device, **arrays)
            for name in op.outputs:
                ours, theirs = getattr(found, name), getattr(expected, name)
                if name == "partials":  # added up in an order of the tile
                    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-3)
                else:
                    assert ours.tobytes() == theirs.tobytes(), (key, name)


class TestTune:
    NETWORK = Network(SegNetBasic.blocks_of(0.5), 21, 1, (16, 16), 1)

    def test_the_fastest_is_kept_and_taken(self, cache):
        device = TunedDevice({"_128x32": 10, "_128x64": 20, "_128x128": 30})
        choices, _ = tune(device, self.NETWORK, "bf16")
        path = TileTable.path(GPU)
        assert len(choices) == len(convolutions(self.NETWORK, Convolutions("bf16"))) > 4
        for choice in choices:
            assert choice.fastest == "128x32"
            assert set(choice.seconds) == {"128x32", "128x64", "128x128"}
            assert choice.seconds["128x32"] == pytest.approx(1e-5)
        another = TunedDevice()
        assert table_of(another).choices == {choice.key: "128x32" for choice in choices}
        assert path.exists()

    def test_two_branches_on_hopper_in_bfloat16_unless_the_environment_says(self, cache, monkeypatch):
        device = TunedDevice()
        assert not two_branches(device, "bf16")
        device.architecture = "sm_90"
        assert two_branches(device, "bf16")
        assert not two_branches(device, "tf32")
        assert not two_branches(HostDevice(), "bf16")
        monkeypatch.setenv("SEGNET_BRANCHES", "0")
        assert not two_branches(device, "bf16")

    def test_tiles_of_hopper(self, cache, monkeypatch):
        monkeypatch.setenv("SEGNET_HOPPER", "1")
        monkeypatch.setattr("segnet_scratch.lab.profile.measure.CACHE_BYTES", 1)
        device = TunedDevice({"columns_128x128": 10, "halo_128x128": 20})
        network = Network(SegNet.blocks_of(0.25), 21, 2, (32, 32))
        choices, _ = tune(device, network, "bf16")
        hopper = {choice.key: choice for choice in choices if choice.key.startswith("hopper")}
        assert len(hopper) > 4
        for key, choice in hopper.items():
            wide = "128 3x3" in key if "forward" in key else "128->" in key
            if wide:
                assert choice.fastest == ("halo_128x128" if "windows" in key else "columns_128x128")
            else:
                few = "->32" in key and "forward" in key  # outputs, that a tile of their own would suit
                assert set(choice.seconds) == {"halo_256x64"} | ({"halo_256x32"} if few else set())
        program = TrainingProgram(network, Convolutions.on(device, "bf16"), Objective())
        taken = {step.op.tile.name for step in program.steps if step.op.name == "conv2d_hopper_forward"}
        assert taken - {"halo_256x32"} == {"columns_128x128", "halo_256x64"}

    def test_without_a_gpu_it_says_so(self):
        with pytest.raises(DeviceError, match=r"measured on a GPU, and the device is numpy"):
            tune(get_device("numpy"), self.NETWORK, "bf16")

    def test_the_command(self, segnet):
        ended = segnet("tune", "--device", "host")
        assert ended.code == 1
        assert "tiles are measured on a GPU" in " ".join(ended.err.split())
        assert segnet("tune", "--precision", "fp8").code == 2
