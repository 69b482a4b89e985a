"""Every op of the table on every device that needs no GPU: templates over segnet_scratch.proof.table.

By default each op meets its fixed cases and 20 random ones; with SEGNET_TEST_FULL=1 the numbers of the list of proofs
(500 random shapes, 100 with integers, 50 for thread orders, 250 repeats).
"""

import importlib
import os
import pkgutil

import numpy as np
import pytest

import segnet_scratch.ops
from segnet_scratch.autograd import tensor
from segnet_scratch.cpu import winograd
from segnet_scratch.device import HostDevice, NumpyDevice, get_device
from segnet_scratch.errors import DataError, DTypeError, SegnetError, ShapeError
from segnet_scratch.kernels import shipped_kernels
from segnet_scratch.kernels.host import HostOptions
from segnet_scratch.ops import PoolCodes, cross_entropy, max_pool, max_unpool
from segnet_scratch.ops.add import AddForward
from segnet_scratch.ops.argmax import ArgmaxForward
from segnet_scratch.ops.batch_norm import BatchNormBackward, BatchNormEvaluationForward, BatchNormTrainingForward
from segnet_scratch.ops.confusion import ConfusionAccumulate
from segnet_scratch.ops.conv2d import Conv2dBackwardBias, Conv2dBackwardData, Conv2dBackwardWeight, Conv2dForward
from segnet_scratch.ops.cross_entropy import CrossEntropyBackward, CrossEntropyForward
from segnet_scratch.ops.dropout import DropoutForward, philox
from segnet_scratch.ops.gradient_norm import GradientNorm
from segnet_scratch.ops.max_pool import MaxPoolBackward, MaxPoolForward
from segnet_scratch.ops.max_unpool import MaxUnpoolBackward, MaxUnpoolForward
from segnet_scratch.ops.op import Buffers, Op, spec, spec_of
from segnet_scratch.ops.relu import ReluBackward, ReluForward
from segnet_scratch.ops.resize_bilinear import ResizeBilinearForward
from segnet_scratch.ops.sgd import SgdStep
from segnet_scratch.proof.compare import check, deviations, run_guarded, same_bits
from segnet_scratch.proof.rows.base import Case, empty_outputs
from segnet_scratch.proof.rows.maps import MapRow
from segnet_scratch.proof.rows.sgd import SgdOp
from segnet_scratch.proof.table import ROWS

FULL = bool(os.environ.get("SEGNET_TEST_FULL"))
RANDOM, INTEGERS, DOUBLES, ORDERS, REPEATS = (500, 100, 100, 50, 250) if FULL else (20, 10, 5, 5, 5)
SHUFFLES = 6 if FULL else 3
DEVICES = ("numpy", "host")
F32, F64, U8 = np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.uint8)

each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
each_device = pytest.mark.parametrize("device", DEVICES)


def row_named(name):
    return next(row for row in ROWS if row.name == name)


def cases_of(row, random):
    """(index, case): the fixed ones, then random ones."""
    fixed = row.cases()
    return list(enumerate(fixed + [row.random_case(row.generator(1, i)) for i in range(random)]))


class TestTable:
    def test_every_op_has_a_row(self):
        for module in pkgutil.iter_modules(segnet_scratch.ops.__path__):
            importlib.import_module(f"segnet_scratch.ops.{module.name}")
        subclasses, waiting = set(), [Op]
        while waiting:
            waiting += (found := waiting.pop().__subclasses__())
            subclasses.update(found)
        shipped = {op for op in subclasses if op.__module__.startswith("segnet_scratch.ops.") and "name" in vars(op)}
        assert len(shipped) >= 20
        assert shipped - {row.op for row in ROWS} == set()

    def test_every_shipped_kernel_is_launched_by_a_row(self):
        launched = set()

        class Recorder(NumpyDevice):
            runs_kernels = True

            def execute(self, kernel, types, grid, block, values, shared):
                launched.add(kernel.name)

        for row in ROWS:
            for index, case in cases_of(row, 0):
                op = row.plan(case, row.elements[0])
                run_guarded(op, row.inputs(op, case, row.generator(0, index)), Recorder())
        assert launched == set(shipped_kernels())

    def test_rows_have_names_of_their_own_and_reasons(self):
        assert len({row.name for row in ROWS}) == len(ROWS)
        for row in ROWS:
            reasons = [case.reason for case in row.cases()]
            assert len(set(reasons)) == len(reasons) >= 4, row.name
            assert all(reasons)

    @each_row
    def test_plans_count_work_and_bytes(self, row):
        for _, case in cases_of(row, 3):
            op = row.plan(case, row.elements[0])
            assert op.flops >= 0
            assert op.bytes == sum(s.nbytes for s in (*op.inputs.values(), *op.outputs.values())) > 0
            assert op.outputs or op.updates

    def test_cases_are_reproducible(self):
        row = ROWS[0]
        first, second = (row.random_case(row.generator(3, 4)) for _ in range(2))
        assert first == second
        op = row.plan(first, F32)
        a, b = (row.inputs(op, first, row.generator(3, 4)) for _ in range(2))
        assert all(same_bits(a[name], b[name]) for name in a if a[name] is not None)


