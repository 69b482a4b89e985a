"""The gradient check passes what is right, and finds what is wrong: in Python, in kernels, anywhere."""

import inspect
import json
import re

import numpy as np
import pytest
from support import FULL
from support.kernels import needs_compiler, needs_sanitizers

from segnet_scratch.errors import ConfigError, ShapeError
from segnet_scratch.lab.proof import differentiable as subjects
from segnet_scratch.lab.proof import table
from segnet_scratch.lab.proof.differentiable import Chosen, Subject, differentiable
from segnet_scratch.lab.proof.gradcheck import DRAWS, GradientCheck, Where, gradcheck, names
from segnet_scratch.lab.proof.gradcheck import RTOL as LIMITS
from segnet_scratch.lab.proof.parts.gradients import Gradients
from segnet_scratch.lab.proof.work import QUICK
from segnet_scratch.nn import functions
from segnet_scratch.nn.autograd import Arithmetic, OpFunction, Tensor, Unary
from segnet_scratch.nn.functions import Dropout, Fit
from segnet_scratch.ops.cases import MapRow
from segnet_scratch.ops.elementwise.arithmetic import BINARY
from segnet_scratch.ops.elementwise.cases import ReluRow
from segnet_scratch.ops.op import Op
from segnet_scratch.runtime.devices import get_device

RTOL = LIMITS["float64"]
each_device = pytest.mark.parametrize("device", ["numpy", "host"])
OWN = {"add": Arithmetic, "elementwise": Unary, "softmax": Unary, "dropout": Dropout}
OWN["fit"] = Fit
FUNCTIONS = sorted({*names()} - {"arithmetic", "segnet", "sum_forward"})


def spoil(monkeypatch, name, change):
    """Changes what the backward pass of a function gives."""
    function = OWN.get(name, OpFunction)
    right = function.backward

    def wrong(self, dy):
        mine = function is not OpFunction or self.op.name.startswith(name)
        return change(right(self, dy)) if mine else right(self, dy)

    monkeypatch.setattr(function, "backward", wrong)


class TestWhatIsRight:
    def test_every_differentiable_op_can_be_checked(self):
        defined = {
            name for name, f in vars(functions).items() if inspect.isfunction(f) and f.__module__ == functions.__name__
        }
        assert {name for name in defined if not name.startswith("_")} | {"segnet", "sum_forward"} == set(names())

    @each_device
    @pytest.mark.parametrize("name", names())
    def test_passes(self, name, device, monkeypatch):
        narrow = (name, device) == ("segnet", "host") and not FULL
        if narrow:  # SegNet takes half a minute; test_torch_parity.py has it
            monkeypatch.setattr(subjects, "NETWORKS", subjects.NETWORKS[1:2])  # SegNet-Basic
        (result,) = gradcheck([name], device, directions=None if FULL or name != "segnet" else 1)
        assert result.passed, str(result)
        assert result.op == name
        assert result.worst <= RTOL / 10  # far from the limit: no luck is needed
        assert result.compared > (50 if narrow else 100 if name == "segnet" else 200)
        assert result.skipped < 0.05

    def test_another_seed_and_number_of_cases(self):
        first, second = (next(gradcheck(["conv2d"], "numpy", seed=seed, cases=3)) for seed in (1, 2))
        assert first.passed
        assert second.passed
        assert first.cases == 3
        assert first.where != second.where
        assert next(gradcheck(["conv2d"], "numpy", seed=1, cases=3)).where == first.where

    def test_results_come_one_by_one_and_in_the_order_asked_for(self):
        results = gradcheck(["relu", "add"], "numpy", cases=1)
        assert [next(results).op, next(results).op] == ["relu", "add"]
        assert [result.op for result in gradcheck((), "numpy")] == []

    @pytest.mark.parametrize(
        ("name", "hint"), [("max_poool", "did you mean max_pool?"), ("zzz", "expected one of add,")]
    )
    def test_an_unknown_name(self, name, hint):
        with pytest.raises(ConfigError, match="there is no op") as raised:
            gradcheck(["relu", name], "numpy")
        assert hint in str(raised.value)
        assert all(known in str(raised.value) for known in names())


