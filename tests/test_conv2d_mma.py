"""Convolutions on tensor cores, beyond what the templates over the op table check: plans, accuracy, GPUs that are too
old, the kernels under AddressSanitizer. Faults put into them: test_mutants.py.
"""

import sys

import numpy as np
import pytest
from support import FULL
from support.fake_cupy import FakeCupy
from support.kernels import needs_compiler, python

from segnet_scratch.errors import CompileError, ConfigError, DTypeError, ShapeError
from segnet_scratch.lab.proof.parts import PARTS, accuracy
from segnet_scratch.lab.proof.table import ROWS
from segnet_scratch.lab.proof.work import QUICK
from segnet_scratch.nn.autograd import Tensor
from segnet_scratch.nn.functions import conv2d
from segnet_scratch.ops.convolution import conv2d_mma as mma
from segnet_scratch.ops.convolution.conv2d import Conv2dBackwardWeight, Conv2dForward, _tell_fallback, choose_rung
from segnet_scratch.ops.convolution.conv2d_geometry import Geometry
from segnet_scratch.ops.op import Buffers, spec
from segnet_scratch.runtime import host, nvrtc
from segnet_scratch.runtime.devices import CudaDevice, get_device
from segnet_scratch.runtime.launch import ElementTypes, find_kernel
from segnet_scratch.runtime.precision import BFLOAT16

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)


def geometry(n=1, h=8, w=8, c=64, o=64, kernel=3, stride=1, padding=1):
    return Geometry.of((n, h, w, c), (o, kernel, kernel, c), stride, padding)


class TestPlan:
    @pytest.mark.parametrize(
        ("c", "o", "rung", "forward", "weight"),
        [
            (64, 512, "tf32", mma.WIDE, mma.WIDE),
            (64, 512, "tf32x3", mma.MEDIUM, mma.WIDE),
            (64, 64, "bf16", mma.MEDIUM, mma.MEDIUM),
            (64, 33, "tf32", mma.MEDIUM, mma.WEIGHT_ELEMENTS),
            (64, 21, "tf32x3", mma.NARROW, mma.WEIGHT_ELEMENTS),  # the classifier
            (3, 64, "tf32", mma.ELEMENTS, mma.WEIGHT_ELEMENTS),  # the first layer
            (4, 64, "tf32x3", mma.MEDIUM, mma.MEDIUM),
            (4, 64, "bf16", mma.ELEMENTS, mma.WEIGHT_ELEMENTS),  # half a piece of bfloat16
        ],
    )
    def test_tiles(self, c, o, rung, forward, weight):
        g = geometry(c=c, o=o)
        assert mma.forward_tile(g, rung) is forward
        assert mma.weight_tile(g, rung) is weight

    def test_tiles_fit_into_the_gpus_with_the_least_shared_memory(self):
        for tile in (mma.WIDE, mma.MEDIUM, mma.NARROW, mma.ELEMENTS, mma.WEIGHT_ELEMENTS):
            assert tile.shared <= 98 * 1024  # of 99 KiB on sm_86, sm_89, sm_120; the rest is static

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"stride": 2}, "takes stride 1, not 2"),
            ({"kernel": 16, "padding": 8}, "takes kernels up to 15x15, not 16x16"),
            ({"h": 30_000, "w": 30_000, "c": 8}, "less than 2^31 elements in the images of one block"),
            ({"h": 20_000, "w": 20_000, "o": 8, "c": 1}, "less than 2^31 elements in the images of one block"),
        ],
    )
    def test_what_is_refused(self, change, reason):
        g = geometry(**change)
        assert reason in mma.unsupported_reason(g)
        with pytest.raises(ShapeError, match=r"rung 'tf32' takes .*; use '(tiled|direct)'"):
            choose_rung(g, F32, "tf32")

    def test_rungs_and_element_types(self):
        g = geometry()
        assert mma.unsupported_reason(g) is None
        assert [choose_rung(g, dtype, None) for dtype in (F32, F64, BFLOAT16)] == ["tiled", "tiled", "bf16"]
        assert choose_rung(geometry(kernel=17, padding=8, h=20, w=20), BFLOAT16, None) == "tiled"
        for rung, dtype in (("tf32", F64), ("tf32x3", BFLOAT16), ("bf16", F32)):
            with pytest.raises(DTypeError, match=rf"rung '{rung}' takes .*, not {dtype}; convert it, or use 'tiled'"):
                choose_rung(g, dtype, rung)
        with pytest.raises(DTypeError, match="rung 'direct' takes float32 and float64, not bfloat16"):
            choose_rung(g, BFLOAT16, "direct")

    def test_sums_of_bfloat16_are_float32(self):
        x, weight = spec((1, 8, 8, 64), BFLOAT16), spec((64, 3, 3, 64), BFLOAT16)
        forward, backward = Conv2dForward(x, weight, 1, 1), Conv2dBackwardWeight(x, weight, 1, 1)
        assert (forward.inputs["bias"].dtype, forward.outputs["y"].dtype) == (F32, BFLOAT16)
        assert (backward.outputs["dweight"].dtype, backward.workspace["partials"].dtype) == (F32, F32)

    def test_chunks_cover_the_pixels_whatever_the_tile(self):
        for pixels in (1, 2048, 2049, 100_000, 10**7):
            for rows, columns in ((128, 64), (128, 128)):
                chunks = mma.chunks_of(geometry(h=1, w=pixels, kernel=1, padding=0), rows, columns)
                assert (chunks.count - 1) * chunks.each < pixels <= chunks.count * chunks.each
                assert chunks.count <= mma.WANTED_BLOCKS


