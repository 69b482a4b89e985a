"""Hopper's instructions on the host device: each against a plain reference, and what goes wrong silently on a GPU.

Swizzles, descriptors, boxes and im2col are written down here a second time, from NVIDIA's PTX ISA and from what was
measured on an H200 (a matrix may begin at any row of an atom: pieces are exchanged by the bits of the final address).
"""

import os
import re
from types import SimpleNamespace

import numpy as np
import pytest
from support import TESTS, kernels, raises
from support.fake_cupy import has_nvrtc
from support.tensor_core import multiply_add

from segnet_scratch.errors import CompileError, DTypeError, KernelFault, LaunchError, ShapeError
from segnet_scratch.lab.proof.parts.gate import MISUSES
from segnet_scratch.runtime import host, nvrtc
from segnet_scratch.runtime.devices import CudaDevice, HostDevice
from segnet_scratch.runtime.launch import ElementTypes, launch
from segnet_scratch.runtime.occupancy import ARCHITECTURES
from segnet_scratch.runtime.precision import BFLOAT16
from segnet_scratch.runtime.resources import compile_all
from segnet_scratch.runtime.tensor_map import Im2col, TensorMap

pytestmark = kernels.needs_compiler

BF16 = ElementTypes.named("bf16")
FULL = bool(os.environ.get("SEGNET_TEST_FULL"))
IMAGE = 48 * 1024  # bytes of shared memory that products read
ORDERS = [{"order": "ascending"}, {"order": "descending"}, {"order": "shuffled", "seed": 3}]
each_order = pytest.mark.parametrize("options", ORDERS, ids=str)


def random_bf16(rng, shape):
    return rng.standard_normal(shape).astype(BFLOAT16)


def exchanged(address):
    """The final address of a byte: of 128 bytes, bits 4 to 6 are combined with bits 7 to 9."""
    return address ^ address // 128 % 8 * 16


