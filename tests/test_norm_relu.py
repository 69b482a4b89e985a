"""Batch norm, ReLU and pool of the fused engine, beyond what the templates over the op table check: the bits of the
layers' kernels, the gradients of PyTorch, any grid, packed codes, how wide the machine code's accesses are.
"""

from collections import Counter

import numpy as np
import pytest
from support.kernels import needs_compiler
from support.machine_code import instructions_of, loads_before_a_use, needs_disassembler

from segnet_scratch.errors import DTypeError, ShapeError
from segnet_scratch.lab.proof.compare import same_bits
from segnet_scratch.ops import by_hand
from segnet_scratch.ops.elementwise.relu import ReluForward
from segnet_scratch.ops.normalisation import norm_relu as fused
from segnet_scratch.ops.normalisation.batch_norm import BatchNormBackward, BatchNormTrainingForward
from segnet_scratch.ops.op import spec, spec_of
from segnet_scratch.ops.pieces import MAP_THREADS, TILE_ROWS, piece_of
from segnet_scratch.ops.pooling.max_pool import MaxPoolBackward, MaxPoolForward
from segnet_scratch.ops.pooling.packed_codes import gather_at, pack_codes, packed_codes, scatter_from, unpack_codes
from segnet_scratch.runtime.devices import HostDevice, get_device
from segnet_scratch.runtime.launch import ElementTypes, find_kernel, launch
from segnet_scratch.runtime.precision import BFLOAT16
from segnet_scratch.runtime.resources import compile_all

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
MAPS = [(2, 6, 8, 16), (1, 5, 7, 8), (3, 1, 9, 24), (2, 9, 1, 64), (1, 1, 2, 8), (1, 3, 5, 2056)]

each_map = pytest.mark.parametrize("shape", MAPS, ids=str)


def channels(rng, c, dtype=F32):
    """weight, bias (c): of both signs, and one channel that is switched off."""
    weight, bias = rng.standard_normal((2, c))
    weight[0] = 0
    return {"weight": weight.astype(dtype), "bias": bias.astype(dtype)}


def batch_norm(device, x, weight, bias):
    """y, mean, inv_std by the layers' op."""
    running = {"running_mean": np.zeros_like(weight), "running_var": np.ones_like(weight)}
    return BatchNormTrainingForward.plan(spec_of(x))(device, x=x, weight=weight, bias=bias, **running)


def max_pool(device, x):
    """y, codes by the layers' op."""
    return MaxPoolForward.plan(spec_of(x))(device, x=x)


@needs_compiler
class TestBitsOfTheLayers:
    """Given the same mean and inv_std, the kernels give what batch norm, ReLU and pool give one after the other."""

    @each_map
    @pytest.mark.parametrize("relu", [True, False])
    def test_forward(self, shape, relu):
        device, rng = get_device("host"), np.random.default_rng(0)
        y, norm = rng.standard_normal(shape).astype(F32), channels(rng, shape[3])
        layer = batch_norm(device, y, **norm)
        z = ReluForward.plan(spec_of(y))(device, x=layer.y).y if relu else layer.y
        inputs = {"y": y, "mean": layer.mean, "inv_std": layer.inv_std, **norm}
        assert same_bits(fused.NormReluForward.plan(spec_of(y), relu)(device, **inputs).z, z)
        out, pool = fused.NormReluPoolForward.plan(spec_of(y), relu)(device, **inputs), max_pool(device, z)
        assert same_bits(out.pooled, pool.y)
        assert same_bits(out.codes, pack_codes(pool.codes))

    @each_map
    @pytest.mark.parametrize("relu", [True, False])
    def test_forward_in_bfloat16_pools_what_it_would_have_stored(self, shape, relu):
        """Rounding makes numbers equal that were not: the pool must see them so."""
        device, rng = get_device("host"), np.random.default_rng(1)
        y, norm = rng.standard_normal(shape).astype(BFLOAT16), channels(rng, shape[3])
        layer = batch_norm(device, y.astype(F32), **norm)
        inputs = {"y": y, "mean": layer.mean, "inv_std": layer.inv_std, **norm}
        z = fused.NormReluForward.plan(spec_of(y), relu)(device, **inputs).z
        rectified = np.where(layer.y <= 0, 0, layer.y) if relu else layer.y
        assert same_bits(z, rectified.astype(BFLOAT16))
        out, pool = fused.NormReluPoolForward.plan(spec_of(y), relu)(device, **inputs), max_pool(device, z.astype(F32))
        assert same_bits(out.pooled, pool.y.astype(BFLOAT16))
        assert same_bits(out.codes, pack_codes(pool.codes))
        assert same_bits(out.chosen, by_hand.gather(y, pool.codes))

    @each_map
    @pytest.mark.parametrize("dtype", [F32, BFLOAT16], ids=str)
    def test_backward(self, shape, dtype):
        device, rng = get_device("host"), np.random.default_rng(2)
        y, dr = rng.standard_normal((2, *shape)).astype(dtype)
        norm = channels(rng, shape[3])
        layer = batch_norm(device, y.astype(F32), **norm)
        saved = {"mean": layer.mean, "inv_std": layer.inv_std, "weight": norm["weight"]}
        pool = max_pool(device, layer.y)
        pooled = rng.standard_normal(pool.y.shape).astype(dtype)
        spread = MaxPoolBackward.plan(spec(pooled.shape, F32), shape[1:3])
        scattered = spread(device, dy=pooled.astype(F32), codes=pool.codes).dx
        for gradient in (dr.astype(F32), scattered):
            of_layer = BatchNormBackward.plan(spec(shape, F32), True)(device, x=y.astype(F32), dy=gradient, **saved)
            arrays = {"y": y, **saved, "dweight": of_layer.dweight, "dbias": of_layer.dbias}
            if gradient is scattered:
                codes = pack_codes(pool.codes)
                dy = fused.NormReluPoolBackward.plan(spec_of(y))(device, dr=pooled, codes=codes, **arrays).dy
            else:
                dy = dr.copy()
                fused.NormReluBackward.plan(spec_of(y))(device, dr=dy, **arrays)
            assert same_bits(dy, of_layer.dx.astype(dtype))