@needs_compiler
@pytest.mark.parametrize("outputs", [5, 8])  # results in groups of 16 bytes, or not
@pytest.mark.parametrize("chunks", [1, 3, 31, 32, 45])
def test_partial_results_are_added_in_their_order(chunks, outputs):
    """Many chunks by lanes, every 8th each, whose sums are added in their order: float32 to the bit."""
    rng = np.random.default_rng(chunks)
    x, weight = spec((1, 1, 64, 3), F32), spec((outputs, 3, 3, 3), F32)
    partials, dweight = rng.standard_normal((chunks, *weight.shape)).astype(F32), np.empty(weight.shape, F32)
    arrays = Buffers(partials=partials, dweight=dweight)
    Conv2dBackwardWeight.plan(x, weight, 1, 1, "tf32").launch_merge(get_device("host"), arrays)
    lanes = 8 if chunks >= 32 else 1
    of_lanes = []
    for lane in range(lanes):
        own = np.zeros(weight.shape, F32)
        for part in partials[lane::lanes]:
            own += part
        of_lanes.append(own)
    expected = of_lanes[0]
    for own in of_lanes[1:]:
        expected = expected + own
    np.testing.assert_array_equal(dweight, expected)


@needs_compiler
class TestAccuracy:
    """Errors relative to the root mean square of y at SegNet's longest sum, K = 4608, on the host device."""

    def error(self, rung, dtype=F32):
        rng = np.random.default_rng(0)
        x, weight = rng.standard_normal((1, 4, 4, 512)), rng.standard_normal((16, 3, 3, 512))
        op = Conv2dForward.plan(spec(x.shape, dtype), spec(weight.shape, dtype), 1, 1, rung)
        y = op(get_device("host"), x=x.astype(dtype), weight=weight.astype(dtype), bias=None).y.astype(F64)
        exact = Conv2dForward.plan(spec(x.shape, F64), spec(weight.shape, F64), 1, 1, "direct")
        seen = [a.astype(F32).astype(F64) for a in (x, weight)]
        expected = exact(get_device("numpy"), x=seen[0], weight=seen[1], bias=None).y
        return float(np.sqrt(((y - expected) ** 2).mean() / (expected**2).mean()))

    def test_of_each_rung(self):
        tiled, tf32, tf32x3 = (self.error(rung) for rung in ("tiled", "tf32", "tf32x3"))
        bf16 = self.error("bf16", BFLOAT16)
        assert 1e-8 < tiled < 1e-6
        assert tf32x3 < 0.5 * tiled, "tensor cores add 16 terms at a time, multiply-adds one"
        assert 1e-4 < tf32 < 1e-3
        assert 1e-3 < bf16 < 1e-2

    def test_the_proof_finds_what_errs_more_than_it_may(self, monkeypatch):
        monkeypatch.setattr(accuracy, "DEPTHS", (576,))
        (work,) = PARTS["accuracy"].works("host", QUICK, 0)
        tally = PARTS["accuracy"].do(work)
        assert not tally.failures
        assert "tiled fprop 1" in tally.notes, "the tiled kernels are such chains"
        monkeypatch.setattr(accuracy, "LIMIT", 0.1)
        messages = [failure.message for failure in PARTS["accuracy"].do(work).failures]
        assert len(messages) == 8
        assert all("times as much as a chain; expected at most 0.1" in message for message in messages)


