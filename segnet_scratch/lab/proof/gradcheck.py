"""Numeric against hand-written gradients: what `segnet gradcheck` runs.

For a random cotangent v the objective is L = sum(v * f(inputs)). Its hand-written gradient is what backward() leaves in
the inputs; the numeric one is the central difference (L(x + eps d) - L(x - eps d)) / 2 eps along a direction d: along
every single element where the inputs are small, else along random directions of each input. Differences are taken in
float64 always: in float32 they are wrong in the third digit. To check a backward pass in float32, its gradients are
compared with differences of the same function, at the same point, in float64.

At a kink (a ReLU at 0, a tie in a pooling window) there is no derivative to compare with. Inputs of single ops keep
away from kinks, unless a user chooses them. For a whole network that cannot be arranged. So the signs behind every ReLU
and the codes of every pool must be the same at both ends of a difference; else the step shrinks, then the direction is
drawn again, then the place is reported as one without a derivative.
"""

import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import inf, isfinite
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from segnet_scratch.errors import ConfigError
from segnet_scratch.lab.proof.differentiable import Chosen, Maker, Subject, differentiable, differentiables
from segnet_scratch.metrics import plain
from segnet_scratch.nn.autograd import OpFunction, Tensor, topological_order
from segnet_scratch.ops.elementwise.relu import ReluForward
from segnet_scratch.ops.pooling.max_pool import MaxPoolForward
from segnet_scratch.runtime.devices import Device, get_device

STEPS = (1e-6, 1e-7, 1e-8)  # the first one, unless a kink lies between
RTOL = {"float64": 1e-5, "float32": 1e-3}
ATOL = {"float64": 1e-7, "float32": 1e-4}
SINGLE_ELEMENTS = 500  # so many input elements are checked one by one
DIRECTIONS = 5  # of each input, where there are more
FEW_DIRECTIONS = 2  # of each input of a network, unless the number of cases or directions is given
DRAWS = 3  # of a direction, before a kink is left alone
MAX_SKIPPED = 0.5  # share of differences lost to kinks above which nothing has been shown
KINKS_KEPT = 10  # are named in the result


@dataclass(frozen=True)
class Where:
    """One derivative: of which case, input and element (or direction), and its two values."""

    case: str
    input: str
    index: str
    numeric: float
    analytic: float
    dtype: str = "float64"

    @property
    def error(self) -> float:
        """|numeric - analytic| as a share of |numeric| + atol / rtol; infinite where a value is not a number."""
        share = abs(self.numeric) + ATOL[self.dtype] / RTOL[self.dtype]
        error = abs(self.numeric - self.analytic) / share
        return error if isfinite(error) else inf

    @property
    def place(self) -> str:
        """`weight[2, 0, 1, 3]`."""
        return f"{self.input}[{self.index}]"


@dataclass(frozen=True)
class Kink:
    """A place without a derivative."""

    case: str
    input: str
    index: str
    why: str  # "a ReLU at 0", "a tie in a pooling window"

    def __str__(self) -> str:
        return f"{self.input}[{self.index}]: not differentiable here: {self.why} ({self.case})"