class TestReports:
    def test_one_line_and_json(self):
        (result,) = gradcheck(["relu"], "numpy", cases=2)
        line = str(result)
        assert line.startswith("relu ")
        assert "passed" in line
        assert "\n" not in line
        data = json.loads(json.dumps(result.to_json(), allow_nan=False))
        assert data["op"] == "relu"
        assert data["passed"] is True
        assert data["cases"] == 2
        assert 0 <= data["worst"] < RTOL
        assert data["where"].keys() == {"case", "input", "index", "numeric", "analytic", "dtype"}

    def test_a_failure_names_the_derivative(self, monkeypatch):
        spoil(monkeypatch, "conv2d", lambda d: (d[0], np.roll(d[1], 1), *d[2:]))
        (result,) = gradcheck(["conv2d"], "numpy", cases=6)
        assert not result.passed
        assert result.where is not None
        assert result.where.input == "weight"
        assert f"d/d weight[{result.where.index}] numeric" in str(result)
        assert "FAILED" in str(result)
        assert "stride 1, padding" in result.where.case

    def test_nan_is_null_in_json(self, monkeypatch):
        spoil(monkeypatch, "relu", lambda d: (d[0] * np.nan,))
        (result,) = gradcheck(["relu"], "numpy", cases=1)
        assert not result.passed
        data = json.loads(json.dumps(result.to_json(), allow_nan=False))
        assert data["worst"] is None
        assert data["where"]["analytic"] is None

    def test_the_error_of_a_derivative(self):
        assert Where("", "x", "0", 1.0, 1.0).error == 0
        assert Where("", "x", "0", 100.0, 100.0 * (1 + 1e-5)).error == pytest.approx(1e-5, rel=1e-3)
        assert Where("", "x", "0", 0.0, 0.99e-7).error < RTOL < Where("", "x", "0", 0.0, 1.01e-7).error
        for numeric, analytic in ((np.nan, 1.0), (1.0, np.nan), (np.inf, np.inf), (1.0, -np.inf)):
            assert Where("", "x", "0", numeric, analytic).error == np.inf