def operand(image, start, leading, stride, mn_major, count):
    """(count, 16): what a descriptor says that shared memory holds, number by number."""
    row, k = np.meshgrid(np.arange(count), np.arange(16), indexing="ij")
    if mn_major:
        address = start + row // 64 * leading + k // 8 * stride + k % 8 * 128 + row % 64 * 2
    else:
        address = start + row // 8 * stride + row % 8 * 128 + k * 2
    return image[exchanged(address) // 2].astype(np.float32)


def reach(leading, stride, mn_major, count):
    """Bytes from the start of an operand to its end, as if nothing were exchanged."""
    if mn_major:
        return (count - 1) // 64 * leading + stride + 1024
    return (count // 8 - 1) * stride + 1024


def random_descriptor(rng, mn_major, count):
    """(start, leading, stride) that stay within the image."""
    while True:
        stride = int(rng.choice([1024, 1280, 2048, 128 * rng.integers(1, 20), 16 * rng.integers(1, 64)]))
        leading = int(rng.choice([128, 1024, 8192, 16 * rng.integers(1, 200)])) if mn_major else 16
        start = int(rng.integers(0, 1024)) * 16
        if not mn_major:
            start = start // 128 * 128 + int(rng.integers(0, 4)) * 32  # 16 of depth lie within a row
        if mn_major:
            start = start // 128 * 128
            stride, leading = stride // 128 * 128 or 128, leading // 128 * 128 or 128
        if start + reach(leading, stride, mn_major, count) <= IMAGE - 1024:
            return start, leading, stride


@each_order
@pytest.mark.parametrize(("a_mn", "b_mn"), [(False, False), (False, True), (True, False), (True, True)])
def test_products_of_random_descriptors(a_mn, b_mn, options):
    rng = np.random.default_rng([a_mn, b_mn, len(options)])
    image = random_bf16(rng, IMAGE // 2)
    cases = 10
    for n in (32, 64, 128, 192):
        numbers = np.array(
            [random_descriptor(rng, a_mn, 64) + random_descriptor(rng, b_mn, n) for _ in range(cases)], np.int32
        )
        accumulate = rng.integers(0, 2, cases).astype(np.int32)
        sums = rng.standard_normal((cases, 64, n)).astype(np.float32)
        sums[accumulate == 0] = np.nan  # nobody may look at them
        expected = np.where(accumulate[:, None, None], sums, np.float32(0))
        for case in range(cases):
            a = operand(image, *numbers[case, :3], a_mn, 64)
            b = operand(image, *numbers[case, 3:], b_mn, n)
            expected[case] = multiply_add(a, b.T, expected[case])
        name = f"products_{'km'[a_mn]}{'km'[b_mn]}"
        kernels.run(
            *(name, image.view(np.uint8), numbers, accumulate, sums, cases, IMAGE, n),
            block=128, shared=IMAGE + 1024, types=BF16, **options,
        )  # fmt: skip
        np.testing.assert_array_equal(sums, expected)


def box_numbers(array, corner, box):
    """The numbers of a box in the array's order of dimensions; 0 outside."""
    indices = [c + np.arange(n) for c, n in zip(corner, box, strict=True)]
    places = np.meshgrid(*indices, indexing="ij")
    inside = np.all([(i >= 0) & (i < n) for i, n in zip(places, array.shape, strict=True)], axis=0)
    found = array[tuple(np.clip(i, 0, n - 1) for i, n in zip(places, array.shape, strict=True))]
    return np.where(inside, found, found.dtype.type(0))


def in_shared_memory(numbers, place):
    """The bytes of a box from `place` on, a multiple of 128."""
    flat = np.ascontiguousarray(numbers).view(np.uint8).reshape(-1)
    image = np.empty_like(flat)
    at = np.arange(flat.size)
    image[exchanged(place + at) - place] = flat
    return image


def random_map(rng, rank):
    """(array, box), legal."""
    while True:
        inner = int(rng.integers(1, 9)) * 8
        shape = (*rng.integers(1, 12, rank - 1), int(rng.integers(1, 12)) * 8)
        box = (*(int(n) for n in rng.integers(1, 9, rank - 1)), inner)
        numbers = np.prod(box)
        if numbers * 2 % 128 == 0 and numbers <= 8192:
            return random_bf16(rng, shape), box


def random_corners(rng, shape, box, cases):
    """Innermost first, some far outside."""
    corners = [[rng.integers(-n - 2, m + 3) for m, n in zip(shape, box, strict=True)] for _ in range(cases)]
    return np.array(corners, np.int32)


@each_order
@pytest.mark.parametrize("rank", [2, 3, 4])
def test_boxes(rank, options):
    rng = np.random.default_rng([rank, len(options)])
    cases = 7
    for _ in range(10):
        array, box = random_map(rng, rank)
        corners = random_corners(rng, array.shape, box, cases)
        described = TensorMap(array, box)
        place = int(rng.integers(0, 8)) * 128
        out = np.full((cases, described.nbytes), 0xA5, np.uint8)
        arguments = (np.ascontiguousarray(corners[:, ::-1]), out, cases, described.nbytes, place)
        shared = described.nbytes + 2048
        kernels.run(f"loads_{rank}d", described, *arguments, block=64, shared=shared, types=BF16, **options)
        for got, corner in zip(out, corners, strict=True):
            np.testing.assert_array_equal(got, in_shared_memory(box_numbers(array, corner, box), place))


@each_order
def test_im2col(options):
    rng = np.random.default_rng(len(options))
    cases = 6
    for kernel in (1, 3, 5, 7):
        n, h, w = (int(v) for v in rng.integers(1, 12, 3))
        h, w = h + kernel, w + kernel
        x = random_bf16(rng, (n, h, w, 16))
        pad = int(rng.integers(0, kernel))
        lower, upper = (-pad, -pad), (pad - kernel + 1,) * 2
        pixels = int(rng.integers(1, 33)) * 4
        described = TensorMap(x, (pixels, 16), Im2col(lower, upper))
        # Where the filter's first tap stands, image by image.
        walk = [
            (image, row, column)
            for image in range(n + 300)
            for row in range(lower[0], h + upper[0])
            for column in range(lower[1], w + upper[1])
        ]
        corners, expected = [], []
        for _ in range(cases):
            start = int(rng.integers(0, n * len(walk) // (n + 300)))
            tap = tuple(int(t) for t in rng.integers(0, kernel, 2))  # (y, x)
            image, row, column = walk[start]
            channel = int(rng.integers(-1, 2)) * 8
            corners.append((channel, column, row, image, tap[1], tap[0]))
            rows = [
                box_numbers(x, (i, r + tap[0], c + tap[1], channel), (1, 1, 1, 16))
                for i, r, c in walk[start : start + pixels]
            ]
            expected.append(in_shared_memory(np.stack(rows), 0))
        out = np.full((cases, described.nbytes), 0xA5, np.uint8)
        arguments = (np.array(corners, np.int32), out, cases, described.nbytes, 0)
        kernels.run(
            "loads_im2col", described, *arguments, block=32, shared=described.nbytes + 1024, types=BF16, **options
        )
        np.testing.assert_array_equal(out, np.stack(expected))


@pytest.mark.parametrize("options", [*ORDERS, *({"order": "shuffled", "seed": s} for s in range(4, 12))], ids=str)
def test_a_ring(options):
    """A producer and consumers, as convolutions have them."""
    rng = np.random.default_rng(0)
    depth = 64 * 8
    a, b = random_bf16(rng, (128, depth)), random_bf16(rng, (64, depth))
    c = np.zeros((128, 64), BFLOAT16)
    maps = TensorMap(a, (128, 64)), TensorMap(b, (64, 64))
    kernels.run("ring", *maps, c, depth, block=384, shared=3 * 24576 + 1024, types=BF16, **options)
    expected = np.zeros((128, 64), np.float32)
    for k in range(depth):
        expected += a[:, k, None].astype(np.float32) * b[None, :, k].astype(np.float32)
    np.testing.assert_array_equal(c.view(np.uint16), expected.astype(BFLOAT16).view(np.uint16))


@pytest.mark.skipif(not has_nvrtc(), reason="there is no NVRTC")
class TestOnTheGpu:
    """As far as the compiler goes. The source is for sm_90a alone, which is what an sm_90 gets."""

    sources = tuple(kernels.written_kernel(name).source for name in ("ring", "products_kk"))

    def test_it_compiles_for_sm_90a_alone(self):
        assert [a for a in ARCHITECTURES if self.sources[0].compiles_for(a)] == ["sm_90"]
        with pytest.raises(CompileError, match=r"hopper_ring.cu is for sm_90a only, not for sm_100; .*'tiled'"):
            nvrtc.compile_cubin(self.sources[0], BF16, "sm_100")

    def test_nothing_is_serialised_or_spilt(self):
        for compilation in compile_all(self.sources):
            assert compilation.architecture == "sm_90"
            assert compilation.remarks == ()
            assert {(u.spill_stores, u.stack, u.architecture) for u in compilation.usages} == {(0, 0, "sm_90")}

    def test_headers_refuse_other_architectures(self, tmp_path):
        (kernel,) = kernels.parse(tmp_path, '#include "common/wgmma.cuh"\nextern "C" __global__ void f(int n) {}')
        with pytest.raises(CompileError, match="these instructions exist on sm_90a alone"):
            nvrtc.compile_cubin(kernel.source, BF16, "sm_90")


FAULTS_FILE = "hopper_faults.cu"
# What the message says, by the name of the fault in tests/kernels/hopper_faults.cu.
FAULTS = {
    "an endless wait: nobody arrives": "endless wait: .* in mbarrier_wait .*r\\[0\\]: phase 0 has 0 of 1 arrivals",
    "an endless wait: the parity is that of the next phase": "endless wait: .*parity 1 of barrier\\[0\\]: phase 1 ",
    "an endless wait: more bytes are announced than copied": "endless wait: .* 1 of 1 arrivals and lacks 16 bytes",
    "more bytes are copied than announced": "tma_load brings 16 bytes more than were announced",
    "more arrivals than announced": "comes after the 1 arrivals of the phase, of which 8192 bytes",
    "a phase is missed: the ring went on without this thread": "misses a phase: 2 were completed",
    "an mbarrier that is not initialised": "an mbarrier that is not initialised",
    "an mbarrier without the fence after its initialisation": "without mbarrier_init_fence",
    "an mbarrier over which something was stored": "over which something else was written",
    "TMA overwrites a place that a product still reads": "overwrites a place which a product still reads",
    "threads overwrite a place that a product still reads": "wgmma reads shared array 'raw' at byte .* stored without",
    "threads overwrite and fence a place that a product still reads": "overwritten at byte .*a product still reads",
    "accumulators read before the wait": "access to accumulators before a wgmma_wait",
    "accumulators read while the youngest group is in flight": "access to accumulators before a wgmma_wait",
    "accumulators changed without wgmma_fence": "accessed without a wgmma_fence",
    "a product reads what threads stored without fence_proxy_async": "wgmma reads .* without fence_proxy_async",
    "only the first thread fences, before the others have stored": "wgmma reads .* without fence_proxy_async",
    "a product reads a place before its mbarrier says that it is full": "a copy is still in flight",
    "threads store to a place to which a copy is in flight": "a place that threads wrote in the meantime",
    "a box at a misaligned place": "no multiple of 128",
    "a box that does not fit into its array": "a box of 8192 bytes, which passes the end of shared array 'raw'",
    "coordinates of another rank than the map's": "has 3 coordinates; its map has 2 dimensions",
    "im2col begins outside of its pixels": "begins at x = 8, outside the pixels of its map, -1 to 6",
    "a map of im2col for a box": "has a map of im2col",
    "a matrix that begins at no multiple of 16 bytes": "no multiple of 16",
    "a stride that is no multiple of 16 bytes": "a distance of 1032 bytes",
    "a matrix that passes the end of its array": "an operand b that passes the end of shared array 'raw'",
    "a swizzle that these kernels do not use": "an operand a with swizzle mode 2",
    "an incomplete warpgroup": "96 of its 128 threads are in wgmma_wait",
    "threads of a warpgroup name unlike operands": "wgmma differs from what another thread",
    "a product that nobody waits for": "the end of accumulators comes before a wgmma_wait",
    "a load that nobody waits for": "in flight when the block ends",
    "more registers than the block has": "endless wait: .*setmaxnreg_increase",
    "an increase to fewer registers": "setmaxnreg_increase to 40, but the warpgroup has 256",
    "a named barrier for unlike numbers of threads": "is for 128 threads, but others came to barrier 1 for 256",
    "a named barrier that one thread does not reach": "endless wait: .*named_barrier_sync",
    "the barrier of __syncthreads by name": "names barrier 0",
}


def fault_cases():
    """(number, name, line marked "here") of each case of the file."""
    cases = []
    for number, text in enumerate((TESTS / "kernels" / FAULTS_FILE).read_text().splitlines(), 1):
        if found := re.search(r"case (\d+):  // (.+)", text):
            cases.append([int(found[1]), found[2], 0])
        elif text.endswith("// here"):
            cases[-1][2] = number
    return cases


def scene():
    tile = TensorMap(np.zeros((64, 64), BFLOAT16), (64, 64))
    row = TensorMap(np.zeros((1, 8, 8, 64), BFLOAT16), (64, 64), im2col=Im2col((-1, -1), (-1, -1)))
    return tile, row


class TestFaults:
    def test_every_fault_has_a_message(self):
        assert [name for _, name, _ in fault_cases()] == list(FAULTS)

    @pytest.mark.parametrize(("number", "name", "line"), fault_cases(), ids=[name for _, name, _ in fault_cases()])
    def test_is_named_with_its_line(self, number, name, line):
        out = np.zeros(256, np.float32)
        threads = 384 if "registers than" in name else 256
        with raises(KernelFault, f"line {line}", match=f"hopper_faults: .*{FAULTS[name]}"):
            kernels.run("hopper_faults", *scene(), out, number, block=threads, shared=4 * 8192 + 1024, types=BF16)

    def test_none_of_it_is_none(self):
        kernels.run(
            "hopper_faults", *scene(), np.zeros(256, np.float32), 99, block=256, shared=4 * 8192 + 1024, types=BF16
        )

    def test_an_ordinary_load_finds_nan_where_a_copy_is_under_way(self):
        out = np.zeros(1, np.float32)
        kernels.run("hopper_early_load", scene()[0], out, block=32, shared=8192 + 1024, types=BF16)
        assert np.isnan(out[0])


class TestMaps:
    """TensorMap, the gate's checks of one, and what reaches the driver of a GPU."""

    @pytest.mark.parametrize(
        ("shape", "dtype", "arguments", "error", "message"),
        [
            ((64,), BFLOAT16, {"box": (64,)}, ShapeError, "expected 2 to 4 dimensions"),
            ((1, 2, 3, 4, 8), BFLOAT16, {"box": (1, 1, 1, 1, 8)}, ShapeError, "expected 2 to 4 dimensions"),
            ((8, 64), np.int64, {"box": (8, 8)}, DTypeError, "element type int64"),
            ((8, 63), BFLOAT16, {"box": (8, 8)}, ShapeError, "rows of 126 bytes; expected a multiple of 16; pad"),
            ((8, 64), BFLOAT16, {"box": (8,)}, ShapeError, "a size for each dimension"),
            ((8, 64), BFLOAT16, {"box": (0, 64)}, ShapeError, "at least 1"),
            ((8, 64), BFLOAT16, {"box": (257, 64)}, ShapeError, "at most"),
            ((8, 128), BFLOAT16, {"box": (8, 72)}, ShapeError, "rows of 144 bytes; .* at most the swizzle's 128"),
            ((8, 128), BFLOAT16, {"box": (8, 12)}, ShapeError, "rows of 24 bytes; expected a multiple of 16"),
            ((8, 8, 64), BFLOAT16, {"box": (8, 64), "im2col": Im2col((0, 0), (0, 0))}, ShapeError, "4 .n, h, w, c."),
            ((1, 8, 8, 64), BFLOAT16, {"box": (8, 8, 64), "im2col": Im2col((0, 0), (0, 0))}, ShapeError, "pixels"),
            ((1, 8, 8, 64), BFLOAT16, {"box": (8, 64), "im2col": Im2col((0, 0), (-8, 0))}, ShapeError, "no pixel"),
            ((1, 8, 8, 64), BFLOAT16, {"box": (8, 64), "im2col": Im2col((0, -129), (0, 0))}, ShapeError, "-128"),
        ],
    )
    def test_what_the_hardware_does_not_take(self, shape, dtype, arguments, error, message):
        with pytest.raises(error, match=message):
            TensorMap(np.zeros(shape, dtype), **arguments)

    def test_a_size_beyond_32_bits_is_refused(self):
        large = SimpleNamespace(shape=(2**32, 64), itemsize=2, dtype=BFLOAT16, flags=SimpleNamespace(c_contiguous=True))
        with pytest.raises(ShapeError, match=r"sizes from 1 to 2\^32 - 1"):
            TensorMap(large, (8, 64))

    def test_a_view_is_refused(self):
        with pytest.raises(LaunchError, match="C-contiguous"):
            TensorMap(np.zeros((8, 128), BFLOAT16)[:, ::2], (8, 64))

    @pytest.mark.parametrize("kind", MISUSES)
    def test_misuse_meets_a_named_error(self, kind):
        for name in ("loads_2d", "loads_4d"):
            for call, error, named in MISUSES[kind](kernels.valid_call(kernels.written_kernel(name), BF16)):
                with pytest.raises(error, match=re.escape(named)):
                    call.launch(kernels.DryDevice())

    def test_a_kernel_says_what_its_maps_are_of(self, tmp_path):
        text = '#include "common/tma.cuh"\n// Element types: bf16; sm_90a only.\nextern "C" __global__ void f(%s) {}'
        right = "const __grid_constant__ TensorMap x,  // of (n, 8)\nint n"
        (kernel,) = kernels.parse(tmp_path, text % right)
        assert kernel.cooperative
        assert kernel.signature == "f(TensorMap x, int n)"
        with pytest.raises(ShapeError, match=r"x describes an array of shape \(4, 8\); expected \(3, 8\), \(n, 8\)"):
            launch(kernels.DryDevice(), kernel, 1, 1, (TensorMap(np.zeros((4, 8), BFLOAT16), (4, 8)), 3), BF16)
        for wrong in ("TensorMap x", "const TensorMap x", "const __grid_constant__ TensorMap* x"):
            with pytest.raises(CompileError, match="is passed as 'const __grid_constant__ TensorMap x'"):
                _ = kernels.parse(tmp_path, text % wrong)[0].parameters

    def test_the_driver_is_told_the_same(self, cupy):
        """The stand-in for the driver makes the host device's maps of what it is told."""
        rng = np.random.default_rng(0)
        x = random_bf16(rng, (2, 9, 7, 16))
        tile = {"box": (1, 4, 4, 16)}
        column = {"box": (12, 16), "im2col": Im2col((-1, -2), (-1, 0))}
        for name, map_of, corners in (
            ("loads_4d", tile, [[-8, 3, -1, 1], [0, 0, 0, 0]]),
            ("loads_im2col", column, [[0, -2, 7, 0, 1, 2], [8, 3, 4, 1, 0, 0]]),
        ):
            outs = []
            for device in (HostDevice(), CudaDevice()):
                described = TensorMap(device.upload(x), **map_of)
                out = device.zeros((2, described.nbytes), np.uint8)
                arguments = (described, device.upload(np.array(corners, np.int32)), out, 2, described.nbytes, 0)
                shared = described.nbytes + 1024
                launch(device, kernels.written_kernel(name), 1, 32, arguments, BF16, shared)
                outs.append(device.download(out))
            np.testing.assert_array_equal(*outs)
            assert outs[0].any()


@kernels.needs_sanitizers
@pytest.mark.skipif(not FULL, reason="half a minute of compilation: SEGNET_TEST_FULL=1")
def test_sanitizers_name_the_line_of_an_early_load():
    code = """
        import numpy as np
        from support.kernels import run
        from test_hopper import BF16, scene, test_a_ring
        test_a_ring({"sanitize": True})
        print("clean", flush=True)
        out = np.zeros(1, np.float32)
        run("hopper_early_load", scene()[0], out, block=32, shared=8192 + 1024, types=BF16, sanitize=True)
    """
    options = "detect_leaks=0:detect_stack_use_after_return=0:verify_asan_link_order=0"
    result = kernels.python(code, LD_PRELOAD=str(host.sanitizer_runtime()), ASAN_OPTIONS=options)
    assert result.stdout == "clean\n", result.stderr[:5000]
    line = kernels.line_of("hopper_ring.cu", "// early")
    assert "use-after-poison" in result.stderr
    assert f"hopper_ring.cu:{line}" in result.stderr
