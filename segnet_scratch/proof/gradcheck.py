"""Numeric against hand-written gradients, in float64: what `segnet gradcheck` runs.

For a random cotangent v the objective is L = sum(v * f(inputs)). Its hand-written gradient is what backward() leaves in
the inputs; the numeric one is the central difference (L(x + eps d) - L(x - eps d)) / 2 eps along a direction d: along
every single element where the inputs are small, else along random directions of each input.

At a kink (a ReLU at 0, a tie in a pooling window) there is no derivative to compare with. Inputs of single ops keep
away from kinks. For a whole network that cannot be arranged, so the signs behind every ReLU and the codes of every
pool must be the same at both ends of a difference; else the step shrinks, then the direction is drawn again.
"""

import difflib
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from math import inf, isfinite
from typing import Any

import numpy as np

from segnet_scratch import ops
from segnet_scratch.autograd import Function, Tensor
from segnet_scratch.device import Device, get_device
from segnet_scratch.errors import ConfigError
from segnet_scratch.ops.cross_entropy import NORMALISATIONS, VOID
from segnet_scratch.ops.max_pool import MaxPool
from segnet_scratch.ops.relu import Relu
from segnet_scratch.ops.windows import CODE, PoolCodes, valid_codes, windows_of
from segnet_scratch.segnet import SegNet, SegNetBasic

STEPS = (1e-6, 1e-7, 1e-8)  # the first one, unless a kink lies between
RTOL, ATOL = 1e-5, 1e-7
SINGLE_ELEMENTS = 500  # so many input elements are checked one by one
DIRECTIONS = 5  # of each input, where there are more
FEW_DIRECTIONS = 2  # of each input of a network, unless the number of cases is given
DRAWS = 3  # of a direction, before a kink is left alone
MAX_SKIPPED = 0.5  # share of differences lost to kinks above which nothing has been shown


@dataclass(frozen=True)
class Where:
    """One derivative: of which case, input and element (or direction), and its two values."""

    case: str
    input: str
    index: str
    numeric: float
    analytic: float

    @property
    def error(self) -> float:
        """|numeric - analytic| as a share of |numeric| + ATOL / RTOL; infinite where a value is not a number."""
        error = abs(self.numeric - self.analytic) / (abs(self.numeric) + ATOL / RTOL)
        return error if isfinite(error) else inf


