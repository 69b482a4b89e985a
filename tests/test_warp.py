"""What the threads of a warp do together on the host device: shuffles, tensor-core fragments, asynchronous copies.

The layouts of the fragments are written down here a second time, from NVIDIA's PTX ISA, as index formulas of NumPy.
"""

import numpy as np
import pytest
from support.kernels import line_of, needs_compiler, run
from support.tensor_core import multiply_add

from segnet_scratch.errors import KernelFault
from segnet_scratch.runtime import host
from segnet_scratch.runtime.signature import parse_kernels
from segnet_scratch.runtime.source import cuda_directory, read_source

pytestmark = needs_compiler

F32, U32 = np.float32, np.uint32
ORDERS = [*({"order": order} for order in host.ORDERS), {"order": "shuffled", "seed": 5}]
each_order = pytest.mark.parametrize("options", ORDERS, ids=str)
G, T = np.arange(32) // 4, np.arange(32) % 4  # groupID and threadID_in_group of a lane


def fault(*arguments, **options):
    with pytest.raises(KernelFault) as caught:
        run(*arguments, **options)
    return str(caught.value)


class TestShuffles:
    def shuffled(self, threads, amount, width, **options):
        x = np.random.default_rng(0).standard_normal(threads).astype(F32)
        received, votes = np.full((6, threads), np.nan, F32), np.full((3, threads), -1, np.int32)
        run("shuffles", x, received, votes, threads, amount, width, block=threads, **options)
        return x.reshape(-1, 32), received.reshape(6, -1, 32), votes.reshape(3, -1, 32)

    @each_order
    @pytest.mark.parametrize("width", [32, 16, 4, 1])
    @pytest.mark.parametrize("amount", [0, 1, 5, 31])
    def test_every_lane_receives_what_it_asks_for(self, amount, width, options):
        x, received, votes = self.shuffled(96, amount, width, **options)
        lane = np.arange(32)
        start = lane // width * width
        sources = [
            start + amount % width,
            np.where(lane - amount >= start, lane - amount, lane),
            np.where(lane + amount < start + width, lane + amount, lane),
            np.where(lane ^ amount < start + width, lane ^ amount, lane),
            (lane + amount) % 32,
            np.where(lane >= 16, lane ^ 1, lane ^ 2),
        ]
        for got, source in zip(received, sources, strict=True):
            np.testing.assert_array_equal(got, x[:, source])
        ballots = ((x > 0) << lane).sum(1).astype(U32).view(np.int32)
        np.testing.assert_array_equal(votes[0], np.broadcast_to(ballots[:, None], x.shape))
        np.testing.assert_array_equal(votes[1], np.broadcast_to((x > 1).any(1)[:, None], x.shape))
        np.testing.assert_array_equal(votes[2], np.broadcast_to((x > -1).all(1)[:, None], x.shape))

    @each_order
    def test_a_warp_waits_without_the_others(self, options):
        out = np.full(64, -1, np.int32)
        run("pass_round", out, 5, block=64, **options)
        np.testing.assert_array_equal(out.reshape(2, 32), np.roll(np.arange(64).reshape(2, 32), -5, axis=1))

    def test_warps_are_cut_from_the_threads_of_a_block_x_first(self):
        x = np.arange(64, dtype=F32)
        y = x.copy()
        run("shuffle_masked", y, -1, 3, block=(8, 8), grid=1)
        np.testing.assert_array_equal(y[:8], [3] * 8)  # every thread with the same threadIdx.x writes the same element


def scatter(matrix, rows, columns):
    """What each lane holds of a matrix, (32, registers), from the row and column of each."""
    return matrix[rows, columns]