class TestAgainstTheReference:
    @each_device
    @each_row
    def test_the_usual_type_within_the_bound(self, row, device):
        problems = []
        for index, case in cases_of(row, RANDOM):
            problems += check(row, case, get_device(device), row.generator(0, index))
        assert problems == []

    @each_device
    @pytest.mark.parametrize(
        ("row", "dtype"),
        [pytest.param(row, dtype, id=f"{row.name}-{dtype}") for row in ROWS for dtype in row.elements[1:]],
    )
    def test_other_types_within_the_bound(self, row, dtype, device):
        problems = []
        for index, case in cases_of(row, DOUBLES):
            problems += check(row, case, get_device(device), row.generator(0, index), dtype)
        assert problems == []

    @pytest.mark.parametrize(
        "name", [f"conv2d_{way}_direct" for way in ("forward", "backward_data", "backward_weight")]
    )
    def test_winograd_wherever_it_can_go(self, name, monkeypatch):
        """The numpy device leaves small maps to plain matrix products, and all of the table's are small."""
        monkeypatch.setattr(winograd, "_LEAST_PRODUCTS", 0)
        row, problems = row_named(name), []
        for index, case in cases_of(row, RANDOM):
            problems += check(row, case, get_device("numpy"), row.generator(0, index))
            problems += check(row, case, get_device("numpy"), row.generator(2, index), integers=True)
        assert problems == []

    @each_device
    @pytest.mark.parametrize("row", [row for row in ROWS if row.exact], ids=lambda row: row.name)
    def test_integers_are_exact(self, row, device):
        problems = []
        for index, case in cases_of(row, INTEGERS):
            problems += check(row, case, get_device(device), row.generator(2, index), integers=True)
        assert problems == []


class TestSameBits:
    @each_row
    def test_in_every_order_of_threads_and_on_any_number_of_workers(self, row):
        options = [HostOptions(order, workers=workers) for order in ("ascending", "descending") for workers in (1, 2)]
        options += [HostOptions("shuffled", seed, workers=1 + seed % 2) for seed in range(SHUFFLES)]
        devices = [HostDevice(option) for option in options]
        for index, case in cases_of(row, ORDERS):
            op = row.plan(case, row.elements[0])
            inputs = row.inputs(op, case, row.generator(0, index))
            first, *others = (run_guarded(op, inputs, device) for device in devices)
            for option, other in zip(options[1:], others, strict=True):
                assert other.problems == []
                for name, output in first.outputs.items():
                    assert same_bits(output, other.outputs[name]), f"{row.name} {case}: {name} differs with {option}"

    @each_device
    @each_row
    def test_again_and_again(self, row, device):
        (index, case), *_ = reversed(cases_of(row, 1))
        op = row.plan(case, row.elements[0])
        inputs = row.inputs(op, case, row.generator(0, index))
        first, *others = (run_guarded(op, inputs, get_device(device)) for _ in range(1 + REPEATS))
        for other in others:
            assert all(same_bits(output, other.outputs[name]) for name, output in first.outputs.items())


class _Fake(Op):
    """y = x + 1, or what a test makes of it."""

    name = "fake"

    def __init__(self, x, compute=lambda b: np.add(b.x, 1, out=b.y)):
        self.inputs, self.outputs, self.workspace, self.flops = {"x": x}, {"y": x}, {}, 0
        self.compute = compute

    def reference(self, b):
        np.add(b.x, 1, out=b.y)

    def numpy(self, b):
        self.compute(b)


def _beyond(array, index):
    """The element after this one of a contiguous array, even where the array ends there."""
    return np.lib.stride_tricks.as_strided(array.reshape(-1)[index:], (2,))[1:]


FAULTS = {
    "too large": (lambda b: np.add(b.x, 1.001, out=b.y), "elements are wrong"),
    "one NaN": (lambda b: (np.add(b.x, 1, out=b.y), b.y.__setitem__((0, 0, 0, 0), np.nan)), "nan"),
    "one element unwritten": (
        lambda b: np.add(b.x.reshape(-1)[1:], 1, out=b.y.reshape(-1)[1:]),
        "depends on what the output held",
    ),
    "reads the output": (lambda b: np.add(b.x, 1 + 0 * b.y, out=b.y), "elements are wrong"),
    "input changed": (lambda b: (np.add(b.x, 1, out=b.y), np.multiply(b.x, 2, out=b.x)), "the input was changed"),
    "written after the end": (
        lambda b: (np.add(b.x, 1, out=b.y), _beyond(b.y, b.y.size - 1).fill(0)),
        "y: 1 element written past its end",
    ),
    "infinite": (lambda b: b.y.fill(np.inf), "elements are wrong"),
}


class TestTheComparisonCanFail:
    """Faults of a made-up op; those of the shipped kernels are in test_mutants.py."""

    class FakeRow(MapRow):
        def __init__(self, compute):
            super().__init__(_Fake)
            self.compute = compute

        def plan(self, case, dtype):
            return _Fake(spec(case["x"], dtype), self.compute)

        def bound(self, op, b, eps):
            return {"y": eps * np.abs(b.y)}

    def test_a_right_op_passes(self):
        row = self.FakeRow(lambda b: np.add(b.x, 1, out=b.y))
        for index, case in cases_of(row, 5):
            assert check(row, case, get_device("numpy"), row.generator(0, index)) == []

    @pytest.mark.parametrize("fault", FAULTS)
    def test_a_fault_is_found(self, fault):
        compute, report = FAULTS[fault]
        row = self.FakeRow(compute)
        problems = check(row, Case("odd", {"x": (1, 3, 5, 2)}), get_device("numpy"), row.generator(0, 0))
        assert any(report in problem for problem in problems), problems

    def test_nan_shape_and_integers(self):
        ones = np.ones(3)
        assert deviations("y", ones, ones, 0.0) == []
        assert deviations("y", np.array([1, np.nan, 1]), ones, np.inf)
        assert deviations("y", ones, np.array([1, 1, np.nan]), np.inf)
        assert deviations("y", ones, ones, np.nan)
        assert list(map(str, deviations("y", np.ones(4), ones, 1.0))) == ["y: has shape (4,), expected (3,)"]
        assert deviations("codes", np.array([1, 2], np.uint8), np.array([1, 3], np.uint8), 9.0)


