"""What plans of Hopper's convolutions decide from shapes alone: tiles, groups of pixels, parts of wgrad, the rule."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from support.kernels import needs_compiler

from segnet_scratch.engine.convolutions import Convolutions
from segnet_scratch.errors import ConfigError
from segnet_scratch.lab.proof.compare import Defect
from segnet_scratch.lab.proof.launches import Replay
from segnet_scratch.ops.convolution import conv2d_hopper as hopper
from segnet_scratch.ops.convolution.conv2d_fused import Below, FusedForward
from segnet_scratch.ops.convolution.conv2d_geometry import Geometry
from segnet_scratch.ops.convolution.split_planes import PLANES
from segnet_scratch.ops.convolution.tile_table import TileTable
from segnet_scratch.ops.op import spec
from segnet_scratch.runtime.devices import HostDevice
from segnet_scratch.runtime.occupancy import MAX_SHARED
from segnet_scratch.runtime.precision import BFLOAT16

BARRIERS = 256  # bytes of shared memory at most: two of eight bytes a stage


def geometry(n, h, w, c, o, kernel=3):
    return Geometry.of((n, h, w, c), (o, kernel, kernel, c), 1, kernel // 2)


class TestTiles:
    @pytest.mark.parametrize("tile", hopper.TILES, ids=lambda tile: tile.name)
    def test_one_block_fits_a_multiprocessor(self, tile):
        assert max(tile.shared(rung) for rung in PLANES) + BARRIERS <= MAX_SHARED
        # Stages begin where the pattern of the swizzle does.
        assert tile.columns * 128 % 1024 == 0

    @pytest.mark.parametrize(
        ("shape", "columns", "windows", "name"),
        [
            ((16, 224, 224), 64, False, "halo_256x64"),
            ((16, 224, 224), 24, False, "halo_256x32"),
            ((16, 112, 112), 128, False, "columns_256x128"),
            ((16, 56, 56), 256, True, "halo_256x128"),
            ((16, 56, 56), 128, False, "columns_128x128"),  # 196 large tiles: two rounds, the second half empty
            ((16, 28, 28), 512, False, "columns_128x128"),
            ((16, 14, 14), 512, True, "halo_128x128"),
            ((8, 90, 120), 256, True, "halo_256x128"),  # no multiple of 8, but large
        ],
    )
    def test_by_shape(self, shape, columns, windows, name):
        assert hopper.tile_for(*shape, columns, windows).name == name

    def test_a_measured_tile_is_taken(self):
        x, weight = spec((16, 56, 56, 128), BFLOAT16), spec((256, 3, 3, 128), BFLOAT16)
        key = hopper.HopperForward.plan(x, weight, statistics=True).key
        op = Convolutions("bf16", TileTable({key: "halo_256x128"})).forward(x, weight, statistics=True)
        assert op.tile is hopper.NAMED["halo_256x128"]
        other = Convolutions("bf16", TileTable({key: "128x64"})).forward(x, weight)
        assert other.tile is hopper.NAMED["columns_256x128"]


@pytest.mark.parametrize(("rung", "planes"), [("tf32", 2), ("tf32x3", 3)])
def test_float32_goes_through_planes(rung, planes):
    x, weight = spec((1, 8, 16, 128)), spec((64, 3, 3, 128))
    op = Convolutions(rung, TileTable({})).forward(x, weight)
    assert type(op) is hopper.HopperForward
    assert op.inputs["x"] == spec((1, 8, 16, planes * 128), BFLOAT16)
    assert op.inputs["weight"] == spec((64, 3, 3, planes * 128), BFLOAT16)
    assert op.outputs["y"] == spec((1, 8, 16, 64))
    assert op.bytes == 2 * planes * (x.size + weight.size) + op.outputs["y"].nbytes
    assert rung in op.key


class TestGroups:
    @pytest.mark.parametrize("tile", hopper.TILES, ids=lambda tile: tile.name)
    @pytest.mark.parametrize("shape", [(1, 1, 1), (2, 9, 17), (3, 8, 8), (5, 13, 9)], ids=str)
    def test_a_slot_has_every_so_many_tiles(self, tile, shape):
        map_, (image, y, x) = np.arange(np.prod(shape)).reshape(*shape, 1), np.indices(shape)
        _, down, across = -(-np.array(shape) // 8)
        place = 64 * ((image * down + y // 8) * across + x // 8) if tile.halo else map_[..., 0]
        for slots in {1, min(2, tile.rows(*shape)), tile.rows(*shape)}:
            for k, group in enumerate(hopper.groups_of(tile, slots, map_)):
                np.testing.assert_array_equal(np.sort(group.ravel()), map_[place // tile.pixels % slots == k].ravel())
            assert k == slots - 1

    def test_blocks_have_tiles_of_the_same_columns_and_are_few(self):
        maps = {64: (16, 224, 224), 256: (16, 112, 112), 320: (16, 112, 112), 128: (1, 8, 8), 512: (16, 112, 112)}
        found = {}
        for o, shape in maps.items():
            x, weight = spec((*shape, 64), BFLOAT16), spec((o, 3, 3, 64), BFLOAT16)
            tile = replace(hopper.tile_for(*shape, o, False), blocks=2 if o == 512 else 132)
            op = hopper.HopperForward.plan(x, weight, statistics=True, tile=tile)
            assert op.outputs["partials"].shape == (op.slots, 2, o)
            found[o] = op.slots, op.column_tiles
        assert found == {64: (132, 1), 256: (66, 2), 320: (26, 5), 128: (1, 1), 512: (1, 4)}


@needs_compiler
def test_sums_over_many_tiles_are_as_exact_as_over_one():
    """Of terms of one sign, whose roundings do not cancel, after some zeros: 48 tiles of a block."""
    map_, weight, rng = spec((4, 48, 64, 64), BFLOAT16), spec((64, 3, 3, 64), BFLOAT16), np.random.default_rng(3)
    tile = replace(hopper.NAMED["halo_256x64"], blocks=1)
    forward = hopper.HopperForward.plan(map_, weight, statistics=True, tile=tile)
    backward = hopper.HopperBackwardData.plan(map_, weight, Below(map_, False), tile=tile)
    inputs = (forward.inputs | backward.inputs).items()
    given = {name: rng.uniform(0.5, 1, s.shape).astype(s.dtype) for name, s in inputs}
    given["mean"] -= 1
    given["x"][0, :4] = 0
    found = [op(HostDevice(), **{name: given[name] for name in op.inputs}) for op in (forward, backward)]
    y, dr, below = (a.astype(np.float64).reshape(-1, 64) for a in (found[0].y, found[1].dr, given["below_y"]))
    gradients = dr.sum(0), (dr * (below - given["mean"]) * given["inv_std"]).sum(0)
    for arrays, expected in zip(found, ((y.mean(0), y.var(0) * len(y)), gradients), strict=True):
        np.testing.assert_allclose(arrays.partials[0], expected, rtol=12 * 2.0**-24)


class TestParts:
    def test_none_is_empty_and_all_blocks_are_in_one(self):
        rng = np.random.default_rng(0)
        for _ in range(500):
            n, h, w = (int(k) for k in rng.integers(1, (20, 90, 90)))
            c, o = (64 * int(k) for k in rng.integers(1, 9, 2))
            blocks = n * h * w
            parts = hopper.parts_of(geometry(n, h, w, c, o), blocks)
            assert (parts.count - 1) * parts.each < blocks <= parts.count * parts.each
            assert parts.count * (c // 64) * (o // 64) <= max(hopper.MULTIPROCESSORS, c // 64 * (o // 64))


@needs_compiler
def test_a_failure_of_a_kernel_with_tensor_maps_is_reported_without_its_writer():
    op = hopper.HopperForward.plan(spec((1, 4, 4, 64), BFLOAT16), spec((64, 3, 3, 64), BFLOAT16))
    replay = Replay(op, {name: np.ones(s.shape, s.dtype) for name, s in op.inputs.items()}, HostDevice())
    assert replay.writer(Defect("y", "it is wrong", (0, 0, 0, 0))) == replay.race(2) == []


class TestRule:
    @pytest.mark.parametrize(
        ("g", "reason"),
        [
            (geometry(1, 8, 8, 64, 64, 7), "3x3 kernels, not 7x7"),
            (geometry(1, 8, 8, 3, 64), "multiples of 64, not 3 to 64"),
            (geometry(1, 8, 8, 64, 21), "multiples of 64, not 64 to 21"),
            (geometry(1, 8, 8, 64, 72), "multiples of 64, not 64 to 72"),
            (geometry(2**17, 128, 128, 64, 64), "less than 2^31 pixels"),
            (Geometry.of((1, 8, 8, 64), (64, 3, 3, 64), 2, 1), "stride 1 and padding 1, not 2 and 1"),
        ],
    )
    def test_what_does_not_fit(self, g, reason):
        assert reason in hopper.unsupported_reason(g)

    def test_what_does_not_fit_goes_to_mma_sync(self):
        kernels = Convolutions("bf16", TileTable())
        for x, weight in (
            ((1, 8, 8, 3), (64, 3, 3, 3)),
            ((1, 8, 8, 64), (64, 7, 7, 64)),
            ((1, 8, 8, 64), (72, 3, 3, 64)),
        ):
            assert type(kernels.forward(spec(x, BFLOAT16), spec(weight, BFLOAT16))) is FusedForward
            assert kernels.needs_flipped(weight)
        assert not kernels.needs_flipped((64, 3, 3, 64))
        assert not kernels.needs_flipped((24, 3, 3, 64)), "a classifier"
        # An image alone leaves so few tiles that the depth is split.
        deep = spec((1, 14, 14, 512), BFLOAT16), spec((512, 3, 3, 512), BFLOAT16)
        assert type(kernels.forward(*deep, bias=True)) is FusedForward
        assert type(kernels.forward(*deep, statistics=True)) is hopper.HopperForward

    @pytest.mark.parametrize("setting", [None, "0", "1"])
    @pytest.mark.parametrize("architecture", ["sm_89", "sm_90", "sm_100", "sm_120", None])
    def test_devices(self, architecture, setting, monkeypatch):
        class Device(SimpleNamespace):
            __hash__ = object.__hash__

        monkeypatch.delenv("SEGNET_HOPPER", raising=False)
        if setting is not None:
            monkeypatch.setenv("SEGNET_HOPPER", setting)
        table = hopper.tiles_on(Device(architecture=architecture, runs_kernels=True, gpu=None))
        assert (table is not None) == ((architecture, setting) in {("sm_90", None), ("sm_90", "1"), (None, "1")})
        assert hopper.tiles_on(Device(architecture=None, runs_kernels=False, gpu=None)) is None

    def test_a_setting_that_is_none(self, monkeypatch):
        monkeypatch.setenv("SEGNET_HOPPER", "yes")
        with pytest.raises(ConfigError, match="SEGNET_HOPPER is 'yes'; expected 1"):
            hopper.tiles_on(SimpleNamespace(architecture="sm_90", runs_kernels=True, gpu=None))
