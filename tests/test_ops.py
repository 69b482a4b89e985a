"""Every op of the table on every device that needs no GPU: the parts of the proof (segnet_scratch.lab.proof.parts),
which `segnet verify` runs as well, here at smaller figures; and PyTorch against the references that they rest on.

By default each op meets its fixed cases and a few random ones; with SEGNET_TEST_FULL=1 the figures of `verify --full`.
"""

import importlib
import pkgutil
from dataclasses import replace

import numpy as np
import pytest
from support import count, raises

import segnet_scratch.ops
from segnet_scratch.errors import DeviceError, DTypeError, ShapeError
from segnet_scratch.lab.proof.compare import deviations, examine, same_bits
from segnet_scratch.lab.proof.launches import kernels_of
from segnet_scratch.lab.proof.parts import PARTS
from segnet_scratch.lab.proof.parts.base import case_of
from segnet_scratch.lab.proof.parts.refusals import EDGES
from segnet_scratch.lab.proof.table import ROWS, row_named
from segnet_scratch.lab.proof.work import FULL, QUICK, Effort
from segnet_scratch.nn.autograd import tensor
from segnet_scratch.nn.functions import max_pool, max_unpool
from segnet_scratch.ops.cases import Case, MapRow, empty_outputs
from segnet_scratch.ops.convolution import winograd
from segnet_scratch.ops.convolution.conv2d import Conv2dBackwardBias, Conv2dBackwardData, Conv2dBackwardWeight
from segnet_scratch.ops.elementwise.dropout import philox
from segnet_scratch.ops.loss.cross_entropy import CrossEntropyBackward, CrossEntropyForward
from segnet_scratch.ops.normalisation.batch_norm import (
    BatchNormBackward,
    BatchNormEvaluationForward,
    BatchNormTrainingForward,
)
from segnet_scratch.ops.op import Buffers, Op, spec, spec_of
from segnet_scratch.ops.optimiser.array_table import columns
from segnet_scratch.ops.optimiser.gradient_norm import GradientNorm
from segnet_scratch.ops.optimiser.sgd import SgdStep
from segnet_scratch.ops.pooling.max_pool import MaxPoolBackward, MaxPoolForward
from segnet_scratch.ops.pooling.max_unpool import MaxUnpoolForward
from segnet_scratch.ops.resampling.resize_bilinear import ResizeBilinearForward
from segnet_scratch.runtime.devices import get_device
from segnet_scratch.runtime.launch import shipped_kernels

USUAL = replace(QUICK, shapes=6, ordered=2, shuffles=2, repeats=3)
EFFORT = Effort(**{name: count(getattr(USUAL, name), getattr(FULL, name)) for name in vars(FULL)})
DEVICES = ("numpy", "host")
F32, F64 = np.dtype(np.float32), np.dtype(np.float64)

each_row = pytest.mark.parametrize("row", [row.name for row in ROWS])
each_device = pytest.mark.parametrize("device", DEVICES)


def rows_of(part):
    """The rows that a part goes over."""
    return pytest.mark.parametrize("row", list(dict.fromkeys(w.target for w in PARTS[part].works("host", EFFORT, 0))))


def prove(part, row, device):
    """All the work of a part on one row; what came of it is empty where everything holds."""
    works = PARTS[part].works(device, EFFORT, 0, (row_named(row),))
    return [str(failure) for work in works for failure in PARTS[part].do(work).failures]