def _poke(array, value):
    array = array.copy()
    array.reshape(-1)[array.size // 2] = value
    return array


MUTATIONS = {
    "sign flipped": lambda d: (-d[0], *d[1:]),
    "sign of the last input flipped": lambda d: (*d[:-1], -d[-1]),
    "off by one part in 10,000": lambda d: (d[0] * (1 + 1e-4), *d[1:]),
    "shifted by one element": lambda d: (np.roll(d[0], 1), *d[1:]),
    "one element NaN": lambda d: (_poke(d[0], np.nan), *d[1:]),
    "one element infinite": lambda d: (_poke(d[0], np.inf), *d[1:]),
    "one element too large": lambda d: (_poke(d[0], 3.3), *d[1:]),
    "nothing": lambda d: (None, *d[1:]),
    "zero": lambda d: (0 * d[0], *d[1:]),
}


class TestWhatIsWrong:
    """Faults in backward passes; those in kernels are in test_mutants.py."""

    @pytest.mark.parametrize("mutation", MUTATIONS)
    @pytest.mark.parametrize("name", FUNCTIONS)
    def test_a_wrong_backward_is_found(self, name, mutation, monkeypatch):
        spoil(monkeypatch, name, MUTATIONS[mutation])
        (result,) = gradcheck([name], "numpy", cases=3)
        assert not result.passed

    @pytest.mark.parametrize("operation", BINARY)
    @pytest.mark.parametrize("operand", ["_of_a", "_of_b"])
    def test_a_wrong_gradient_of_one_operation_is_found(self, operation, operand, monkeypatch):
        if (operation, operand) == ("power", "_of_b"):
            pytest.skip("an exponent is a number")
        right = getattr(Arithmetic, operand)

        def wrong(self, dy):
            return right(self, dy) * (1 + 1e-4 * (self.operation == operation))

        monkeypatch.setattr(Arithmetic, operand, wrong)
        (result,) = gradcheck(["arithmetic"], "numpy", cases=10)
        assert not result.passed

    @pytest.mark.parametrize(
        ("name", "mutation"), [("batch_norm", "off by one part in 10,000"), ("max_unpool", "one element NaN")]
    )
    def test_a_wrong_backward_is_found_in_the_network(self, name, mutation, monkeypatch):
        spoil(monkeypatch, name, MUTATIONS[mutation])
        monkeypatch.setattr(subjects, "NETWORKS", subjects.NETWORKS[1:2])  # SegNet-Basic
        (result,) = gradcheck(["segnet"], "numpy", cases=1, directions=2)
        assert not result.passed


class TestKinks:
    @staticmethod
    def check(values):
        device = get_device("numpy")
        x = Tensor(np.array([values]), device, requires_grad=True)
        subject = Subject("relu", {"x": x}, lambda: functions.relu(x))
        return GradientCheck(subject, device, np.random.default_rng(0), subject)

    @pytest.mark.parametrize("values", [[1.0, -1.0], [5e-7, -5e-8]], ids=["away from kinks", "near one: smaller steps"])
    def test_nothing_is_skipped(self, values):
        check = self.check(values)
        assert [w.error <= RTOL for w in check.derivatives()] == [True, True]
        assert (check.attempts >= 2, check.skipped) == (True, 0)

    def test_at_a_kink_there_is_nothing_to_compare(self):
        check = self.check([0.0, 1.0])
        (where,) = check.derivatives()
        assert where.index == "0, 1"
        assert (check.attempts, check.skipped) == (2, 1)

    def test_directions_are_drawn_again(self):
        values = np.ones(600)
        values[0] = 0.0
        check = self.check(values)
        assert list(check.derivatives(directions=2)) == []
        assert check.attempts == check.skipped == 2 * DRAWS

    def test_a_tie_in_a_pool_is_a_kink(self):
        device = get_device("numpy")
        x = Tensor(np.ones((1, 2, 2, 1)), device, requires_grad=True)
        subject = Subject("pool", {"x": x}, lambda: functions.max_pool(x)[0])
        check = GradientCheck(subject, device, np.random.default_rng(0), subject)
        assert list(check.derivatives()) == []

    def test_too_many_kinks_prove_nothing(self, monkeypatch):
        monkeypatch.setattr(ReluRow, "inputs", lambda row, op, *_: {"x": np.zeros(op.inputs["x"].shape)})
        (result,) = gradcheck(["relu"], "numpy", cases=1)
        assert result.skipped == 1
        assert result.compared == 0
        assert not result.passed

    def test_leaves_keep_their_values(self):
        check = self.check([1.0, -1.0])
        leaf = check.leaves["x"]
        before = leaf.numpy().copy()
        list(check.derivatives())
        np.testing.assert_array_equal(leaf.numpy(), before)


class TestChosen:
    """Shapes, options and contents that a user gives."""

    @pytest.mark.parametrize("name", [name for name in names() if name != "sum_forward"])  # no function of four sides
    def test_one_shape_is_enough(self, name):
        first = differentiable(name).arrays[0]
        shape = (1, 32, 32, 3) if name == "segnet" else (1, 4, 3, 2)
        options = {"architecture": "segnet-basic"} if name == "segnet" else {}
        (result,) = gradcheck([name], "numpy", chosen=Chosen({first: shape}, options), directions=1)
        assert result.passed, str(result)
        assert f"{first} {shape}" in result.where.case
        assert result.cases == 1

    def test_directions_of_large_inputs(self):
        for directions in (1, 7):
            (result,) = gradcheck(["add"], "numpy", chosen=Chosen({"a": (2, 300)}), directions=directions)
            assert result.compared == 2 * directions

    @pytest.mark.parametrize(
        ("name", "chosen", "message"),
        [
            ("relu", Chosen({"y": (1, 2)}), "relu has no array 'y'; it has x"),
            ("relu", Chosen(arguments={"p": 1}), "relu has no option 'p'; it has none"),
            ("conv2d", Chosen({"weight": (3, 3, 3, 2)}), "conv2d needs the shape of x .*--shape x=2,9,7,3"),
            ("conv2d", Chosen({"x": (1, 4, 4, 1)}, {"stride": 1.5}), "stride is 1.5; expected an integer, such as 1"),
            ("conv2d", Chosen({"x": (1, 4, 4, 1)}, {"rung": 3}), "rung is 3; expected a name"),
            ("dropout", Chosen({"x": (1, 4)}, {"p": "half"}), "p is 'half'; expected a number"),
        ],
    )
    def test_wrong_usage(self, name, chosen, message):
        with pytest.raises(ConfigError, match=message):
            gradcheck([name], "numpy", chosen=chosen)

    def test_shapes_are_those_of_one_op(self):
        with pytest.raises(ConfigError, match="those of one op; got 2 ops"):
            gradcheck(["relu", "max_pool"], "numpy", chosen=Chosen({"x": (1, 2, 2, 1)}))

    def test_shapes_that_an_op_refuses(self):
        with pytest.raises(ShapeError, match="channels last"):
            list(gradcheck(["max_pool"], "numpy", chosen=Chosen({"x": (2, 3)})))
        with pytest.raises(ShapeError, match=r"contents of weight have shape \(2,\), expected \(3,\)"):
            list(
                gradcheck(["batch_norm"], "numpy", chosen=Chosen({"x": (1, 2, 2, 3)}, contents={"weight": np.ones(2)}))
            )

    def test_contents(self):
        x = np.array([[[[3.0], [1.0]], [[2.0], [3.0]]]])  # two maxima
        (result,) = gradcheck(["max_pool"], "numpy", chosen=Chosen(contents={"x": x}))
        assert result.passed
        assert result.compared == 2
        assert [(kink.index, kink.why) for kink in result.kinks] == [
            ("0, 0, 0, 0", "a tie in a pooling window, at (0, 0, 0, 0)"),
            ("0, 1, 1, 0", "a tie in a pooling window, at (0, 0, 0, 0)"),
        ]

    def test_nowhere_differentiable(self):
        (result,) = gradcheck(["relu"], "numpy", chosen=Chosen({"x": (3,)}, contents={"x": 0.0}))
        assert (result.verdict, result.passed, result.compared, len(result.kinks)) == ("kinks only", True, 0, 3)
        assert str(result.kinks[0]).startswith("x[0]: not differentiable here: a ReLU at 0, at (0,)")

    @pytest.mark.parametrize("name", ["relu", "max_pool"])
    def test_ties(self, name, monkeypatch):
        (result,) = gradcheck([name], "numpy", cases=5, chosen=Chosen(ties=True))
        assert result.passed
        assert result.kinks
        assert result.compared > 100
        # A fault elsewhere is found all the same.
        spoil(monkeypatch, name, lambda d: (1.01 * d[0],))
        (result,) = gradcheck([name], "numpy", cases=5, chosen=Chosen(ties=True))
        assert not result.passed

    def test_ties_of_large_inputs_are_checked_by_element(self):
        (result,) = gradcheck(["relu"], "numpy", chosen=Chosen({"x": (1, 30, 30, 2)}, ties=True))
        assert result.passed
        assert 300 < result.compared < 500
        assert 0.1 < result.skipped < 0.3  # one integer of five is 0


class TestFloat32:
    @each_device
    @pytest.mark.parametrize("name", [name for name in names() if name != "segnet"])
    def test_passes(self, name, device):
        (result,) = gradcheck([name], device, cases=6, dtype=np.float32)
        assert result.passed, str(result)
        assert result.dtype == "float32"
        assert result.limit == LIMITS["float32"]
        assert result.worst <= result.limit / 10

    @pytest.mark.parametrize("name", FUNCTIONS)
    def test_an_error_of_a_percent_is_found(self, name, monkeypatch):
        spoil(monkeypatch, name, lambda d: (d[0] * d[0].dtype.type(1.01), *d[1:]))
        (result,) = gradcheck([name], "numpy", cases=6, dtype=np.float32)
        assert not result.passed

    def test_a_gradient_of_another_type_is_found(self, monkeypatch):
        spoil(monkeypatch, "relu", lambda d: (d[0].astype(np.float64),))
        (result,) = gradcheck(["relu"], "numpy", cases=6, dtype=np.float32)
        assert not result.passed

    def test_a_network_is_refused(self):
        with pytest.raises(ConfigError, match="use float64 for segnet"):
            gradcheck(["segnet"], "numpy", dtype=np.float32)


class TestCommand:
    def test_a_shape_an_option_and_a_file(self, segnet, tmp_path):
        np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((1, 5, 4, 2)))
        done = segnet(
            *("gradcheck", "conv2d", "--input", f"x={tmp_path / 'x.npy'}", "--shape", "weight=2,3,3,2"),
            *("--arg", "stride=2", "--arg", "rung=direct", "--device", "numpy", "--json", tmp_path / "g.json"),
        )
        assert done.code == 0, done.err
        (result,) = json.loads((tmp_path / "g.json").read_text())
        case = "x (1, 5, 4, 2), weight (2, 3, 3, 2), bias (2,), stride 2, padding 1, rung direct"
        assert case in result["where"]["case"]
        assert result["compared"] == 40 + 36 + 2

    def test_the_worst_element_is_shown(self, segnet, monkeypatch):
        spoil(monkeypatch, "relu", lambda d: (_poke(d[0], 3.3),))
        done = segnet("gradcheck", "relu", "--shape", "x=1,3,3,1", "--device", "numpy")
        assert done.code == 1
        assert re.search(r"relu\W+FAILED", done.out)
        assert "d/d x[0, 1, 1, 0] numeric" in done.out
        assert "backward 3.3" in done.out
        assert "\\n" not in done.out
        assert "the gradients of relu differ" in done.err

    def test_kinks_are_named(self, segnet):
        done = segnet("gradcheck", "relu", "--input", "x=0", "--shape", "x=2,2", "--device", "numpy")
        assert done.code == 0
        assert "relu: x[0, 1]: not differentiable here: a ReLU at 0, at (0, 1)" in done.out
        assert "nothing is shown" in done.out

    @needs_compiler
    def test_another_order(self, segnet):
        assert segnet("gradcheck", "batch_norm", "--cases", "2", "--order", "shuffled", "--seed", "3").code == 0

    @needs_sanitizers
    def test_under_the_sanitizers(self, segnet):
        done = segnet("gradcheck", "relu", "--cases", "1", "--sanitize")
        assert done.code == 0, done.err
        assert "1 op passed on host" in done.out

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("relu", "--shape", "x"), "expected NAME=VALUE"),
            (("relu", "--shape", "x=0,3"), "expected positive sizes"),
            (("relu", "--input", "x=random"), "expected FILE.npy or a number"),
            (("relu", "--dtype", "float16"), "--dtype float16: expected one of float64, float32"),
            (("relu", "--device", "numpy", "--order", "descending"), "work on the host device, not on numpy"),
            (("relu", "--device", "numpy", "--sanitize"), "works on the host device, not on numpy"),
            (("relu", "--order", "backwards"), "--order backwards: expected one of ascending"),
        ],
    )
    def test_wrong_usage(self, segnet, arguments, message):
        done = segnet("gradcheck", *arguments)
        assert done.code == 2
        assert message in " ".join(done.err.replace("│", " ").split())