@needs_compiler
class TestAnyGrid:
    """More threads than there is work, fewer than a row has pieces, or a number that divides nothing: the same bits."""

    @pytest.mark.parametrize(("grid", "block"), [(1, 1), (1, 3), (2, 96), (5, 17), (300, 256)])
    @pytest.mark.parametrize("dtype", [F32, BFLOAT16], ids=str)
    @pytest.mark.parametrize(
        "op",
        [
            fused.NormReluForward,
            fused.NormReluPoolForward,
            fused.NormReluBackward,
            fused.NormReluPoolBackward,
            fused.NormReluUnpoolForward,
        ],
        ids=lambda op: op.name,
    )
    def test_gives_the_same(self, op, dtype, grid, block, monkeypatch):
        rng, device = np.random.default_rng(3), HostDevice()
        size = ((9, 6),) if "unpool" in op.name else ()
        plan = op(spec((2, 5, 3, 40), dtype), *size)
        inputs = {
            name: rng.integers(0, 256, s.shape).astype(s.dtype)
            if name == "codes"
            else rng.standard_normal(s.shape).astype(s.dtype)
            for name, s in plan.inputs.items()
        }

        def result():
            given = {name: array.copy() for name, array in inputs.items()}
            return {**vars(plan(device, **given)), **{name: given[name] for name in plan.updates}}

        usual = result()
        kernel = plan.kernel
        monkeypatch.setattr(plan, "kernel", lambda device, name, b, *_: kernel(device, name, b, grid, block))
        other = result()
        assert usual.keys() == other.keys() != set()
        assert all(same_bits(usual[name], other[name]) for name in usual)

    def test_channels_that_are_no_pieces_are_left_alone(self):
        """The ops refuse them; a launch by hand writes nothing rather than beside an array."""
        y, z, vector = np.ones((5, 6), F32), np.full((5, 6), 7, F32), np.ones(6, F32)
        given = (y, *[vector] * 4, z, None, 5, 6, 1, 1)
        launch(HostDevice(), "norm_relu_forward", 1, 4, given, ElementTypes.of(F32))
        assert (z == 7).all()


class TestMerges:
    @pytest.mark.parametrize("device", ["numpy", "host"])
    @pytest.mark.parametrize("constant", [True, False])
    def test_tiles_far_from_zero_that_hardly_differ(self, constant, device):
        """Their squares have more digits than a double: E[x^2] - E[x]^2 would be off by more than the variance."""
        tiles, last = 9, TILE_ROWS - 1
        steps = np.random.default_rng(9).integers(0, 1 if constant else 2, (tiles, 8))
        partials = np.zeros((tiles, 2, 8), F32)
        partials[:, 0] = 3e6 + 0.25 * steps  # the smallest step of float32
        rows, vector = TILE_ROWS * (tiles - 1) + last, np.zeros(8, F32)
        plan = fused.NormMergeStatistics.plan(spec_of(partials), rows)
        out = plan(get_device(device), partials=partials, running_mean=vector.copy(), running_var=vector.copy())
        distances = 0.25 * np.repeat(steps, [TILE_ROWS] * (tiles - 1) + [last], axis=0)
        np.testing.assert_array_equal(out.mean, (3e6 + distances.mean(0)).astype(F32))
        np.testing.assert_allclose(out.inv_std, 1 / np.sqrt(distances.var(0) + 1e-5), rtol=1e-6)