def cases_of(row, random):
    """(index, case): the fixed ones, then random ones."""
    return [(index, case_of(row, index, 0)) for index in range(len(row.cases()) + random)]


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
        assert set().union(*map(kernels_of, ROWS)) == set(shipped_kernels())

    def test_rows_have_names_of_their_own_and_reasons(self):
        assert len({row.name for row in ROWS}) == len(ROWS)
        for row in ROWS:
            reasons = [case.reason for case in row.cases()]
            assert len(set(reasons)) == len(reasons) >= 4, row.name
            assert all(reasons)

    @each_row
    def test_plans_count_work_and_bytes(self, row):
        row = row_named(row)
        for _, case in cases_of(row, 3):
            op = row.plan(case, row.elements[0])
            assert op.flops >= 0
            twice = [op.inputs[name] for name in op.updates]  # read, and written in their place
            assert op.bytes == sum(s.nbytes for s in (*op.inputs.values(), *op.outputs.values(), *twice)) > 0
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
    def test_within_the_bound(self, row, device):
        assert prove("reference", row, device) == []

    @each_device
    @rows_of("integers")
    def test_integers_are_exact(self, row, device):
        assert prove("integers", row, device) == []

    @pytest.mark.parametrize(
        "name", [f"conv2d_{way}_direct" for way in ("forward", "backward_data", "backward_weight")]
    )
    def test_winograd_wherever_it_can_go(self, name, monkeypatch):
        """The numpy device leaves small maps to plain matrix products, and all of the table's are small."""
        monkeypatch.setattr(winograd, "_LEAST_PRODUCTS", 0)
        row, problems = row_named(name), []
        for index, case in cases_of(row, EFFORT.shapes):
            problems += examine(row, case, get_device("numpy"), row.generator(0, index)).defects
            problems += examine(row, case, get_device("numpy"), row.generator(2, index), integers=True).defects
        assert problems == []


class TestSameBits:
    @each_row
    def test_in_every_order_of_threads_and_on_any_number_of_workers(self, row):
        assert prove("orders", row, "host") == []

    @each_device
    @each_row
    def test_again_and_again(self, row, device):
        assert prove("repeats", row, device) == []

    @each_device
    def test_training_again(self, device):
        (work,) = PARTS["training"].works(device, EFFORT, 0)
        assert PARTS["training"].do(work).failures == []


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
            assert examine(row, case, get_device("numpy"), row.generator(0, index)).defects == []

    @pytest.mark.parametrize("fault", FAULTS)
    def test_a_fault_is_found(self, fault):
        compute, report = FAULTS[fault]
        row = self.FakeRow(compute)
        problems = examine(row, Case("odd", {"x": (1, 3, 5, 2)}), get_device("numpy"), row.generator(0, 0)).defects
        assert any(report in str(problem) for problem in problems), problems

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


class TestHostile:
    @each_device
    @rows_of("hostile")
    def test_a_valid_result_or_a_named_error(self, row, device):
        assert prove("hostile", row, device) == []

    @each_device
    @pytest.mark.parametrize("fill", [np.nan, -np.inf])
    def test_pool_of_nothing_else(self, device, fill):
        x = tensor(np.full((1, 5, 3, 2), fill, F32), device)
        y, codes = max_pool(x)
        np.testing.assert_array_equal(y.numpy(), np.full((1, 3, 2, 2), fill))
        assert not codes.codes.any()  # the first position, never -1
        back = max_unpool(y, codes).numpy()
        np.testing.assert_array_equal(back[:, ::2, ::2], y.numpy())


class TestLossEdges:
    @each_device
    @pytest.mark.parametrize("edge", EDGES)
    def test_edge(self, edge, device):
        assert [problem for call in EDGES[edge] for problem in call.problems(get_device(device))] == []


# ------------------------------------------------------------------------------------------------ refused


