"""Memory that a run would need, told before it begins."""

import re

import pytest

from segnet_scratch.config import Config
from segnet_scratch.engine.convolutions import Convolutions
from segnet_scratch.errors import DeviceMemoryError
from segnet_scratch.memory_check import check_memory
from segnet_scratch.ops.convolution.tile_table import TileTable
from segnet_scratch.runtime import machine
from segnet_scratch.runtime.devices import CudaDevice, NumpyDevice
from segnet_scratch.segnet import SegNet
from segnet_scratch.train import Trainer


def resolved(**settings):
    """Settings of a narrow network as a run has them: engine and precision are no longer "auto"."""
    return Config(**{"width": 0.125, "engine": "layers", "precision": "float32"} | settings)


def refused(config, free, monkeypatch, device="numpy"):
    monkeypatch.setattr(NumpyDevice, "free_memory", lambda self: free)
    with pytest.raises(DeviceMemoryError) as raised:
        check_memory(SegNet(21, config.width, device, dtype=config.dtype), config)
    return raised.value


@pytest.mark.parametrize(
    "settings",
    [{}, {"engine": "fused"}, {"engine": "fused", "precision": "bf16"}, {"dtype": "float64"}, {"accumulate": 5}],
    ids=str,
)
def test_the_batch_that_is_offered_fits_and_the_next_larger_ones_do_not(monkeypatch, settings):
    config = resolved(size=224, batch=1000, **settings)
    error = refused(config, 2_000_000_000, monkeypatch)
    offered = int(re.search(r"try --set batch=(\d+)", str(error))[1])
    assert 1 <= offered < 1000
    check_memory(SegNet(21, 0.125, "numpy", dtype=config.dtype), resolved(batch=offered, **settings))
    assert error.asked > error.free == 2_000_000_000
    larger = resolved(batch=int(1.3 * offered) + 5, **settings)
    with pytest.raises(DeviceMemoryError):
        check_memory(SegNet(21, 0.125, "numpy", dtype=config.dtype), larger)


def test_what_does_not_grow_with_the_batch_is_counted_once(monkeypatch):
    """Gradients of the weights, 118 MB, and Hopper's partial sums of them: 16 images need 817 MiB, not 16 times 152."""
    monkeypatch.setattr(Convolutions, "on", lambda *_: Convolutions("bf16", TileTable()))
    settings = {"width": 1.0, "engine": "fused", "precision": "bf16"}
    parameters = 12 * sum(p.data.size for p in SegNet(21, 1.0, "numpy").parameters())
    for size, n, times, least in ((224, 1, 16, 5), (32, 64, 10, 1)):
        configs = (resolved(size=size, batch=k, **settings) for k in (n, n * times))
        one, many = (refused(config, 1000, monkeypatch).asked - parameters for config in configs)
        assert least * one < many < times * one - 200 * 2**20


def test_the_parts_that_are_offered_fit(monkeypatch):
    config = resolved(size=224, batch=1000)
    error = refused(config, 2_000_000_000, monkeypatch)
    parts = int(re.search(r"--set accumulate=(\d+)", str(error))[1])
    check_memory(SegNet(21, 0.125, "numpy"), resolved(batch=1000, accumulate=parts))


@pytest.mark.parametrize("width", [1 / 3, 0.05])
def test_widths_that_the_fused_engine_cannot_compute_are_counted_as_layers(width, monkeypatch):
    config = resolved(width=width, size=224, batch=1000)
    assert "try --set batch=" in str(refused(config, 2_000_000_000, monkeypatch))


def test_where_not_one_image_fits(monkeypatch):
    assert "try a smaller size or width" in str(refused(resolved(size=512), 1000, monkeypatch))


def test_memory_that_cupy_holds_of_arrays_that_are_gone_is_free(dry_cupy):
    dry_cupy.free, dry_cupy.common_pool.held = 1000, 500
    assert CudaDevice().free_memory() == 1500


def test_it_is_told_before_the_run_folder_is_made(sample, tmp_path, monkeypatch):
    monkeypatch.setattr(NumpyDevice, "free_memory", lambda self: 10_000_000)
    with pytest.raises(DeviceMemoryError, match=r"batch = 1000 at 64x64 needs about \d+ GB on the numpy device"):
        Trainer(Config(size=64, batch=1000, steps=1), sample, tmp_path / "run", "numpy")
    assert not (tmp_path / "run").exists()


def test_a_container_with_less_than_the_machine(monkeypatch, tmp_path):
    whole = machine.available_memory()
    assert whole is not None
    assert whole > 10_000_000
    for name, text in (("max", "9000000"), ("current", "5000000"), ("stat", "anon 1\ninactive_file 1000000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    group = (str(tmp_path / "memory.max"), str(tmp_path / "memory.current"), "inactive_file")
    monkeypatch.setattr(machine, "_CGROUPS", (group,))
    assert machine.available_memory() == 5_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.available_memory() > 10_000_000