class _Power(Op):
    """y = scale x^2, as somebody adds it; NumPy alone."""

    name = "power_forward"

    def __init__(self, x, *backward):
        self.inputs = {"x": x, "scale": x}
        self.outputs, self.backward = {"y": x}, dict(backward)

    def gradient(self):
        return (_PowerBackward(self.inputs["x"], **self.backward),)

    def reference(self, b):
        b.y[...] = b.scale * b.x**2


class _PowerBackward(Op):
    name = "power_backward"

    def __init__(self, x, factor=2.0, given=("dx", "dscale")):
        self.factor = factor
        self.inputs = {"x": x, "scale": x, "dy": x}
        self.outputs = dict.fromkeys(given, x)

    def reference(self, b):
        b.dx[...] = self.factor * b.scale * b.x * b.dy
        if "dscale" in self.outputs:
            b.dscale[...] = b.x**2 * b.dy


class _PowerRow(MapRow):
    def __init__(self, **backward):
        super().__init__(_Power, options=tuple(backward.items()))


class TestRowsOfTheOpTable:
    """What a row declares with a backward is checked, and known by name, without another table."""

    def test_a_row_that_is_added_is_checked_with_all_others(self, monkeypatch):
        monkeypatch.setattr(table, "ROWS", (*table.ROWS, _PowerRow()))
        assert "power_forward" in names()
        (result,) = gradcheck(["power_forward"], "numpy")
        assert result.passed
        assert result.tensors == 2 * result.cases
        assert any(work.target == "power_forward" for work in Gradients().works("numpy", QUICK, 0, table.ROWS))

    @pytest.mark.parametrize("row", [_PowerRow(factor=-2.0), _PowerRow(factor=2.001), _PowerRow(given=("dx",))])
    def test_a_wrong_backward_fails(self, monkeypatch, row):
        monkeypatch.setattr(table, "ROWS", (*table.ROWS, row))
        (result,) = gradcheck(["power_forward"], "numpy")
        assert not result.passed

    @pytest.mark.parametrize("name", ["relu_forward", "conv2d_forward_direct", "cross_entropy_forward_valid"])
    def test_a_row_can_be_checked_by_itself(self, name):
        (result,) = gradcheck([name], "host", cases=3)
        assert result.passed
        assert result.op == name
        assert result.compared > 10

    def test_sizes_of_an_op_without_a_function_are_chosen_like_those_of_others(self, monkeypatch):
        monkeypatch.setattr(table, "ROWS", (*table.ROWS, _PowerRow()))
        (result,) = gradcheck(["power_forward"], "numpy", chosen=Chosen(shapes={"x": (1, 2, 2, 1)}))
        assert (result.passed, result.compared) == (True, 8)