class TestRefused:
    @each_device
    @each_row
    def test_plans_and_calls(self, row, device):
        assert prove("refusals", row, device) == []

    @each_device
    def test_sgd_step(self, device):
        home = get_device(device)
        w, m, g = (home.zeros((4, 3), F32) for _ in range(3))
        lr, one = (home.upload(np.array([number])) for number in (0.1, 1.0))
        arrays = {"parameter0": w, "gradient0": g, "momentum0": m, "lr": lr, "scale": one}
        step = SgdStep([(4, 3)], [1.0], [0.0], 0.9)

        def call(**wrong):
            return lambda: step.run(home, Buffers(**{**arrays, **wrong}))

        call()()
        refused = [
            (lambda: SgdStep([], [], [], 0.9), ShapeError, "no parameters"),
            (lambda: SgdStep([(4, 3)], [1.0], [0.0], 0.9, np.float16), DTypeError, "float16"),
            (lambda: SgdStep([(0, 3)], [1.0], [0.0], 0.9), ShapeError, "parameter0 is empty"),
            (call(momentum0=None), DeviceError, "momentum0 is a NoneType, no array of"),
            (call(momentum0=m.astype(F64)), DTypeError, "momentum0 has element type float64"),
            (call(momentum0=m.T.copy()), ShapeError, "momentum0 has shape (3, 4)"),
            (call(parameter0=home.zeros((3, 4), F32).T), ShapeError, "C-contiguous"),
            (call(momentum0=m.tolist()), DeviceError, "momentum0 is a list, no array of"),
            (call(gradient0=home.zeros((4, 2), F32)), ShapeError, "gradient0 has shape (4, 2)"),
            (call(gradient0=home.zeros((4, 3), F64)), DTypeError, "gradient0 has element type float64"),
            (call(lr=lr.astype(F32)), DTypeError, "lr has element type float32"),
            (call(lr=home.zeros((2,), F64)), ShapeError, "lr has shape (2,)"),
            (call(scale=one.astype(F32)), DTypeError, "scale has element type float32"),
        ]
        for attempt, error, message in refused:
            with raises(error, message):
                attempt()

    @each_device
    def test_gradient_norm(self, device):
        home = get_device(device)
        norm = GradientNorm([(4, 3), (5,)], 1.0)
        arrays = {
            "gradient0": home.zeros((4, 3), F32),
            "gradient1": home.zeros((5,), F32),
            "scale": home.zeros((1,), F64),
        }
        arrays |= {n: home.zeros(s.shape, s.dtype) for n, s in {**norm.outputs, **norm.workspace}.items()}
        norm.run(home, Buffers(**arrays))
        wrong = [
            ("gradient1", None, DeviceError, "gradient1 is a NoneType"),
            ("gradient0", home.zeros((4, 3), F64), DTypeError, "gradient0 has element type float64"),
            ("scale", home.zeros((2,), F64), ShapeError, "scale has shape (2,)"),
            ("scale", home.zeros((1,), F32), DTypeError, "scale has element type float32"),
        ]
        for name in ("squares", "norm", "partials") if home.runs_kernels else ():  # the launch gate looks at them
            size = arrays[name].size
            wrong.append((name, home.zeros((size + 1,), F64), ShapeError, f"{name} has {size + 1} elements"))
            wrong.append((name, home.zeros((size,), F32), DTypeError, f"{name} has element type float32"))
        refused = [
            (lambda: GradientNorm([], 1.0), ShapeError, "no parameters"),
            (lambda: GradientNorm([(5,)], 0.0), ShapeError, "the largest norm is 0.0"),
            (lambda: GradientNorm([(5,)], np.nan), ShapeError, "the largest norm is nan"),
        ]
        for name, array, *expected in wrong:
            refused.append((lambda n=name, a=array: norm.run(home, Buffers(**{**arrays, n: a})), *expected))
        for call, error, message in refused:
            with raises(error, message):
                call()

    @each_device
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_gradient_norm_shows_any_element_that_is_not_finite(self, device, value):
        home = get_device(device)
        shapes = [(3,), (2, 20000), (1,)]
        norm = GradientNorm(shapes, 1.0)
        outputs = {name: home.zeros(s.shape, F64) for name, s in {**norm.outputs, **norm.workspace}.items()}
        for index in range(3):
            gradients = [np.ones(shape, F32) for shape in shapes]
            gradients[index].reshape(-1)[-1] = value
            given = columns(gradient=[home.upload(g) for g in gradients])
            norm.run(home, Buffers(**given, **outputs, scale=home.zeros((1,), F64)))
            assert not np.isfinite(outputs["norm"]).any()
            assert [not np.isfinite(square) for square in outputs["squares"]] == [i == index for i in range(3)]