@dataclass(frozen=True)
class Result:
    """What the check of one op came to. `worst` is the largest error; it passes up to RTOL."""

    op: str
    cases: int
    compared: int  # derivatives
    skipped: float  # share of differences that met a kink
    worst: float
    where: Where | None
    passed: bool
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and strings; a number that is not finite becomes None, as JSON has none."""
        return _finite(asdict(self))

    def __str__(self) -> str:
        line = f"{self.op:13} {'passed' if self.passed else 'FAILED'}  worst error {self.worst:.1e} (limit {RTOL:.0e})"
        line += f"  {self.compared} derivatives, {self.cases} cases, {self.seconds:.1f} s"
        if self.skipped:
            line += f", {self.skipped:.1%} skipped at kinks"
        if not self.passed and self.where is not None:
            w = self.where
            line += f"\n  {w.case}: d/d {w.input}[{w.index}] numeric {w.numeric:.9g}, backward {w.analytic:.9g}"
        return line


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not isfinite(value) else value


# ------------------------------------------------------------------------------------------------ what is checked


@dataclass(frozen=True)
class Problem:
    """A function of some leaf tensors: `forward` computes it from what they hold at the moment."""

    case: str
    leaves: dict[str, Tensor]
    forward: Callable[[], Tensor]


class _Maker:
    """Makes leaves and constants of a problem on a device, and writes down their shapes for the report."""

    def __init__(self, device: Device, rng: np.random.Generator) -> None:
        self.device, self.rng = device, rng
        self.leaves: dict[str, Tensor] = {}

    def leaf(self, name: str, array: np.ndarray) -> Tensor:
        self.leaves[name] = Tensor(self.device.upload(array.astype(np.float64)), self.device, requires_grad=True)
        return self.leaves[name]

    def normal(self, name: str, *shape: int) -> Tensor:
        return self.leaf(name, self.rng.standard_normal(shape))

    def distinct(self, name: str, *shape: int) -> Tensor:
        """Multiples of 0.1 in random order, all different and none nearer to 0 than 0.05: no ties, no kinks."""
        size = int(np.prod(shape))
        return self.leaf(name, (self.rng.permutation(size).reshape(shape) - size // 2 + 0.5) * 0.1)

    def problem(self, forward: Callable[[], Tensor], **options: Any) -> Problem:
        parts = [f"{name} {leaf.shape}" for name, leaf in self.leaves.items()]
        parts += [f"{name} {value}" for name, value in options.items()]
        return Problem(", ".join(parts), self.leaves, forward)


Shape = tuple[int, ...]
# Maps (n, h, w, c) that every op is checked on first: one pixel, odd edges, one row, even; random ones follow.
SHAPES: tuple[Shape, ...] = ((1, 1, 1, 1), (1, 5, 7, 2), (2, 1, 4, 3), (1, 4, 6, 3), (2, 9, 11, 5))


def _shape(rng: np.random.Generator, index: int) -> Shape:
    if index < len(SHAPES):
        return SHAPES[index]
    n, h, w, c = rng.integers(1, (3, 8, 8, 6))
    return int(n), int(h), int(w), int(c)


def _add(make: _Maker, index: int) -> Problem:
    shape = _shape(make.rng, index)
    a, b = make.normal("a", *shape), make.normal("b", *shape)
    if index % 2:  # a tensor used three times: its gradients are added
        return make.problem(lambda: ops.add(ops.add(a, b), ops.add(a, a)), used="3 times")
    return make.problem(lambda: ops.add(a, b))


def _relu(make: _Maker, index: int) -> Problem:
    x = make.distinct("x", *_shape(make.rng, index))
    return make.problem(lambda: ops.relu(x))


def _max_pool(make: _Maker, index: int) -> Problem:
    x = make.distinct("x", *_shape(make.rng, index))
    return make.problem(lambda: ops.max_pool(x)[0])


def _max_unpool(make: _Maker, index: int) -> Problem:
    n, h, w, c = _shape(make.rng, index)
    x = make.normal("x", *windows_of(n, h, w, c))
    chosen = valid_codes(make.rng.integers(0, 4, x.shape, CODE), (h, w))
    codes = PoolCodes(make.device.upload(chosen), (h, w))
    return make.problem(lambda: ops.max_unpool(x, codes), size=(h, w))


def _dropout(make: _Maker, index: int) -> Problem:
    x = make.normal("x", *_shape(make.rng, index))
    p = (0.5, 0.1, 0.0, 0.9)[index % 4]
    state = make.device.upload(np.array([2**33 + index, index], np.uint64))
    return make.problem(lambda: ops.dropout(x, p, layer=index, state=state), p=p)


def _batch_norm(make: _Maker, index: int) -> Problem:
    training = index % 2 == 0
    n, h, w, c = _shape(make.rng, index // 2)
    if training and n * h * w < 4:  # of two values one is always +1, the other -1, and all gradients are 0
        n, h = n + 2, h + 1
    x, weight, bias = make.normal("x", n, h, w, c), make.normal("weight", c), make.normal("bias", c)
    mean, var = make.rng.standard_normal(c), make.rng.uniform(0.5, 2, c)

    def forward() -> Tensor:
        running = make.device.upload(mean.copy()), make.device.upload(var.copy())
        return ops.batch_norm(x, weight, bias, *running, training=training)

    return make.problem(forward, training=training)


# (x, outputs, kernel, stride, padding)
CONVOLUTIONS: tuple[tuple[Shape, int, tuple[int, int], int, int], ...] = (
    ((1, 1, 1, 1), 1, (1, 1), 1, 0),
    ((1, 5, 4, 2), 3, (3, 3), 1, 1),
    ((2, 4, 5, 3), 2, (3, 3), 1, 0),
    ((1, 7, 6, 2), 3, (3, 3), 2, 1),
    ((1, 6, 5, 2), 2, (2, 3), 2, 0),
    ((1, 8, 7, 1), 2, (2, 2), 3, 1),
    ((1, 3, 3, 2), 2, (2, 2), 1, 3),
    ((1, 5, 5, 2), 3, (7, 7), 1, 3),
    ((1, 6, 6, 32), 32, (3, 3), 1, 1),
    ((1, 12, 11, 3), 65, (3, 3), 1, 1),
)


def _conv2d(make: _Maker, index: int) -> Problem:
    rng = make.rng
    if index // 2 < len(CONVOLUTIONS):
        (n, h, w, c), o, (kh, kw), stride, padding = CONVOLUTIONS[index // 2]
    else:
        n, h, w, c = _shape(rng, index)
        o, kh, kw, stride, padding = (int(k) for k in rng.integers((1, 1, 1, 1, 0), (6, 4, 4, 4, 3)))
        kh, kw = min(kh, h + 2 * padding), min(kw, w + 2 * padding)
    rung = "tiled" if index % 2 and stride == 1 else "direct"
    x, weight = make.normal("x", n, h, w, c), make.normal("weight", o, kh, kw, c)
    bias = make.normal("bias", o) if (index // 2) % 3 else None
    return make.problem(
        lambda: ops.conv2d(x, weight, bias, stride, padding, rung), stride=stride, padding=padding, rung=rung
    )


def _conv_transpose2d(make: _Maker, index: int) -> Problem:
    n, h, w, c = _shape(make.rng, index // 2)
    rung = "tiled" if index % 2 else "direct"
    x, weight = make.normal("x", *windows_of(n, h, w, c)), make.normal("weight", c, 4, 4, 1 + index % 3)
    return make.problem(lambda: ops.conv_transpose2d(x, weight, (h, w), rung), size=(h, w), rung=rung)


def _resize_bilinear(make: _Maker, index: int) -> Problem:
    n, h, w, c = _shape(make.rng, index)
    # By turns the size that a pool of stride 2 had, and any other.
    source = windows_of(n, h, w, c) if index % 2 else (n, *(int(k) for k in make.rng.integers(1, 9, 2)), c)
    x = make.normal("x", *source)
    return make.problem(lambda: ops.resize_bilinear(x, (h, w)), size=(h, w))


def _cross_entropy(make: _Maker, index: int) -> Problem:
    n, h, w, _ = _shape(make.rng, index // 4)
    classes = (4, 2, 21, 1)[index // 4 % 4]
    logits = make.leaf("logits", 3 * make.rng.standard_normal((n, h, w, classes)))
    labels = make.rng.integers(0, classes, (n, h, w)).astype(np.uint8)
    labels[make.rng.random(labels.shape) < 0.25] = VOID
    normalisation = NORMALISATIONS[index % 2]
    weights = make.rng.uniform(0.2, 3, classes) if index // 2 % 2 else None
    return make.problem(
        lambda: ops.cross_entropy(logits, labels, weights, normalisation),
        normalisation=normalisation,
        class_weights=weights is not None,
        void=int((labels == VOID).sum()),
    )


# (network, training, dropout, decoder)
NETWORKS: tuple[tuple[type[SegNet], bool, bool, str], ...] = (
    (SegNet, True, False, "indices"),
    (SegNetBasic, True, True, "indices"),
    (SegNet, False, False, "indices"),
    (SegNet, True, False, "bilinear"),
    (SegNet, True, False, "deconv"),
    (SegNetBasic, True, False, "bilinear"),
    (SegNetBasic, True, False, "deconv"),
)


def _segnet(make: _Maker, index: int) -> Problem:
    """A whole network with its loss; every parameter and the image are inputs."""
    kind, training, dropout, decoder = NETWORKS[index % len(NETWORKS)]
    n, h, w = (2, 32, 33) if kind is SegNet else (1, 33, 32)
    seed = int(make.rng.integers(2**31))
    model = kind(3, 1 / 32, make.device, dropout=dropout, decoder=decoder, seed=seed, dtype=np.float64)
    model.train(training)
    model.set_random_state(seed, index)
    for name, buffer in model.named_buffers().items():  # statistics as of a network that has been trained
        low, high = (0.5, 2.0) if name.endswith("var") else (-0.3, 0.3)
        make.device.write(buffer.data, make.rng.uniform(low, high, buffer.data.shape))
    for parameter in model.parameters():
        if len(parameter.shape) == 1:
            make.device.write(parameter.data, parameter.numpy() + 0.2 * make.rng.standard_normal(parameter.shape))
    image = make.normal("image", n, h, w, 3)
    labels = make.rng.integers(0, 3, (n, h, w)).astype(np.uint8)
    labels[make.rng.random(labels.shape) < 0.1] = VOID
    make.leaves.update(model.named_parameters())
    problem = make.problem(lambda: ops.cross_entropy(model(image), labels))
    mode = "training" if training else "evaluation"
    what = f"{model.architecture} in {mode}, decoder {decoder}, image {image.shape}, dropout {dropout}, seed {seed}"
    return replace(problem, case=what)


# How to make the index-th problem of each op, and how many are made unless one asks for more.
_PROBLEMS: dict[str, tuple[Callable[[_Maker, int], Problem], int]] = {
    "add": (_add, 6),
    "batch_norm": (_batch_norm, 14),
    "conv2d": (_conv2d, 2 * len(CONVOLUTIONS) + 4),
    "conv_transpose2d": (_conv_transpose2d, 12),
    "cross_entropy": (_cross_entropy, 16),
    "dropout": (_dropout, 8),
    "max_pool": (_max_pool, 10),
    "max_unpool": (_max_unpool, 10),
    "relu": (_relu, 8),
    "resize_bilinear": (_resize_bilinear, 10),
    "segnet": (_segnet, 2),
}


def names() -> list[str]:
    """What can be checked: the ops, and `segnet`, a whole network."""
    return list(_PROBLEMS)


def gradcheck(
    op_names: Sequence[str] | None = None,
    device: str | Device = "host",
    seed: int = 0,
    cases: int | None = None,
) -> list[Result]:
    """Checks the gradients of these ops (all of `names()` unless given) on a device; one Result for each.

    `cases` is the number of shapes of each op. Unless given it suits the op, and networks, which take longest, are
    checked along FEW_DIRECTIONS of each parameter. ConfigError for an unknown name.
    """
    return list(gradchecks(op_names, device, seed, cases))


def gradchecks(
    op_names: Sequence[str] | None = None,
    device: str | Device = "host",
    seed: int = 0,
    cases: int | None = None,
) -> Iterator[Result]:
    """As `gradcheck`, but gives each Result as soon as there is one."""
    chosen = names() if op_names is None else list(op_names)
    for name in chosen:
        _expect_known(name)
    return (_check_op(name, get_device(device), seed, cases) for name in chosen)


def _expect_known(name: str) -> None:
    if name in _PROBLEMS:
        return
    close = difflib.get_close_matches(name, names(), n=1)
    hint = f"did you mean {close[0]}? The ops are " if close else "expected one of "
    raise ConfigError(f"gradcheck: there is no op {name!r}; {hint}{', '.join(names())}")


# ------------------------------------------------------------------------------------------------ the check


def _check_op(name: str, device: Device, seed: int, cases: int | None) -> Result:
    make_problem, usual = _PROBLEMS[name]
    count = usual if cases is None else cases
    start = time.perf_counter()
    derivatives: list[Where] = []
    directions = FEW_DIRECTIONS if name == "segnet" and cases is None else DIRECTIONS
    attempts = skipped = 0
    for index in range(count):
        rng = np.random.default_rng([seed, zlib.crc32(name.encode()), index])
        with np.errstate(all="ignore"):  # NaN and infinity are found by the comparison
            check = _Check(make_problem(_Maker(device, rng), index), device, rng)
            derivatives += check.derivatives(directions)
        attempts, skipped = attempts + check.attempts, skipped + check.skipped
    where = max(derivatives, key=lambda w: w.error, default=None)
    worst = where.error if where else inf
    share = skipped / max(attempts, 1)
    passed = worst <= RTOL and share <= MAX_SKIPPED
    return Result(name, count, len(derivatives), share, worst, where, passed, time.perf_counter() - start)


class _Check:
    """All derivatives of one problem."""

    def __init__(self, problem: Problem, device: Device, rng: np.random.Generator) -> None:
        self.problem, self.device, self.rng = problem, device, rng
        self.attempts = self.skipped = 0
        y = problem.forward()
        self.cotangent = rng.standard_normal(y.shape)
        self.pattern = _pattern(y, device)
        y.backward(device.upload(self.cotangent))

    def derivatives(self, directions: int = DIRECTIONS) -> Iterator[Where]:
        """Every derivative that has no kink beside it, by both ways."""
        leaves = self.problem.leaves
        every_element = sum(leaf.data.size for leaf in leaves.values()) <= SINGLE_ELEMENTS
        for name, leaf in leaves.items():
            gradient = np.full(leaf.shape, np.nan)  # fails where backward gave nothing, or something else
            if leaf.grad is not None and tuple(leaf.grad.shape) == leaf.shape:
                gradient = self.device.download(leaf.grad)
            elements = list(np.ndindex(leaf.shape)) if every_element else [None] * directions
            for k, element in enumerate(elements):
                found = self._numeric(leaf, element)
                if found is None:
                    continue
                numeric, direction = found
                if element is None:
                    analytic, label = float((gradient * direction).sum()), f"direction {k}"
                else:
                    analytic, label = float(gradient[element]), ", ".join(map(str, element))
                yield Where(self.problem.case, name, label, numeric, analytic)

    def _numeric(self, leaf: Tensor, element: tuple[int, ...] | None) -> tuple[float, np.ndarray] | None:
        """The central difference for an element, or along a random direction, and the direction; None at a kink."""
        for _ in range(DRAWS if element is None else 1):
            if element is None:
                direction = self.rng.standard_normal(leaf.shape)
            else:
                direction = np.zeros(leaf.shape)
                direction[element] = 1
            self.attempts += 1
            for step in STEPS:
                difference = self._difference(leaf, direction, step)
                if difference is not None:
                    return difference, direction
            self.skipped += 1
        return None

    def _difference(self, leaf: Tensor, direction: np.ndarray, step: float) -> float | None:
        at = leaf.numpy().copy()
        values = []
        for sign in (1, -1):
            self.device.write(leaf.data, at + sign * step * direction)
            y = self.problem.forward()
            # Differences of elements first: they are small, and lose less than a difference of sums.
            values.append(y.numpy())
            smooth = _same(self.pattern, _pattern(y, self.device))
            if not smooth:
                break
        self.device.write(leaf.data, at)
        return float((self.cotangent * (values[0] - values[1])).sum() / (2 * step)) if smooth else None


def _pattern(y: Tensor, device: Device) -> list[np.ndarray]:
    """Which side of its kinks the computation of y is on: the sign behind each ReLU, the codes of each pool."""
    pattern: list[np.ndarray] = []
    seen: set[int] = set()
    stack: list[Function] = [y.maker] if y.maker else []
    while stack:
        function = stack.pop()
        if id(function) in seen:
            continue
        seen.add(id(function))
        if isinstance(function, Relu):
            pattern.append(device.download(function.y) > 0)
        elif isinstance(function, MaxPool):
            pattern.append(device.download(function.codes.codes).copy())
        stack.extend(edge.maker for edge in function.inputs if edge.maker)
    return pattern


def _same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