class TestPackedCodes:
    def test_packing_is_undone_and_is_that_of_the_definition(self):
        codes = np.random.default_rng(7).integers(0, 4, (2, 3, 5, 24), np.uint8)
        packed = pack_codes(codes)
        assert same_bits(packed, by_hand.packed(codes))
        assert same_bits(unpack_codes(packed), codes)
        assert packed_codes(codes.shape) == spec_of(packed)

    @pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 4), (3, 1)])
    def test_scattering_and_gathering(self, size):
        rng = np.random.default_rng(8)
        map_ = rng.standard_normal((2, *size, 8))
        values, codes = by_hand.pool(map_)
        assert same_bits(gather_at(map_, pack_codes(codes)), values)
        assert same_bits(scatter_from(values, pack_codes(codes), size), by_hand.scatter(values, codes, size))

    def test_codes_that_name_nothing(self):
        """Of a map of one pixel only position 0 exists."""
        values, codes = np.ones((1, 1, 1, 4)), pack_codes(np.arange(4, dtype=np.uint8).reshape(1, 1, 1, 4))
        np.testing.assert_array_equal(scatter_from(values, codes, (1, 1)), [[[[1, 0, 0, 0]]]])
        np.testing.assert_array_equal(gather_at(values, codes), [[[[1, 0, 0, 0]]]])

    def test_channels_that_fill_no_byte(self):
        with pytest.raises(ShapeError, match="packed codes of 6 channels: expected a multiple of 4"):
            packed_codes((1, 2, 3, 6))


class TestPlans:
    @pytest.mark.parametrize(("dtype", "piece"), [(F32, 4), (BFLOAT16, 8)], ids=str)
    def test_channels_are_whole_pieces(self, dtype, piece):
        with pytest.raises(
            ShapeError, match=f"norm_relu_forward: 12 channels|move pieces of {piece} numbers: use a width"
        ):
            fused.NormReluForward(spec((1, 2, 3, piece + piece // 2), dtype))
        assert fused.NormReluForward(spec((1, 2, 3, piece), dtype)).outputs["z"].dtype == dtype

    def test_numbers_of_channels_are_float32_beside_bfloat16(self):
        plan = fused.NormReluBackward(spec((1, 2, 3, 8), BFLOAT16))
        assert {plan.inputs[name].dtype for name in ("mean", "inv_std", "weight", "dweight", "dbias")} == {F32}

    @needs_compiler
    def test_no_kernel_takes_float64(self):
        plan = fused.NormReluForward(spec((1, 2, 3, 8), F64))
        arrays = {name: np.ones(s.shape) for name, s in plan.inputs.items()}
        with pytest.raises(DTypeError, match="norm_relu_forward: cannot be launched for float64"):
            plan(get_device("host"), **arrays)


# Of each kernel: the numbers of a channel, the resident blocks that its launch counts on, and the pieces of maps that a
# thread begins to load before it uses the first.
LOADED = {
    "norm_relu_forward": (4, 3, 4),
    "norm_relu_pool_forward": (4, 3, 4),
    "norm_relu_backward": (5, 2, 8),
    "norm_relu_pool_backward": (5, 2, 5),
    "norm_relu_unpool_forward": (4, 3, 1),
}


@needs_disassembler
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_120"])
@pytest.mark.parametrize("element", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", LOADED)
def test_enough_is_under_way_to_keep_the_memory_busy(kernel, element, architecture):
    """Maps move 16 bytes at once, several before the first is used, and the registers leave room for enough threads."""
    channel_numbers, resident, loads = LOADED[kernel]
    piece = piece_of(ElementTypes.named(element).storage)
    code = instructions_of(kernel, element, architecture)
    names = Counter(name for name, _ in code)
    stored = {name for name in names if name.startswith("STG")}
    codes = f"E.{'U8' if element == 'float32' else 'U16'}"
    planes = {"STG.E.64"} if element == "float32" else set()
    assert stored == {"STG.E.128"} | planes | ({f"STG.{codes}"} if kernel == "norm_relu_pool_forward" else set())
    assert not {n for n in names if n.startswith("LDG") and ".128" not in n and codes not in n}
    # The numbers of the channels are loaded once; but for sm_120, in rows while the first pieces are in flight.
    of_channels = channel_numbers * piece // 4
    assert sum(name.startswith("LDG.E.128") for name, _ in code) == of_channels + loads
    if kernel in ("norm_relu_forward", "norm_relu_backward") and architecture != "sm_120":
        loads += of_channels
    else:
        of_numbers = [i for i, (name, _) in enumerate(code) if name == "LDG.E.128"][:of_channels]
        code = [instruction for i, instruction in enumerate(code) if i not in of_numbers]
    assert loads_before_a_use(code, "LDG.E.128") >= loads
    (compiled,) = compile_all([find_kernel(kernel).source], [architecture], [element])
    (registers,) = (usage.registers for usage in compiled.usages if usage.kernel == kernel)
    assert registers <= 65536 // (resident * MAP_THREADS)
    assert not any(name.startswith(("LDL", "STL")) for name in names), "local memory"