# ------------------------------------------------------------------------------------------- the references themselves


class TestReferencesAgainstTorch:
    """What everything else is held against is held against PyTorch, in float64."""

    @pytest.fixture
    def torch(self):
        return pytest.importorskip("torch")

    @staticmethod
    def run(op, **arrays):
        b = Buffers(**arrays, **empty_outputs(op))
        op.reference(b)
        return b

    @staticmethod
    def nchw(torch, x, **options):
        return torch.tensor(np.moveaxis(x, 3, 1).copy(), **options)

    @pytest.mark.parametrize("index", range(12))
    def test_conv2d(self, torch, index):
        row = row_named("conv2d_forward_direct")
        case = row.random_case(row.generator(5, index))
        op = row.plan(case, F64)
        arrays = row.inputs(op, case, row.generator(6, index))
        x = self.nchw(torch, arrays["x"], requires_grad=True)
        weight = self.nchw(torch, arrays["weight"], requires_grad=True)
        bias = None if arrays["bias"] is None else torch.tensor(arrays["bias"], requires_grad=True)
        y = torch.nn.functional.conv2d(x, weight, bias, case["stride"], case["padding"])
        dy = row.generator(7, index).standard_normal(op.outputs["y"].shape)
        y.backward(self.nchw(torch, dy))
        plan = (op.inputs["x"], op.inputs["weight"], case["stride"], case["padding"])
        got = {
            "y": (self.run(op, **arrays).y, y.detach()),
            "dx": (self.run(Conv2dBackwardData(*plan), dy=dy, weight=arrays["weight"]).dx, x.grad),
            "dweight": (self.run(Conv2dBackwardWeight(*plan), x=arrays["x"], dy=dy).dweight, weight.grad),
        }
        for name, (ours, theirs) in got.items():
            np.testing.assert_allclose(ours, np.moveaxis(theirs.numpy(), 1, 3), rtol=1e-10, atol=1e-10, err_msg=name)
        if bias is not None:
            dbias = self.run(Conv2dBackwardBias(spec_of(dy)), dy=dy).dbias
            np.testing.assert_allclose(dbias, bias.grad.numpy(), rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("training", [True, False])
    def test_batch_norm(self, torch, training):
        rng = np.random.default_rng(0)
        x, dy = rng.standard_normal((2, 2, 5, 4, 3))
        weight, bias, mean, var = rng.uniform(0.5, 2, (4, 3))
        xt = self.nchw(torch, x, requires_grad=True)
        wt, bt = (torch.tensor(a, requires_grad=True) for a in (weight, bias))
        mean_t, var_t = torch.tensor(mean), torch.tensor(var)
        yt = torch.nn.functional.batch_norm(xt, mean_t, var_t, wt, bt, training=training, momentum=0.1, eps=1e-5)
        yt.backward(self.nchw(torch, dy))
        plan = BatchNormTrainingForward if training else BatchNormEvaluationForward
        b = self.run(plan(spec_of(x)), x=x, weight=weight, bias=bias, running_mean=mean, running_var=var)
        back = self.run(
            BatchNormBackward(spec_of(x), training), x=x, dy=dy, mean=b.mean, inv_std=b.inv_std, weight=weight
        )
        pairs = [(b.y, yt.detach()), (back.dx, xt.grad)]
        for ours, theirs in pairs:
            np.testing.assert_allclose(ours, np.moveaxis(theirs.numpy(), 1, 3), rtol=1e-11, atol=1e-12)
        for ours, theirs in ((back.dweight, wt.grad), (back.dbias, bt.grad), (mean, mean_t), (var, var_t)):
            np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-11, atol=1e-12)

    @pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 1), (1, 4), (3, 1)])
    def test_pool_and_unpool(self, torch, size):
        rng = np.random.default_rng(1)
        x = rng.standard_normal((2, *size, 3))
        xt = self.nchw(torch, x, requires_grad=True)
        yt, indices = torch.nn.functional.max_pool2d(xt, 2, ceil_mode=True, return_indices=True)
        b = self.run(MaxPoolForward(spec_of(x)), x=x)
        np.testing.assert_array_equal(b.y, np.moveaxis(yt.detach().numpy(), 1, 3))
        dy = rng.standard_normal(b.y.shape)
        yt.backward(self.nchw(torch, dy))
        dx = self.run(MaxPoolBackward(spec_of(dy), size), dy=dy, codes=b.codes).dx
        np.testing.assert_array_equal(dx, np.moveaxis(xt.grad.numpy(), 1, 3))
        up = self.run(MaxUnpoolForward(spec_of(dy), spec_of(b.codes), size), x=dy, codes=b.codes).y
        theirs = torch.nn.functional.max_unpool2d(self.nchw(torch, dy), indices, 2, output_size=size)
        np.testing.assert_array_equal(up, np.moveaxis(theirs.numpy(), 1, 3))

    @pytest.mark.parametrize("normalisation", ["weights", "valid"])
    @pytest.mark.parametrize("weighted", [True, False])
    @pytest.mark.parametrize("smoothing", [0.0, 0.2])
    def test_cross_entropy(self, torch, normalisation, weighted, smoothing):
        rng = np.random.default_rng(2)
        logits, labels = 5 * rng.standard_normal((50, 7)), rng.integers(0, 7, 50).astype(np.uint8)
        labels[::5] = 255
        weights = rng.uniform(0.1, 3, 7) if weighted else None
        b = self.run(
            CrossEntropyForward(spec_of(logits), normalisation, smoothing),
            logits=logits,
            labels=labels,
            class_weights=weights,
        )
        zt = torch.tensor(logits, requires_grad=True)
        loss = torch.nn.functional.cross_entropy(
            zt,
            torch.tensor(labels.astype(np.int64)),
            None if weights is None else torch.tensor(weights),
            ignore_index=255,
            reduction="mean" if normalisation == "weights" else "sum",
            label_smoothing=smoothing,
        )
        if normalisation == "valid":
            loss = loss / 40
        loss.backward()
        np.testing.assert_allclose(b.loss[0], loss.item(), rtol=1e-12)
        back = self.run(
            CrossEntropyBackward(spec_of(logits), normalisation, smoothing),
            logits=logits,
            labels=labels,
            class_weights=weights,
            sums=b.sums,
            dloss=np.ones(1),
        )
        np.testing.assert_allclose(back.dlogits, zt.grad.numpy(), rtol=1e-10, atol=1e-15)

    @pytest.mark.parametrize("sizes", [((5, 7), (13, 4)), ((1, 1), (3, 2)), ((8, 6), (1, 1)), ((4, 4), (4, 4))])
    def test_resize(self, torch, sizes):
        source, target = sizes
        x = np.random.default_rng(3).standard_normal((2, *source, 3))
        y = self.run(ResizeBilinearForward(spec_of(x), target), x=x).y
        theirs = torch.nn.functional.interpolate(self.nchw(torch, x), target, mode="bilinear", align_corners=False)
        np.testing.assert_allclose(y, np.moveaxis(theirs.numpy(), 1, 3), rtol=1e-12, atol=1e-12)

    def test_sgd(self, torch):
        rng = np.random.default_rng(4)
        w, m = rng.standard_normal((2, 9))
        wt = torch.nn.Parameter(torch.tensor(w.copy()))
        optimiser = torch.optim.SGD([wt], lr=0.1, momentum=SgdOp.MOMENTUM, weight_decay=SgdOp.DECAYS[0])
        m[...] = 0
        for _ in range(3):
            g = rng.standard_normal(9)
            wt.grad = torch.tensor(g)
            optimiser.step()
            other = {f"{kind}{i}": np.zeros(1) for kind in "wgm" for i in (1, 2)}
            self.run(SgdOp((9, 1, 1), F64), w0=w, g0=g, m0=m, lr=np.array([0.1]), scale=np.ones(1), **other)
        np.testing.assert_allclose(w, wt.detach().numpy(), rtol=1e-12)

    def test_philox_known_answers(self):
        # kat_vectors of Random123, the authors' implementation: philox4x32 10.
        ones = 0xFFFFFFFF
        pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
        known = [
            ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
            ((ones, ones, ones, ones), (ones, ones), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
            (*pi, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
        ]
        for (group, sample, layer, step), (low, high), expected in known:
            words = philox(np.array([group], np.uint64), sample, layer, step, low | high << 32)
            assert tuple(int(word) for word in words) == expected


# ------------------------------------------------------------------------------------------------ hostile inputs


def pool_by_hand(x):
    """Max-pool by its definition, element by element."""
    n, h, w, c = x.shape
    y = np.empty((n, -(-h // 2), -(-w // 2), c), x.dtype)
    codes = np.empty(y.shape, np.uint8)
    for index in np.ndindex(y.shape):
        image, row, column, channel = index
        best = None
        for code in range(4):
            i, j = 2 * row + code // 2, 2 * column + code % 2
            if i < h and j < w:
                value = x[image, i, j, channel]
                if best is None or value > best or (value != value and best == best):
                    best, y[index], codes[index] = value, value, code
    return y, codes


def unpool_by_hand(values, codes, size):
    """Max-unpool by its definition; a code that points outside means position 0."""
    n, _, _, c = values.shape
    y = np.zeros((n, *size, c), values.dtype)
    for image, row, column, channel in np.ndindex(values.shape):
        code = int(codes[image, row, column, channel])
        i, j = 2 * row + code // 2, 2 * column + code % 2
        if code > 3 or i >= size[0] or j >= size[1]:
            i, j = 2 * row, 2 * column
        y[image, i, j, channel] = values[image, row, column, channel]
    return y


class TestHostilePooling:
    SPECIAL = np.array([np.nan, -np.inf, np.inf, -1, 0, 1, 1], F32)

    @each_device
    def test_pool_of_nan_infinity_and_ties(self, device):
        rng = np.random.default_rng(0)
        for _ in range(100):
            x = rng.choice(self.SPECIAL, rng.integers(1, (3, 6, 6, 4)))
            run = run_guarded(MaxPoolForward.plan(spec_of(x)), {"x": x}, get_device(device))
            y, codes = pool_by_hand(x)
            assert run.problems == []
            np.testing.assert_array_equal(run.outputs["y"], y)
            np.testing.assert_array_equal(run.outputs["codes"], codes)

    @each_device
    @pytest.mark.parametrize("fill", [np.nan, -np.inf])
    def test_pool_of_nothing_else(self, device, fill):
        x = tensor(np.full((1, 5, 3, 2), fill, F32), device)
        y, codes = max_pool(x)
        np.testing.assert_array_equal(y.numpy(), np.full((1, 3, 2, 2), fill))
        assert not codes.codes.any()  # the first position, never -1
        back = max_unpool(y, codes).numpy()
        np.testing.assert_array_equal(back[:, ::2, ::2], y.numpy())

    @each_device
    def test_codes_out_of_range(self, device):
        rng = np.random.default_rng(1)
        home = get_device(device)
        for _ in range(100):
            n, h, w, c = (int(k) for k in rng.integers(1, (3, 6, 6, 4)))
            windows = (n, -(-h // 2), -(-w // 2), c)
            values = rng.choice(self.SPECIAL, windows)
            codes = rng.integers(0, rng.choice([4, 8, 256]), windows).astype(np.uint8)
            expected = unpool_by_hand(values, codes, (h, w))
            for op, name in (
                (MaxUnpoolForward.plan(spec_of(values), spec_of(codes), (h, w)), "x"),
                (MaxPoolBackward.plan(spec_of(values), (h, w)), "dy"),
            ):
                run = run_guarded(op, {name: values, "codes": codes}, home)
                assert run.problems == []
                np.testing.assert_array_equal(*run.outputs.values(), expected)
            dy = rng.standard_normal((n, h, w, c)).astype(F32)
            run = run_guarded(MaxUnpoolBackward.plan(spec_of(dy)), {"dy": dy, "codes": codes}, home)
            assert run.problems == []
            # The transpose of unpool: <unpool(v), dy> = <v, unpool_backward(dy)>, here with v = 1 in one window.
            gathered = run.outputs["dx"]
            for index in np.ndindex(windows):
                one = np.zeros(windows, F32)
                one[index] = 1
                assert gathered[index] == (unpool_by_hand(one, codes, (h, w)) * dy).sum()

    @each_device
    def test_codes_of_another_pool(self, device):
        x = tensor(np.zeros((2, 11, 15, 4), F32), device)
        y, codes = max_pool(x)
        assert max_unpool(y, codes).shape == x.shape
        other = tensor(np.zeros((2, 7, 8, 4), F32), device)
        with pytest.raises(ShapeError, match=r"max_unpool: codes \(2, 6, 8, 4\).* do not fit x \(2, 7, 8, 4\); pass"):
            max_unpool(other, codes)
        for size in ((12, 17), (10, 15), (0, 0), (11, 14 + 3)):
            with pytest.raises(ShapeError, match="do not fit"):
                max_unpool(y, PoolCodes(codes.codes, size))
        with pytest.raises(DTypeError, match="codes has element type int64, expected uint8"):
            max_unpool(y, PoolCodes(codes.codes.astype(np.int64), codes.size))

    @each_device
    def test_argmax_of_nan_infinity_and_ties(self, device):
        logits = np.random.default_rng(2).choice(self.SPECIAL, (500, 5))
        labels = run_guarded(ArgmaxForward(spec_of(logits)), {"logits": logits}, get_device(device)).outputs["labels"]
        for z, label in zip(logits, labels, strict=True):
            nan = np.flatnonzero(np.isnan(z))
            assert label == (nan[0] if len(nan) else np.flatnonzero(z == z.max())[0])

    @each_device
    def test_relu_keeps_nan_and_infinity(self, device):
        x = np.array([[np.nan, -np.inf, np.inf, -0.0, 0, -1, 1]], F32)
        y = run_guarded(ReluForward(spec_of(x)), {"x": x}, get_device(device)).outputs["y"]
        np.testing.assert_array_equal(y, [[np.nan, 0, np.inf, 0, 0, 0, 1]])
        dy = np.array([[1, np.nan, np.inf, np.nan, 5, np.inf, -np.inf]], F32)
        dx = run_guarded(ReluBackward(spec_of(y)), {"y": y, "dy": dy}, get_device(device)).outputs["dx"]
        np.testing.assert_array_equal(dx, [[0, 0, np.inf, 0, 0, 0, -np.inf]])


class TestLossEdges:
    @each_device
    @pytest.mark.parametrize("normalisation", ["weights", "valid"])
    def test_a_batch_all_void(self, device, normalisation):
        logits = tensor(np.random.default_rng(0).standard_normal((2, 3, 4, 5)), device, requires_grad=True)
        loss = cross_entropy(logits, np.full((2, 3, 4), 255), np.ones(5), normalisation)
        loss.backward()
        assert loss.item() == 0
        assert not logits.grad.any()

    @each_device
    @pytest.mark.parametrize("weights", [None, np.array([1.0, 0.0, 0.0])])
    def test_a_weight_of_zero(self, device, weights):
        logits = tensor(np.zeros((1, 1, 2, 3)), device, requires_grad=True)
        loss = cross_entropy(logits, np.array([[[1, 2]]]), weights)
        loss.backward()
        assert loss.item() == pytest.approx(0 if weights is not None else np.log(3))
        assert np.isfinite(logits.grad).all()

    @each_device
    def test_large_logits(self, device):
        signs = np.array([[1, -1, -1], [-1, 1, 1], [1, 1, 1], [-1, -1, -1]], F32)
        logits = tensor(1e4 * signs.reshape(1, 2, 2, 3), device, requires_grad=True)
        loss = cross_entropy(logits, np.array([[[0, 0], [1, 2]]]))
        loss.backward()
        np.testing.assert_allclose(loss.item(), (0 + (2e4 + np.log(2)) + 2 * np.log(3)) / 4, rtol=1e-6)
        third = 1 / 3
        expected = np.array([[0, 0, 0], [-1, 0.5, 0.5], [third, third - 1, third], [third, third, third - 1]])
        np.testing.assert_allclose(logits.grad.reshape(4, 3), expected / 4, rtol=1e-6)

    @each_device
    def test_small_differences_of_large_logits_count(self, device):
        # Added to log sum exp, 1e4 would round the difference of 0.5 to a multiple of 1/1024.
        logits = tensor(np.array([[[[1e4, 1e4 - 0.5]]]], F32), device, requires_grad=True)
        loss = cross_entropy(logits, np.array([[[0]]]))
        loss.backward()
        assert loss.item() == pytest.approx(np.log1p(np.exp(-0.5)), rel=1e-6)
        probability = 1 / (1 + np.exp(0.5))
        np.testing.assert_allclose(logits.grad.reshape(2), [-probability, probability], rtol=1e-6)

    @each_device
    @pytest.mark.parametrize("label", [21, 254, -1, 256, 1000])
    def test_labels_that_are_no_class(self, device, label):
        logits = tensor(np.zeros((1, 2, 3, 21)), device)
        labels = np.zeros((1, 2, 3), np.int64)
        labels[0, 1, 2] = label
        with pytest.raises(
            DataError, match=rf"label {label} at \(0, 1, 2\) \(1 such pixels\); expected 0 to 20, or 255"
        ):
            cross_entropy(logits, labels)

    @each_device
    @pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int32, np.int64, np.uint64])
    def test_integer_types_of_labels(self, device, kind):
        logits = tensor(np.zeros((1, 1, 3, 4)), device)
        assert cross_entropy(logits, np.array([[[0, 3, 255]]], kind)).item() == pytest.approx(np.log(4))

    @each_device
    def test_refused(self, device):
        logits = tensor(np.zeros((1, 2, 3, 4)), device)
        labels = np.zeros((1, 2, 3), np.uint8)
        with pytest.raises(DTypeError, match="labels have element type float64; expected integers"):
            cross_entropy(logits, labels.astype(np.float64))
        with pytest.raises(ShapeError, match=r"labels \(1, 3, 2\) do not fit logits \(1, 2, 3, 4\)"):
            cross_entropy(logits, labels.reshape(1, 3, 2))
        with pytest.raises(ShapeError, match=r"class_weights has shape \(3,\), expected \(4,\)"):
            cross_entropy(logits, labels, np.ones(3))
        with pytest.raises(ShapeError, match="normalisation 'mean'; expected one of weights, valid"):
            cross_entropy(logits, labels, normalisation="mean")


# ------------------------------------------------------------------------------------------------ refused


def plans_that_are_refused():
    """(name, plan, error, part of the message)."""
    x, w = spec((1, 4, 5, 3), F32), spec((2, 3, 3, 3), F32)
    codes = spec((1, 2, 3, 3), U8)
    rows = [
        ("conv: three dimensions", lambda: Conv2dForward(spec((4, 5, 3), F32), w), ShapeError, "channels last"),
        ("conv: empty", lambda: Conv2dForward(spec((0, 4, 5, 3), F32), w), ShapeError, "empty"),
        ("conv: channels", lambda: Conv2dForward(spec((1, 4, 5, 2), F32), w), ShapeError, "has 2 channels"),
        ("conv: weight", lambda: Conv2dForward(x, spec((2, 3, 3), F32)), ShapeError, "expected (o, kh, kw, c)"),
        ("conv: stride", lambda: Conv2dForward(x, w, 0), ShapeError, "stride 0"),
        ("conv: padding", lambda: Conv2dForward(x, w, 1, -1), ShapeError, "padding -1"),
        (
            "conv: kernel",
            lambda: Conv2dForward(x, spec((2, 7, 3, 3), F32)),
            ShapeError,
            "larger than the padded image 4x5",
        ),
        ("conv: rung", lambda: Conv2dForward(x, w, rung="fast"), ShapeError, "expected one of direct, tiled, tf32"),
        ("conv: tiled stride", lambda: Conv2dForward(x, w, 2, 1, "tiled"), ShapeError, "use 'direct'"),
        (
            "conv: mixed types",
            lambda: Conv2dForward(x, spec(w.shape, F64)),
            DTypeError,
            "weight has element type float64",
        ),
        ("conv: dgrad mixed types", lambda: Conv2dBackwardData(x, spec(w.shape, F64)), DTypeError, "float64"),
        ("conv: wgrad channels", lambda: Conv2dBackwardWeight(x, spec((2, 3, 3, 4), F32)), ShapeError, "takes 4"),
        ("conv: bias", lambda: Conv2dBackwardBias(spec((4, 5, 3), F32)), ShapeError, "channels last"),
        ("batch norm: one value", lambda: BatchNormTrainingForward(spec((1, 1, 1, 3), F32)), ShapeError, "n*h*w > 1"),
        ("batch norm: dimensions", lambda: BatchNormEvaluationForward(spec((4, 3), F32)), ShapeError, "channels last"),
        ("batch norm: backward", lambda: BatchNormBackward(spec((4, 3), F32), True), ShapeError, "channels last"),
        ("relu: empty", lambda: ReluForward(spec((2, 0), F32)), ShapeError, "empty"),
        ("relu: backward empty", lambda: ReluBackward(spec((2, 0), F32)), ShapeError, "empty"),
        ("add: empty", lambda: AddForward(spec((0,), F32)), ShapeError, "empty"),
        ("pool: dimensions", lambda: MaxPoolForward(spec((4, 5, 3), F32)), ShapeError, "channels last"),
        ("pool: backward dimensions", lambda: MaxPoolBackward(spec((2, 3), F32), (4, 5)), ShapeError, "channels last"),
        ("pool: backward size", lambda: MaxPoolBackward(spec((1, 2, 3, 3), F32), (5, 5)), ShapeError, "do not fit"),
        ("unpool: size", lambda: MaxUnpoolForward(spec(codes.shape, F32), codes, (4, 7)), ShapeError, "do not fit"),
        ("unpool: codes", lambda: MaxUnpoolForward(x, codes, (4, 5)), ShapeError, "pass the codes of the pool"),
        ("unpool: backward", lambda: MaxUnpoolBackward(spec((4, 5), F32)), ShapeError, "channels last"),
        ("dropout: p = 1", lambda: DropoutForward(x, 1.0, 0), ShapeError, "expected 0 <= p < 1"),
        ("dropout: p < 0", lambda: DropoutForward(x, -0.1, 0), ShapeError, "expected 0 <= p < 1"),
        ("dropout: p NaN", lambda: DropoutForward(x, np.nan, 0), ShapeError, "p is nan"),
        ("dropout: dimensions", lambda: DropoutForward(spec((4,), F32), 0.5, 0), ShapeError, "expected (n, ...)"),
        ("loss: dimensions", lambda: CrossEntropyForward(x), ShapeError, "expected (pixels, classes)"),
        ("loss: classes", lambda: CrossEntropyForward(spec((3, 256), F32)), ShapeError, "at most 255"),
        ("loss: normalisation", lambda: CrossEntropyBackward(spec((3, 2), F32), "sum"), ShapeError, "'sum'"),
        ("loss: smoothing", lambda: CrossEntropyForward(spec((3, 2), F32), smoothing=1.0), ShapeError, "smoothing 1.0"),
        ("argmax: dimensions", lambda: ArgmaxForward(spec((4,), F32)), ShapeError, "expected (..., classes)"),
        ("argmax: classes", lambda: ArgmaxForward(spec((4, 257), F32)), ShapeError, "at most 256"),
        ("confusion: classes", lambda: ConfusionAccumulate(5, 256), ShapeError, "256 classes"),
        ("confusion: pixels", lambda: ConfusionAccumulate(0, 5), ShapeError, "0 pixels"),
        ("resize: size", lambda: ResizeBilinearForward(x, (0, 4)), ShapeError, "positive"),
        ("resize: dimensions", lambda: ResizeBilinearForward(spec((4, 5), F32), (4, 4)), ShapeError, "channels last"),
    ]
    return [pytest.param(*row[1:], id=row[0]) for row in rows]


class TestRefused:
    @pytest.mark.parametrize(("plan", "error", "message"), plans_that_are_refused())
    def test_plan(self, plan, error, message):
        with pytest.raises(error) as raised:
            plan()
        assert message in str(raised.value)

    # Confusion has no element type, and SgdStep, which is no Op, is tested below.
    @pytest.mark.parametrize(
        "row", [row for row in ROWS if row.name not in ("confusion_accumulate", "sgd_step")], ids=lambda row: row.name
    )
    @pytest.mark.parametrize("dtype", [np.float16, np.int32, np.complex64, np.bool_])
    def test_element_types(self, row, dtype):
        with pytest.raises(DTypeError, match=r"expected float32(, float64)? or (float64|bfloat16)"):
            row.plan(row.cases()[0], dtype)

    @each_device
    @each_row
    def test_calls(self, row, device):
        """Nothing runs with an array that is missing, too much, or not what was planned."""
        home = get_device(device)
        case = next(case for case in row.cases() if case.reason in ("primes", "a chunk and one off", "a pixel more"))
        op = row.plan(case, row.elements[0])
        good = {
            name: None if a is None else home.upload(a) for name, a in row.inputs(op, case, row.generator(0, 0)).items()
        }
        op(home, **{name: None if a is None else a.copy() for name, a in good.items()})
        wrong: list[tuple[dict, type[SegnetError], str]] = [
            ({name: a for name, a in good.items() if name != next(iter(good))}, ShapeError, "takes "),
            ({**good, "another": good[next(iter(good))]}, ShapeError, "takes "),
        ]
        for name, array in good.items():
            if array is None:
                continue
            other = {F32: np.float64, np.dtype(np.int32): np.int64}.get(array.dtype, np.int32)
            wrong += [
                ({**good, name: array.reshape(-1, 1, 1, 1, 1)}, ShapeError, f"{name} has shape"),
                ({**good, name: array.astype(other)}, DTypeError, f"{name} has element type"),
            ]
            if name not in op.optional:
                wrong.append(({**good, name: None}, ShapeError, f"{name} is None"))
            if array.size > 1:
                doubled = np.repeat(array, 2, axis=-1)[..., ::2]
                wrong.append(({**good, name: doubled}, ShapeError, f"{name} is a view"))
        for arrays, error, message in wrong:
            with pytest.raises(error) as raised:
                op(home, **arrays)
            assert str(raised.value).startswith(f"{op.name}: {message}")

    @each_device
    def test_sgd_step(self, device):
        home = get_device(device)
        w, m = (home.zeros((4, 3), F32) for _ in range(2))
        common = {"rates": [1.0], "decays": [0.0], "momentum": 0.9}
        step = SgdStep(home, [w], [m], **common)
        lr, one = (home.upload(np.array([number])) for number in (0.1, 1.0))
        step([home.zeros((4, 3), F32)], lr, one)
        refused = [
            (lambda: SgdStep(home, [], [], rates=[], decays=[], momentum=0.9), ShapeError, "no parameters"),
            (lambda: SgdStep(home, [w], [], **common), ShapeError, "0 arrays of momentum for 1"),
            (lambda: SgdStep(home, [w.astype(np.float16)], [m], **common), DTypeError, "float16"),
            (lambda: SgdStep(home, [w], [m.astype(F64)], **common), DTypeError, "momentum 0 has element type float64"),
            (lambda: SgdStep(home, [w], [m.T.copy()], **common), ShapeError, "momentum 0 has shape (3, 4)"),
            (lambda: SgdStep(home, [w.T], [m.T], **common), ShapeError, "contiguous"),
            (lambda: SgdStep(home, [w[:0]], [m[:0]], **common), ShapeError, "not empty"),
            (lambda: SgdStep(home, [w], [m.tolist()], **common), DTypeError, "momentum 0 is a list, no array of"),
            (lambda: step([home.zeros((4, 2), F32)], lr, one), ShapeError, "gradient 0 has shape (4, 2)"),
            (lambda: step([home.zeros((4, 3), F64)], lr, one), DTypeError, "gradient 0 has element type float64"),
            (lambda: step([], lr, one), ShapeError, "0 arrays of gradient"),
            (lambda: step([home.zeros((4, 3), F32)], lr.astype(F32), one), DTypeError, "lr has element type float32"),
            (lambda: step([home.zeros((4, 3), F32)], home.zeros((2,), F64), one), ShapeError, "lr has shape (2,)"),
            (
                lambda: step([home.zeros((4, 3), F32)], lr, one.astype(F32)),
                DTypeError,
                "scale has element type float32",
            ),
        ]
        for call, error, message in refused:
            with pytest.raises(error) as raised:
                call()
            assert message in str(raised.value)

    @each_device
    def test_gradient_norm(self, device):
        home = get_device(device)
        gradients = [home.zeros((4, 3), F32), home.zeros((5,), F32)]
        sizes = {"squares": 2, "norm": 1, "scale": 1, "partials": 2}
        outputs = {name: home.zeros((size,), F64) for name, size in sizes.items()}
        norm = GradientNorm(home, gradients, 1.0, **outputs)
        norm(gradients)
        refused = [
            (lambda: GradientNorm(home, [], 1.0, **outputs), ShapeError, "no parameters"),
            (lambda: GradientNorm(home, gradients, 0.0, **outputs), ShapeError, "the largest norm is 0.0"),
            (lambda: GradientNorm(home, gradients, np.nan, **outputs), ShapeError, "the largest norm is nan"),
            (lambda: norm(gradients[:1]), ShapeError, "1 arrays of gradient for 2"),
            (lambda: norm([g.astype(F64) for g in gradients]), DTypeError, "gradient 0 has element type float64"),
        ]
        for name, size in sizes.items():
            wrong = outputs | {name: home.zeros((size + 1,), F64)}
            refused.append((lambda w=wrong: GradientNorm(home, gradients, 1.0, **w), ShapeError, f"{name} has shape"))
            wrong = outputs | {name: home.zeros((size,), F32)}
            refused.append((lambda w=wrong: GradientNorm(home, gradients, 1.0, **w), DTypeError, f"{name} has element"))
        for call, error, message in refused:
            with pytest.raises(error) as raised:
                call()
            assert message in str(raised.value)

    @each_device
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_gradient_norm_shows_any_element_that_is_not_finite(self, device, value):
        home = get_device(device)
        shapes = [(3,), (2, 20000), (1,)]
        sizes = {"squares": 3, "norm": 1, "scale": 1, "partials": 5}
        outputs = {name: home.zeros((size,), F64) for name, size in sizes.items()}
        for index in range(3):
            gradients = [np.ones(shape, F32) for shape in shapes]
            gradients[index].reshape(-1)[-1] = value
            GradientNorm(home, gradients, 1.0, **outputs)([home.upload(g) for g in gradients])
            assert not np.isfinite(outputs["norm"]).any()
            assert [not np.isfinite(square) for square in outputs["squares"]] == [i == index for i in range(3)]