@dataclass(frozen=True)
class Result:
    """What the check of one op came to. `worst` is the largest error; it passes up to `limit`."""

    op: str
    dtype: str
    cases: int
    tensors: int  # inputs and parameters of all cases
    compared: int  # derivatives
    skipped: float  # share of differences that met a kink
    worst: float
    where: Where | None
    passed: bool
    seconds: float
    kinks: tuple[Kink, ...] = ()  # the first places that were given up
    uncompared: tuple[str, ...] = ()  # tensors without a single derivative that could be compared

    @property
    def limit(self) -> float:
        """The largest error that passes."""
        return RTOL[self.dtype]

    @property
    def given_up(self) -> int:
        """Differences that met a kink."""
        return round(self.skipped * self.compared / max(1 - self.skipped, 1e-9))

    @property
    def verdict(self) -> str:
        """In a word; "kinks only" where a user's inputs have no derivative anywhere."""
        return ("passed" if self.compared else "kinks only") if self.passed else "FAILED"

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and strings; a number that is not finite becomes None, as JSON has none."""
        return plain({**asdict(self), "limit": self.limit})

    def __str__(self) -> str:
        line = f"{self.op:13} {self.verdict}  worst error {self.worst:.1e} (limit {self.limit:.0e})"
        line += f"  {self.compared} derivatives, {self.cases} cases, {self.seconds:.1f} s"
        if self.skipped:
            line += f", {self.skipped:.1%} skipped at kinks"
        if not self.passed and self.where is not None:
            w = self.where
            line += f"\n  {w.case}: d/d {w.place} numeric {w.numeric:.9g}, backward {w.analytic:.9g}"
        if not self.passed and self.uncompared:
            line += f"\n  nothing to compare with for {', '.join(self.uncompared)}"
        return line


def names() -> list[str]:
    """What is checked: the functions, `segnet` (a whole network), and rows of ops without a function.

    Every row of the table behind a function can be checked by its own name, too.
    """
    return list(differentiables())


def gradcheck(
    op_names: Sequence[str] | None = None,
    device: str | Device = "host",
    seed: int = 0,
    cases: int | None = None,
    *,
    dtype: DTypeLike = np.float64,
    directions: int | None = None,
    chosen: Chosen | None = None,
) -> Iterator[Result]:
    """Checks the gradients of these ops (all of `names()` unless given); gives each Result as soon as there is one.

    `cases` is the number of shapes of each op. Unless given it suits the op, and networks, which take longest, are
    checked along FEW_DIRECTIONS of each parameter. ConfigError for an unknown name, before anything is computed.
    `dtype` is that of the backward pass that is checked, `directions` their number for each input of more than
    SINGLE_ELEMENTS elements, `chosen` what a user chose of a single op: then `cases` (1) are so many fillings of it.
    """
    chosen, narrow = chosen or Chosen(), np.dtype(dtype) != np.float64
    wanted = [name for name in names() if not (narrow and name == "segnet")] if op_names is None else list(op_names)
    for name in wanted:
        differentiable(name).expect_known(chosen)
        if narrow and name == "segnet":
            why = "rounding alone moves the maximum of pooling windows (docs/explanation/numerics.md)"
            raise ConfigError(f"gradcheck: a network cannot be checked in float32: {why}; use float64 for segnet")
    if chosen.sizes and len(wanted) != 1:
        raise ConfigError(f"gradcheck: shapes, options and contents are those of one op; got {len(wanted)} ops")

    def check(name: str) -> Result:
        count = cases if cases is not None else 1 if chosen.sizes else differentiable(name).usual
        along = directions or (FEW_DIRECTIONS if name == "segnet" and cases is None else DIRECTIONS)
        return check_cases(name, get_device(device), seed, range(count), dtype, along, chosen)

    return (check(name) for name in wanted)


def check_cases(
    name: str,
    device: Device,
    seed: int,
    indices: Sequence[int],
    dtype: DTypeLike = np.float64,
    directions: int = DIRECTIONS,
    chosen: Chosen | None = None,
) -> Result:
    """Checks the cases of an op that have these numbers."""
    chosen, dtype = chosen or Chosen(), np.dtype(dtype)
    start = time.perf_counter()
    checks: list[GradientCheck] = []
    derivatives: list[Where] = []
    uncompared: list[str] = []
    for index in indices:
        with np.errstate(all="ignore"):  # NaN and infinity are found by the comparison
            made = []
            for storage in dict.fromkeys((np.dtype(np.float64), dtype)):
                rng = np.random.default_rng([seed, zlib.crc32(name.encode()), index])
                made.append(differentiable(name).make(Maker(device, rng, dtype, storage, chosen), index))
            check = GradientCheck(made[0], device, rng, made[-1], may_tie=chosen.may_tie)
            found = list(check.derivatives(directions))
        checks.append(check)
        derivatives += found
        compared = {where.input for where in found}
        uncompared += [f"{leaf} ({check.case})" for leaf in check.leaves if leaf not in compared]
    attempts = sum(check.attempts for check in checks)
    share = sum(check.skipped for check in checks) / max(attempts, 1)
    where = max(derivatives, key=lambda w: w.error, default=None)
    worst = where.error if where else 0.0 if chosen.may_tie else inf
    return Result(
        *(name, dtype.name, len(indices), sum(len(check.leaves) for check in checks), len(derivatives)),
        *(share, worst, where),
        passed=worst <= RTOL[dtype.name] and (chosen.may_tie or (share <= MAX_SKIPPED and not uncompared)),
        seconds=time.perf_counter() - start,
        kinks=tuple([kink for check in checks for kink in check.kinks][:KINKS_KEPT]),
        uncompared=tuple(uncompared),
    )


Pattern = list[tuple[str, np.ndarray]]  # what makes a kink, and on which side of it each element is


class GradientCheck:
    """All derivatives of one subject. `narrow` is the same one in the precision that is checked."""

    def __init__(
        self, subject: Subject, device: Device, rng: np.random.Generator, narrow: Subject, may_tie: bool = False
    ) -> None:
        self.case, self.leaves, self.forward = subject.case, subject.leaves, subject.forward
        self.device, self.rng, self.may_tie, self._narrow = device, rng, may_tie, narrow.leaves
        self.attempts = self.skipped = 0
        self.kinks: list[Kink] = []
        y = narrow.forward()
        self.cotangent = rng.standard_normal(y.shape).astype(y.dtype)
        self.pattern = _pattern(y if narrow is subject else subject.forward(), device)
        y.backward(device.upload(self.cotangent))

    def derivatives(self, directions: int = DIRECTIONS) -> Iterator[Where]:
        """Every derivative that has no kink beside it, by both ways."""
        total = sum(leaf.data.size for leaf in self.leaves.values())
        for name, leaf in self.leaves.items():
            narrow = self._narrow[name]
            gradient = np.full(leaf.shape, np.nan)  # fails where backward gave nothing, or something else
            if narrow.grad is not None and tuple(narrow.grad.shape) == leaf.shape and narrow.grad.dtype == narrow.dtype:
                gradient = self.device.download(narrow.grad).astype(np.float64)
            for label, draws in self._directions(leaf, directions, total):
                for along in draws:
                    self.attempts += 1
                    numeric = self._numeric(leaf, along)
                    if isinstance(numeric, float):
                        analytic = float((gradient * along)[along != 0].sum())
                        yield Where(self.case, name, label, numeric, analytic, narrow.dtype.name)
                        break
                    self.skipped += 1
                else:
                    self.kinks.append(Kink(self.case, name, label, str(numeric)))

    def _directions(self, leaf: Tensor, directions: int, total: int) -> Iterator[tuple[str, Iterator[np.ndarray]]]:
        """(label, directions) of every derivative of a leaf; of these one counts that crosses no kink.

        A random direction crosses every kink there is: where there may be ties, elements are drawn instead.
        """
        size = leaf.data.size
        if total > SINGLE_ELEMENTS and not self.may_tie:
            for k in range(directions):
                yield f"direction {k}", (self.rng.standard_normal(leaf.shape) for _ in range(DRAWS))
            return
        share = max(1, SINGLE_ELEMENTS // len(self.leaves))
        for flat in range(size) if total <= SINGLE_ELEMENTS else sorted(self.rng.permutation(size)[:share]):
            direction = np.zeros(leaf.shape)
            direction.reshape(-1)[flat] = 1
            yield ", ".join(str(int(i)) for i in np.unravel_index(flat, leaf.shape)), iter([direction])

    def _numeric(self, leaf: Tensor, along: np.ndarray) -> float | str:
        """The central difference along a direction by the first step that crosses no kink; else what kink it is."""
        at, why = leaf.numpy().copy(), ""
        for step in STEPS:
            values = []
            try:
                for sign in (1, -1):
                    self.device.write(leaf.data, at + sign * step * along)
                    y = self.forward()
                    # Differences of elements first: they are small, and lose less than a difference of sums.
                    values.append(y.numpy())
                    if why := _unlike(self.pattern, _pattern(y, self.device)):
                        break
            finally:
                self.device.write(leaf.data, at)
            if not why:
                return float((self.cotangent * (values[0] - values[1])).sum() / (2 * step))
        return why


def _pattern(y: Tensor, device: Device) -> Pattern:
    """Which side of its kinks the computation of y is on: the sign behind each ReLU, the codes of each pool."""
    pattern: Pattern = []
    for function in topological_order(y.grad_fn) if y.grad_fn else ():
        if isinstance(function, OpFunction) and isinstance(function.op, ReluForward):
            pattern.append(("a ReLU at 0", device.download(function.saved["y"]) > 0))
        elif isinstance(function, OpFunction) and isinstance(function.op, MaxPoolForward):
            pattern.append(("a tie in a pooling window", device.download(function.saved["codes"]).copy()))
    return pattern


def _unlike(a: Pattern, b: Pattern) -> str:
    """What makes the first kink between two points, and where it is; "" where none lies between."""
    for (what, one), (_, other) in zip(a, b, strict=True):
        if not np.array_equal(one, other):
            where = np.argwhere(one != other)[0] if one.shape == other.shape else []
            return f"{what}, at {tuple(int(i) for i in where)}"
    return ""