class TestOnGpus:
    def run(self, capability, monkeypatch, folder, rung, dtype=F32, backward=True):
        cupy = FakeCupy(capability=capability, dry=True).install(monkeypatch, folder)
        device = CudaDevice()
        x = Tensor(device.zeros((2, 8, 8, 64), dtype), device, requires_grad=True)
        weight = Tensor(device.zeros((128, 3, 3, 64), dtype), device, requires_grad=True)
        y = conv2d(x, weight, padding=1, rung=rung)
        if backward:
            y.backward(device.zeros(y.shape, dtype))
        return cupy

    @pytest.mark.parametrize(("rung", "threads"), [("tf32", 128), ("tf32x3", 256)])
    def test_threads_and_shared_memory_are_asked_for(self, rung, threads, monkeypatch, tmp_path):
        cupy = self.run("86", monkeypatch, tmp_path, rung)
        launches = {launched.name: launched for launched in cupy.launches}
        fprop = "conv2d_forward_mma_128x128" if rung == "tf32" else "conv2d_forward_mma_128x64"
        assert {
            fprop,
            "conv2d_forward_mma_128x64",  # dgrad: 64 results for each pixel
            "conv2d_backward_weight_mma_128x128",
            "conv2d_backward_weight_merge",
            "conv2d_flip_weight",
        } <= set(launches)
        wide = launches["conv2d_backward_weight_mma_128x128"]
        assert (wide.grid, wide.block, wide.shared) == ((5, 1, 1), (threads, 1, 1), 3 * 256 * 128)
        assert {launched.cubin.types.name for launched in cupy.launches if "mma" in launched.name} == {rung}

    @pytest.mark.parametrize(
        ("capability", "setting", "kernel"),
        [
            ("80", "", "conv2d_forward_mma_128x64"),
            ("80", "0", "conv2d_forward_mma_128x64"),
            ("80", "1", "conv2d_forward_tiled"),
            ("75", "", "conv2d_forward_tiled"),
        ],
    )
    def test_float32_takes_tensor_cores(self, capability, setting, kernel, monkeypatch, tmp_path, caplog):
        monkeypatch.setenv("SEGNET_FMA", setting)
        cupy = self.run(capability, monkeypatch, tmp_path, None, backward=False)
        assert [launched.name for launched in cupy.launches] == [kernel]
        assert not caplog.records

    def test_an_unknown_setting_is_refused(self, monkeypatch, tmp_path):
        monkeypatch.setenv("SEGNET_FMA", "yes")
        with pytest.raises(ConfigError, match="SEGNET_FMA is 'yes'; expected 1"):
            self.run("80", monkeypatch, tmp_path, None)

    def test_bfloat16(self, monkeypatch, tmp_path):
        cupy = self.run("90", monkeypatch, tmp_path, None, BFLOAT16, backward=False)
        assert [(launched.name, launched.cubin.types.name) for launched in cupy.launches] == [
            ("conv2d_forward_mma_128x128", "bf16")
        ]

    @pytest.mark.parametrize(("rung", "dtype"), [("tf32", F32), ("tf32x3", F32), ("bf16", BFLOAT16), (None, BFLOAT16)])
    def test_a_gpu_without_them_takes_the_tiled_rung_and_says_so(self, rung, dtype, monkeypatch, tmp_path, caplog):
        _tell_fallback.cache_clear()
        cupy = self.run("75", monkeypatch, tmp_path, rung, dtype, backward=False)
        assert [launched.name for launched in cupy.launches] == ["conv2d_forward_tiled"]
        (record,) = caplog.records
        assert record.getMessage() == (
            f"conv2d: rung '{rung or 'bf16'}' needs sm_80 or newer, this GPU is sm_75; rung 'tiled' is used"
        )

    def test_an_old_gpu_is_named_before_nvrtc_is_asked(self):
        with pytest.raises(CompileError, match=r"conv2d_mma.cu needs a newer GPU than sm_75; .*use rung 'tiled'"):
            nvrtc.compile_cubin(find_kernel("conv2d_forward_mma_128x64").source, ElementTypes.named("tf32"), "sm_75")


SANITIZED = """
from segnet_scratch.runtime.devices import HostDevice
from segnet_scratch.runtime.host import HostOptions
from segnet_scratch.lab.proof.table import ROWS

device = HostDevice(HostOptions(sanitize=True))
(row,) = (row for row in ROWS if row.name == ROW)
for index, case in enumerate(row.cases()):
    op = row.plan(case, row.elements[0])
    op(device, **row.inputs(op, case, row.generator(0, index)))
print("clean")
"""


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="kernels can be sanitized on Linux only")
@pytest.mark.skipif(not FULL, reason="four minutes in all; SEGNET_TEST_FULL=1 runs it")
@pytest.mark.parametrize("row", [row.name for row in ROWS if row.name.endswith(("_tf32", "_tf32x3", "_bf16"))])
def test_under_the_sanitizers(row):
    """Arrays are allocations of their own here, so that reads outside of them show, too."""
    library = str(host.sanitizer_runtime())
    options = "detect_leaks=0:detect_stack_use_after_return=0:verify_asan_link_order=0"
    result = python(f"ROW = {row!r}\n{SANITIZED}", LD_PRELOAD=library, ASAN_OPTIONS=options)
    assert result.stdout == "clean\n", result.stderr[:5000]
    assert "runtime error" not in result.stderr