def a_places(pack):
    """(rows, columns) of fragment a: (32, 4 pack)."""
    places = []
    for i in range(4 * pack):
        register, part = divmod(i, pack)
        rows = G + 8 * (register % 2)
        columns = T * pack + part + 4 * pack * (register // 2)
        places.append((rows, columns))
    return np.stack([p[0] for p in places], 1), np.stack([p[1] for p in places], 1)


def b_places(pack):
    rows = [T * pack + part + 4 * pack * register for register in range(2) for part in range(pack)]
    return np.stack(rows, 1), np.stack([G] * 2 * pack, 1)


def d_places():
    return np.stack([G, G, G + 8, G + 8], 1), np.stack([2 * T, 2 * T + 1] * 2, 1)


def registers(values, pack):
    """float32 numbers, (32, n), as registers: one tf32 each, or two bfloat16."""
    bits = np.ascontiguousarray(values, F32).view(U32)
    if pack == 1:
        return bits
    return (bits[:, 0::2] >> 16) | (bits[:, 1::2] & 0xFFFF0000)


def representable(rng, shape, pack):
    """Numbers that tf32 (11 significant bits) or bfloat16 (8) hold exactly."""
    values = rng.standard_normal(shape).astype(F32)
    return (values.view(U32) & U32(0xFFFFE000 if pack == 1 else 0xFFFF0000)).view(F32)


class TestProducts:
    def multiply(self, a, b, d, pack, **options):
        """a b + d by the kernel, its fragments scattered and gathered here; b and d are 8 or 16 columns wide."""
        fragments = d.shape[1] // 8
        left = registers(scatter(a, *a_places(pack)), pack)
        right = np.stack([registers(scatter(part, *b_places(pack)), pack) for part in np.split(b, fragments, 1)])
        result = np.stack([scatter(part, *d_places()) for part in np.split(d, fragments, 1)]).astype(F32)
        run("multiply_tf32" if pack == 1 else "multiply_bf16", left, right, result, fragments, block=32, **options)
        gathered = np.full((fragments, 16, 8), np.nan, F32)
        for part, values in zip(gathered, result, strict=True):
            part[d_places()] = values
        return np.concatenate(list(gathered), 1)

    @pytest.mark.parametrize("pack", [1, 2], ids=["tf32", "bf16"])
    def test_every_element_has_one_place(self, pack):
        for (rows, columns), shape in (
            (a_places(pack), (16, 8 * pack)),
            (b_places(pack), (8 * pack, 8)),
            (d_places(), (16, 8)),
        ):
            assert len(set(zip(rows.flat, columns.flat, strict=True))) == shape[0] * shape[1] == rows.size
            assert rows.max() < shape[0]
            assert columns.max() < shape[1]

    @each_order
    @pytest.mark.parametrize("pack", [1, 2], ids=["tf32", "bf16"])
    def test_random_matrices(self, pack, options):
        rng = np.random.default_rng(pack)
        for i in range(20):
            width = 8 + i % 2 * 8
            a, b = representable(rng, (16, 8 * pack), pack), representable(rng, (8 * pack, width), pack)
            d = rng.standard_normal((16, width)).astype(F32)
            got = self.multiply(a, b, d, pack, **options)
            np.testing.assert_array_equal(got, multiply_add(a, b, d))
            a, b, d = (m.astype(np.float64) for m in (a, b, d))
            bound = (8 * pack + 1) * np.finfo(F32).eps * (np.abs(a) @ np.abs(b) + np.abs(d))
            assert (np.abs(got - (a @ b + d)) <= bound).all()

    @pytest.mark.parametrize("pack", [1, 2], ids=["tf32", "bf16"])
    def test_bits_are_cut_off_as_measured(self, pack):
        """What was published of an H100: 25 bits below the largest term, of a product as of the sum; then 23."""
        depth, unit = 8 * pack, np.ldexp(F32(1), -23)

        def total(d, *factors):
            a, b, sums = np.zeros((16, depth), F32), np.zeros((depth, 8), F32), np.full((16, 8), d, F32)
            for k, (left, right) in enumerate(factors):
                a[:, k], b[k] = left, right
            return self.multiply(a, b, sums, pack)[0, 0]

        tiny = (F32(2.0**-12), F32(2.0**-13))  # a product of 2^-25: a quarter of a unit of 1
        assert total(1, *[tiny] * 3) == 1
        assert total(1, *[tiny] * 4) == 1 + unit, "three bits are there until the total is cut off"
        assert total(1, *[(tiny[0], tiny[1] / 2)] * depth) == 1, "what lies below is not"
        assert total(-1, *[(-tiny[0], tiny[1])] * 7) == -1 - unit, "towards zero, whatever the sign"
        assert total(0, (1, 1), *[(tiny[0], tiny[1] / 2)] * 7) == 1, "a product as the largest term"
        assert total(0, (1.5, 1.5), (tiny[0] * 2, tiny[1] / 2)) == 2.25, "2.25 as a product has the exponent of 1"
        assert total(-1, (1, 1), tiny) == tiny[0] * tiny[1], "what cancels leaves the bits below"

    def test_the_low_bits_of_tf32_are_ignored(self):
        a, b, zero = np.zeros((16, 8), F32), np.zeros((8, 8), F32), np.zeros((16, 8), F32)
        a[0, 0], b[0, 0] = np.nextafter(F32(1.25), F32(2)), F32(1)
        assert self.multiply(a, b, zero, 1)[0, 0] == 1.25

    def test_infinity_and_nan(self):
        for pack in (1, 2):
            a, b, zero = np.ones((16, 8 * pack), F32), np.ones((8 * pack, 8), F32), np.zeros((16, 8), F32)
            a[2, 3], a[5, 1] = np.inf, np.nan
            got = self.multiply(a, b, zero, pack)
            assert (got[2] == np.inf).all()
            assert np.isnan(got[5]).all()
            assert (np.delete(got, (2, 5), 0) == 8 * pack).all()

    def test_a_part_of_a_warp_cannot_multiply(self):
        arrays = np.zeros((32, 4), U32), np.zeros((32, 2), U32), np.zeros((32, 4), F32)
        for block in (31, 33):
            message = fault("multiply_tf32", *arrays, 1, block=block)
            assert "mma_m16n8k8_tf32 takes a warp of 32 threads" in message

    def test_rounding_to_tf32(self):
        """To nearest, ties away from zero: the bits as cvt.rna.tf32.f32 is defined to give them."""
        rng = np.random.default_rng(0)
        bits = rng.integers(0, 2**32, 100_000, U32)
        edges = [0, 1, 0xFFF, 0x1000, 0x1001, 0x2000, 0x3F800FFF, 0x3F801000, 0x3F801001, 0x7F7FEFFF, 0x7F7FF000]
        bits = np.concatenate(
            [bits, np.array([e | s for e in (*edges, 0x7F800000, 0x7FC00000) for s in (0, 2**31)], U32)]
        )
        x = bits.view(F32)
        got = np.empty_like(bits)
        run("round_to_tf32", x, got, len(x), grid=4, block=64)
        finite = np.isfinite(x)
        wide = np.where(finite, x, 0).astype(np.float64)
        # 10 bits of fraction: multiples of 2^(exponent - 10), the exponent at least that of the smallest normal one.
        exponent = np.maximum(np.frexp(wide[finite])[1] - 1, -126)
        scaled = np.ldexp(np.abs(wide[finite]), 10 - exponent)
        expected = np.copysign(np.ldexp(np.floor(scaled + 0.5), exponent - 10), wide[finite])
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(got.view(F32)[finite], expected.astype(F32))
        assert (got[finite] & 0x1FFF == 0).all()
        np.testing.assert_array_equal(np.signbit(got.view(F32)[finite]), np.signbit(x[finite]))
        np.testing.assert_array_equal(got[np.isinf(x)], bits[np.isinf(x)])
        assert (got[np.isnan(x)] == 0x7FFFFFFF).all()


class TestMatrixLoads:
    @each_order
    def test_each_lane_receives_its_numbers(self, options):
        rng = np.random.default_rng(1)
        numbers = rng.integers(0, 2**32, (48, 4), U32)
        rows = rng.permutation(48)[:32].astype(np.int32)
        plain, transposed = np.zeros((32, 4), U32), np.zeros((32, 4), U32)
        run("load_matrices", numbers, rows, plain, transposed, 48, block=32, shared=numbers.nbytes, **options)
        matrices = numbers.view(np.uint16)[rows].reshape(4, 8, 8)  # four of 8 rows, 8 numbers of 16 bits each
        expected = np.stack([matrices[:, G, 2 * T], matrices[:, G, 2 * T + 1]], -1)  # (matrix, lane, 2)
        np.testing.assert_array_equal(plain.view(np.uint16).reshape(32, 4, 2), expected.transpose(1, 0, 2))
        expected = np.stack([matrices[:, 2 * T, G], matrices[:, 2 * T + 1, G]], -1)
        np.testing.assert_array_equal(transposed.view(np.uint16).reshape(32, 4, 2), expected.transpose(1, 0, 2))

    def test_rows_of_four_floats_are_fragments_of_tf32(self):
        """What conv2d_mma.cu relies on: 16 rows of 8 numbers, loaded as four matrices, are fragment a."""
        matrix = np.arange(128, dtype=U32).reshape(16, 8)
        rows = np.array([2 * (lane % 16) + lane // 16 for lane in range(32)], np.int32)  # of 16 bytes: halves of a row
        plain, transposed = np.zeros((32, 4), U32), np.zeros((32, 4), U32)
        run("load_matrices", matrix.reshape(32, 4), rows, plain, transposed, 32, block=32, shared=512)
        np.testing.assert_array_equal(plain, scatter(matrix, *a_places(1)))


class TestAsyncCopies:
    def copied(self, waits, barrier, bytes=16, threads=40, **options):
        x = np.random.default_rng(2).standard_normal((2, threads, 4)).astype(F32)
        y = np.zeros_like(x)
        run("copy_groups", x, y, threads, bytes, waits, barrier, block=threads, shared=x.nbytes, **options)
        return x[:, (np.arange(threads) + 1) % threads], y

    @each_order
    def test_all_that_was_waited_for(self, options):
        expected, y = self.copied(2, 1, **options)
        np.testing.assert_array_equal(y, expected)

    @each_order
    def test_a_wait_for_all_but_the_youngest_group(self, options):
        expected, y = self.copied(1, 1, **options)
        np.testing.assert_array_equal(y[0], expected[0])
        assert np.isnan(y[1]).all()

    def test_a_missing_wait_shows(self):
        _, y = self.copied(0, 1)
        assert np.isnan(y).all()

    @pytest.mark.parametrize("order", ["ascending", "descending"])
    def test_a_missing_barrier_shows(self, order):
        """A wait covers the thread's own copies only: what the neighbour copied may not be there yet."""
        expected, y = self.copied(2, 0, order=order)
        assert np.isnan(y).any() or (y != expected).any()

    @pytest.mark.parametrize("bytes", [0, 4, 8])
    def test_zeros_beyond_the_bytes_that_are_read(self, bytes):
        expected, y = self.copied(2, 1, bytes)
        expected[0, :, bytes // 4 :] = 0
        expected[1] *= bytes > 0
        np.testing.assert_array_equal(y, expected)

    def test_addresses_that_do_not_fit(self):
        for numbers, text, message in (
            ((1, 0, 16), "line of the copy", "cp_async_16 has an address that is no multiple"),
            ((4, 2, 16), "line of the load", "ldmatrix_x4 has a row at an address"),
            ((0, 0, 17), "line of the copy", "cp_async_16 reads more bytes than it writes"),
        ):
            found = fault("misaligned", np.zeros(32, F32), *numbers, block=32)
            assert f"line {line_of('warp.cu', text)}: {message}" in found


class TestFaults:
    @each_order
    @pytest.mark.parametrize("lane", [0, 13, 31, 40])
    def test_a_lane_that_has_returned(self, lane, options):
        message = fault("lane_returns", np.zeros(64, F32), lane, block=64, **options)
        line = line_of("warp.cu", "line of lane_returns")
        assert message.startswith("warp.cu: lane_returns: block (0, 0, 0): divergent warp: thread (")
        assert message.endswith(
            f"waits in __shfl_xor_sync at line {line} for thread ({lane}, 0, 0), which has returned"
        )

    @each_order
    def test_a_lane_at_a_barrier(self, options):
        message = fault("lane_at_barrier", np.zeros(32, F32), 7, block=32, **options)
        line, barrier = line_of("warp.cu", "line of lane_at"), line_of("warp.cu", "barrier of lane_at")
        assert f"waits in __syncwarp at line {line} for thread (7, 0, 0), which" in message
        assert f"which waits at the barrier in line {barrier}" in message

    @each_order
    def test_lanes_at_two_lines(self, options):
        message = fault("two_lines", np.zeros(32, F32), 9, block=32, **options)
        assert "divergent warp" in message
        for text in ("upper line", "lower line"):
            assert str(line_of("warp.cu", text)) in message
        run("two_lines", np.zeros(32, F32), 32, block=32)

    def test_a_mask_without_the_thread_itself(self):
        message = fault("shuffle_masked", np.zeros(32, F32), 0xFF, 0, block=32)
        line = line_of("warp.cu", "line of shuffle_masked")
        assert f"thread (8, 0, 0), line {line}: __shfl_sync has a mask that does not name the thread itself" in message

    @pytest.mark.parametrize(("block", "mask", "source"), [(8, 0xFF, 8), (20, -1, 20), (52, -1, 25)])
    def test_a_lane_that_is_not_there(self, block, mask, source):
        message = fault("shuffle_masked", np.zeros(64, F32), mask, source, block=block)
        assert f"__shfl_sync reads lane {source}, which its mask" in message

    def test_the_next_launch_after_a_fault_works(self):
        for _ in range(5):
            fault("lane_returns", np.zeros(64, F32), 3, grid=3, block=64)
            run("lane_returns", np.zeros(64, F32), 64, grid=3, block=64)

    def test_kernels_with_warp_operations_run_as_fibers(self):
        kernels = parse_kernels(read_source(cuda_directory().parent / "tests" / "kernels" / "warp.cu"))
        assert all(k.cooperative for k in kernels if k.name != "round_to_tf32")
