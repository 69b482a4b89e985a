"""What the gradient check differentiates: each differentiable op with its shapes and options, and whole networks.

An op has usual cases (the first ones chosen by hand, random ones after them), or takes shapes, options and contents
from a user. Inputs keep away from kinks, unless a user chooses them: all are normal, those of ReLU and pooling are
distinct multiples of 0.1.
"""

import difflib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from segnet_scratch.errors import ConfigError, SegnetError, ShapeError
from segnet_scratch.lab.proof import table
from segnet_scratch.nn import functions
from segnet_scratch.nn.autograd import Function, Tensor
from segnet_scratch.ops.cases import Case, Row
from segnet_scratch.ops.convolution.conv2d import RUNGS, choose_rung
from segnet_scratch.ops.convolution.conv2d_geometry import Geometry
from segnet_scratch.ops.loss.cross_entropy import NORMALISATIONS, VOID
from segnet_scratch.ops.op import Op
from segnet_scratch.ops.pooling.windows import CODE, PoolCodes, valid_codes, windows_of
from segnet_scratch.runtime.devices import Array, Device
from segnet_scratch.runtime.precision import is_floating
from segnet_scratch.segnet import ARCHITECTURES

Shape = tuple[int, ...]
Sizes = dict[str, Any]  # shapes of arrays, and options


@dataclass(frozen=True)
class Problem:
    """A function of some leaf tensors: `forward` computes it from what they hold at the moment."""

    case: str
    leaves: dict[str, Tensor]
    forward: Callable[[], Tensor]


@dataclass(frozen=True)
class Chosen:
    """What a user chose in place of the usual shapes, options and contents. With `ties` inputs are small integers."""

    shapes: Mapping[str, Shape] = field(default_factory=dict)
    arguments: Mapping[str, int | float | str] = field(default_factory=dict)
    contents: Mapping[str, np.ndarray | float] = field(default_factory=dict)
    ties: bool = False

    @property
    def sizes(self) -> bool:
        """Did the user choose shapes or options, and not only how inputs are filled?"""
        return bool(self.shapes or self.arguments or self.contents)

    @property
    def may_tie(self) -> bool:
        """May inputs lie at kinks?"""
        return self.ties or bool(self.contents)


class Maker:
    """Makes the tensors of a problem on a device. Values are those that `values` can hold, kept as `storage`.

    Two makers with the same random numbers and `values` but unlike `storage` make the same problem in two precisions.
    """

    def __init__(
        self,
        device: Device,
        rng: np.random.Generator,
        values: np.dtype,
        storage: np.dtype,
        chosen: Chosen,
    ) -> None:
        self.device, self.rng, self.values, self.storage, self.chosen = device, rng, values, storage, chosen
        self.leaves: dict[str, Tensor] = {}

    def leaf(self, name: str, shape: Shape, distinct: bool = False, scale: float = 1.0) -> Tensor:
        """A tensor whose gradient is checked; `distinct`: no ties, and no element nearer to 0 than 0.05."""
        given = self.given(name, shape)
        if given is not None:
            drawn = given
        elif self.chosen.ties:
            drawn = self.rng.integers(-2, 3, shape)
        elif distinct:
            size = int(np.prod(shape))
            drawn = (self.rng.permutation(size).reshape(shape) - size // 2 + 0.5) * 0.1
        else:
            drawn = scale * self.rng.standard_normal(shape)
        self.leaves[name] = Tensor(self.constant(drawn), self.device, requires_grad=True)
        return self.leaves[name]

    def given(self, name: str, shape: Shape) -> np.ndarray | None:
        """The contents that the user chose, if any; a number stands for every element. ShapeError where they misfit."""
        contents = self.chosen.contents.get(name)
        if contents is None:
            return None
        array = np.asarray(contents)
        if array.ndim and array.shape != shape:
            raise ShapeError(f"gradcheck: the contents of {name} have shape {array.shape}, expected {shape}")
        return np.broadcast_to(array, shape)

    def constant(self, array: np.ndarray) -> Array:
        """An array on the device that is no leaf."""
        return self.device.upload(np.array(array, self.values).astype(self.storage))

    def problem(self, forward: Callable[[], Tensor], **options: Any) -> Problem:
        """The problem of the leaves made so far; `options` are for the report."""
        parts = [f"{name} {leaf.shape}" for name, leaf in self.leaves.items()]
        parts += [f"{name} {value}" for name, value in options.items()]
        return Problem(", ".join(parts), self.leaves, forward)


# Maps (n, h, w, c) that every op is checked on first: one pixel, odd edges, one row, even; random ones follow.
SHAPES: tuple[Shape, ...] = ((1, 1, 1, 1), (1, 5, 7, 2), (2, 1, 4, 3), (1, 4, 6, 3), (2, 9, 11, 5))


def usual_map(rng: np.random.Generator, index: int) -> Shape:
    """The index-th map (n, h, w, c)."""
    if index < len(SHAPES):
        return SHAPES[index]
    n, h, w, c = rng.integers(1, (3, 8, 8, 6))
    return int(n), int(h), int(w), int(c)


class Differentiable:
    """One op. Its sizes are the shapes of `arrays` and the values of `options`, by name."""

    name: ClassVar[str]
    usual: ClassVar[int]  # cases, unless one asks for more
    arrays: ClassVar[tuple[str, ...]] = ("x",)
    options: ClassVar[Mapping[str, int | float | str]] = {}  # with their defaults
    others: ClassVar[tuple[str, ...]] = ()  # arrays whose shape follows, which may be given contents
    distinct: ClassVar[bool] = False

    def sizes(self, rng: np.random.Generator, index: int) -> Sizes:
        """Those of the index-th usual case."""
        return {"x": usual_map(rng, index)}

    def complete(self, sizes: Sizes) -> Sizes:
        """All sizes from those that a user gave, and the defaults of `options`."""
        return sizes

    def problem(self, make: Maker, sizes: Sizes) -> Problem:
        """The problem of these sizes."""
        raise NotImplementedError

    def make(self, make: Maker, index: int) -> Problem:
        """The index-th problem: of the usual sizes, or of those that the user chose."""
        if not make.chosen.sizes:
            return self.problem(make, self.sizes(make.rng, index))
        given = {name: array.shape for name, array in make.chosen.contents.items() if isinstance(array, np.ndarray)}
        sizes = {**self.options, **given, **make.chosen.shapes, **make.chosen.arguments}
        return self.problem(make, self.complete(sizes))

    def expect_known(self, chosen: Chosen) -> None:
        """ConfigError unless the op has the arrays and options that the user chose, and all that it needs is there."""
        for what, known, given in (
            ("array", self.arrays, chosen.shapes),
            ("array", (*self.arrays, *self.others), chosen.contents),
            ("option", tuple(self.options), chosen.arguments),
        ):
            for name in given:
                if name not in known:
                    has = ", ".join(known) or "none"
                    raise ConfigError(f"gradcheck: {self.name} has no {what} {name!r}; it has {has}")
        for name, value in chosen.arguments.items():
            default = self.options[name]
            text = isinstance(default, str)
            if isinstance(value, str) != text or (isinstance(default, int) and not isinstance(value, int)):
                expected = "a name" if text else "an integer" if isinstance(default, int) else "a number"
                raise ConfigError(
                    f"gradcheck: {self.name}: {name} is {value!r}; expected {expected}, such as {default}"
                )
        shaped = {n for n, a in chosen.contents.items() if isinstance(a, np.ndarray)} | chosen.shapes.keys()
        if chosen.sizes and self.arrays[0] not in shaped:
            raise ConfigError(
                f"gradcheck: {self.name} needs the shape of {self.arrays[0]} beside what was given, for example "
                f"--shape {self.arrays[0]}=2,9,7,3"
            )


class _Add(Differentiable):
    name, usual, arrays = "add", 6, ("a", "b")
    options: ClassVar = {"uses": 1}  # how often a occurs

    def sizes(self, rng: np.random.Generator, index: int) -> Sizes:
        return {"a": usual_map(rng, index), "uses": 3 if index % 2 else 1}

    def problem(self, make: Maker, sizes: Sizes) -> Problem:
        a, b = make.leaf("a", sizes["a"]), make.leaf("b", sizes["b"] if "b" in sizes else sizes["a"])

        def forward() -> Tensor:
            y = functions.add(a, b)
            for _ in range(sizes["uses"] - 1):  # a tensor used several times: its gradients are added
                y = functions.add(y, a)
            return y

        return make.problem(forward, uses=sizes["uses"])


class _Relu(Differentiable):
    name, usual = "relu", 8

    def problem(self, make: Maker, sizes: Sizes) -> Problem:
        x = make.leaf("x", sizes["x"], distinct=True)
        return make.problem(lambda: functions.relu(x))


class _MaxPool(Differentiable):
    name, usual = "max_pool", 10

    def problem(self, make: Maker, sizes: Sizes) -> Problem:
        x = make.leaf("x", sizes["x"], distinct=True)
        return make.problem(lambda: functions.max_pool(x)[0])


class _MaxUnpool(Differentiable):
    name, usual = "max_unpool", 10
    options: ClassVar = {"h": 0, "w": 0}  # of the map; 0: twice as large as x
    others = ("codes",)

    def sizes(self, rng: np.random.Generator, index: int) -> Sizes:
        n, h, w, c = usual_map(rng, index)
        return {"x": windows_of(n, h, w, c), "h": h, "w": w}

    def complete(self, sizes: Sizes) -> Sizes:
        rows, columns = (*sizes["x"], 1, 1)[1:3]
        return {**sizes, "h": sizes["h"] or 2 * rows, "w": sizes["w"] or 2 * columns}

    def problem(self, make: Maker, sizes: Sizes) -> Problem:
        x, size = make.leaf("x", sizes["x"]), (sizes["h"], sizes["w"])
        chosen = make.given("codes", x.shape)
        if chosen is None:
            chosen = valid_codes(make.rng.integers(0, 4, x.shape, CODE), size)
        codes = PoolCodes(make.device.upload(chosen.astype(CODE)), size)
        return make.problem(lambda: functions.max_unpool(x, codes), size=size)


class _Dropout(Differentiable):
    name, usual = "dropout", 8
    options: ClassVar = {"p": 0.5}

    def sizes(self, rng: np.random.Generator, index: int) -> Sizes:
        return {"x": usual_map(rng, index), "p": (0.5, 0.1, 0.0, 0.9)[index % 4]}

    def problem(self, make: Maker, sizes: Sizes) -> Problem:
        x, p = make.leaf("x", sizes["x"]), float(sizes["p"])
        layer, step = (int(k) for k in make.rng.integers((30, 1000)))
        state = make.device.upload(np.array([2**33 + step, step], np.uint64))
        return make.problem(lambda: functions.dropout(x, p, layer=layer, state=state), p=p)


class _BatchNorm(Differentiable):
    name, usual, others = "batch_norm", 14, ("weight", "bias")
    options: ClassVar = {"training": 1}

    def sizes(self, rng: np.random.Generator, index: int) -> Sizes:
        training = index % 2 == 0
        n, h, w, c = usual_map(rng, index // 2)
        if training and n * h * w < 4:  # of two values one is always +1, the other -1, and all gradients are 0
            n, h = n + 2, h + 1
        return {"x": (n, h, w, c), "training": int(training)}

    def problem(self, make: Maker, sizes: Sizes) -> Problem:
        x, training = make.leaf("x", sizes["x"]), bool(sizes["training"])
        channels = sizes["x"][-1:]
        weight, bias = make.leaf("weight", channels), make.leaf("bias", channels)
        mean, var = make.rng.standard_normal(channels), make.rng.uniform(0.5, 2, channels)

        def forward() -> Tensor:
            running = make.constant(mean), make.constant(var)
            return functions.batch_norm(x, weight, bias, *running, training=training)

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


class _Conv2d(Differentiable):
    name, usual, arrays, others = "conv2d", 2 * len(CONVOLUTIONS) + 4, ("x", "weight"), ("bias",)
    options: ClassVar = {"stride": 1, "padding": 1, "bias": 1, "rung": "default"}

    def sizes(self, rng: np.random.Generator, index: int) -> Sizes:
        if index // 2 < len(CONVOLUTIONS):
            x, o, (kh, kw), stride, padding = CONVOLUTIONS[index // 2]
        else:
            x = usual_map(rng, index)
            o, kh, kw, stride, padding = (int(k) for k in rng.integers((1, 1, 1, 1, 0), (6, 4, 4, 4, 3)))
            kh, kw = min(kh, x[1] + 2 * padding), min(kw, x[2] + 2 * padding)
        weight = (o, kh, kw, x[3])
        sizes = {"x": x, "weight": weight, "stride": stride, "padding": padding, "bias": (index // 2) % 3}
        return {**sizes, "rung": _rung(index, x, weight, stride, padding)}

    def complete(self, sizes: Sizes) -> Sizes:
        return {"weight": (3, 3, 3, sizes["x"][-1]), **sizes}

    def problem(self, make: Maker, sizes: Sizes) -> Problem:
        x, weight = make.leaf("x", sizes["x"]), make.leaf("weight", sizes["weight"])
        bias = make.leaf("bias", weight.shape[:1]) if sizes["bias"] else None
        rung = None if sizes["rung"] == "default" else sizes["rung"]
        stride, padding = sizes["stride"], sizes["padding"]
        return make.problem(
            lambda: functions.conv2d(x, weight, bias, stride, padding, rung),
            stride=stride,
            padding=padding,
            rung=sizes["rung"],
        )


def _rung(index: int, x: Shape, weight: Shape, stride: int, padding: int) -> str:
    """The rungs of the ladder in turn; where one does not take a shape or float64, the next that does."""
    geometry = Geometry.of(x, weight, stride, padding)
    for turn in range(len(RUNGS)):
        try:
            return choose_rung(geometry, np.dtype(np.float64), RUNGS[(index + turn) % len(RUNGS)])
        except SegnetError:
            continue
    raise ShapeError(f"gradcheck: no rung takes x {x} and weight {weight} with stride {stride}")


class _ConvTranspose2d(Differentiable):
    name, usual, arrays = "conv_transpose2d", 12, ("x", "weight")
    options: ClassVar = {"h": 0, "w": 0, "rung": "direct"}  # of the map; 0: twice as large as x

    def sizes(self, rng: np.random.Generator, index: int) -> Sizes:
        n, h, w, c = usual_map(rng, index // 2)
        sizes = {"x": windows_of(n, h, w, c), "weight": (c, 4, 4, 1 + index % 3), "h": h, "w": w}
        return {**sizes, "rung": "tiled" if index % 2 else "direct"}

    def complete(self, sizes: Sizes) -> Sizes:
        _, rows, columns, channels = (*sizes["x"], 1, 1, 1, 1)[:4]
        size = {"h": sizes["h"] or 2 * rows, "w": sizes["w"] or 2 * columns}
        return {"weight": (channels, 4, 4, channels), **sizes, **size}

    def problem(self, make: Maker, sizes: Sizes) -> Problem:
        x, weight = make.leaf("x", sizes["x"]), make.leaf("weight", sizes["weight"])
        size, rung = (sizes["h"], sizes["w"]), sizes["rung"]
        return make.problem(lambda: functions.conv_transpose2d(x, weight, size, rung), size=size, rung=rung)


class _ResizeBilinear(Differentiable):
    name, usual = "resize_bilinear", 10
    options: ClassVar = {"h": 0, "w": 0}  # of the result; 0: twice as large as x

    def sizes(self, rng: np.random.Generator, index: int) -> Sizes:
        n, h, w, c = usual_map(rng, index)
        # By turns the size that a pool of stride 2 had, and any other.
        x = windows_of(n, h, w, c) if index % 2 else (n, *(int(k) for k in rng.integers(1, 9, 2)), c)
        return {"x": x, "h": h, "w": w}

    def complete(self, sizes: Sizes) -> Sizes:
        rows, columns = (*sizes["x"], 1, 1)[1:3]
        return {**sizes, "h": sizes["h"] or 2 * rows, "w": sizes["w"] or 2 * columns}

    def problem(self, make: Maker, sizes: Sizes) -> Problem:
        x, size = make.leaf("x", sizes["x"]), (sizes["h"], sizes["w"])
        return make.problem(lambda: functions.resize_bilinear(x, size), size=size)


class _Fit(Differentiable):
    name, usual = "fit", 8
    options: ClassVar = {"h": 0, "w": 0}  # of the result; 0: a row or column less than x

    def sizes(self, rng: np.random.Generator, index: int) -> Sizes:
        n, h, w, c = usual_map(rng, index)
        return {"x": (n, h, w, c), "h": max(1, h + 1 - index % 3), "w": w + 1 if w == 1 or index % 2 else w - 1}

    def complete(self, sizes: Sizes) -> Sizes:
        rows, columns = (*sizes["x"], 1, 1)[1:3]
        return {**sizes, "h": sizes["h"] or max(1, rows - 1), "w": sizes["w"] or max(1, columns - 1)}

    def problem(self, make: Maker, sizes: Sizes) -> Problem:
        x, size = make.leaf("x", sizes["x"]), (sizes["h"], sizes["w"])
        return make.problem(lambda: functions.fit(x, size), size=size)


class _CrossEntropy(Differentiable):
    name, usual, arrays, others = "cross_entropy", 16, ("logits",), ("labels",)
    options: ClassVar = {"normalisation": "weights", "weighted": 0, "void": 0.25, "smoothing": 0.0}

    def sizes(self, rng: np.random.Generator, index: int) -> Sizes:
        n, h, w, _ = usual_map(rng, index // 4)
        return {
            "logits": (n, h, w, (4, 2, 21, 1)[index // 4 % 4]),
            "normalisation": NORMALISATIONS[index % 2],
            "weighted": index // 2 % 2,
            "void": 0.25,
            "smoothing": (0.0, 0.1, 0.4)[index % 3],
        }

    def problem(self, make: Maker, sizes: Sizes) -> Problem:
        logits = make.leaf("logits", sizes["logits"], scale=3.0)
        *pixels, classes = logits.shape
        labels = make.given("labels", tuple(pixels))
        if labels is None:
            labels = make.rng.integers(0, classes, pixels).astype(np.uint8)
            labels[make.rng.random(pixels) < sizes["void"]] = VOID
        weights = make.rng.uniform(0.2, 3, classes).astype(make.values) if sizes["weighted"] else None
        return make.problem(
            lambda: functions.cross_entropy(logits, labels, weights, sizes["normalisation"], sizes["smoothing"]),
            normalisation=sizes["normalisation"],
            smoothing=sizes["smoothing"],
            class_weights=weights is not None,
            void=int((labels == VOID).sum()),
        )


# (architecture, training, dropout, decoder)
NETWORKS: tuple[tuple[str, int, int, str], ...] = (
    ("segnet", 1, 0, "indices"),
    ("segnet-basic", 1, 1, "indices"),
    ("segnet", 0, 0, "indices"),
    ("segnet", 1, 0, "bilinear"),
    ("segnet", 1, 0, "deconv"),
    ("segnet-basic", 1, 0, "bilinear"),
    ("segnet-basic", 1, 0, "deconv"),
)


class _SegNet(Differentiable):
    """A whole network with its loss; every parameter and the image are inputs."""

    name, usual, arrays = "segnet", 2, ("image",)
    options: ClassVar = {
        "architecture": "segnet",
        "decoder": "indices",
        "training": 1,
        "dropout": 0,
        "classes": 3,
        "width": 1 / 32,
    }

    def sizes(self, rng: np.random.Generator, index: int) -> Sizes:
        architecture, training, dropout, decoder = NETWORKS[index % len(NETWORKS)]
        image = (2, 32, 33, 3) if architecture == "segnet" else (1, 33, 32, 3)
        chosen = {"image": image, "architecture": architecture, "training": training, "dropout": dropout}
        return {**self.options, **chosen, "decoder": decoder}

    def problem(self, make: Maker, sizes: Sizes) -> Problem:
        architecture, dropout, classes = sizes["architecture"], bool(sizes["dropout"]), sizes["classes"]
        if architecture not in ARCHITECTURES:
            raise ConfigError(f"gradcheck: architecture {architecture!r}; expected one of {', '.join(ARCHITECTURES)}")
        device, rng = make.device, make.rng
        seed = int(rng.integers(2**31))
        model = ARCHITECTURES[architecture](
            *(classes, float(sizes["width"]), device),
            dropout=dropout,
            decoder=sizes["decoder"],
            seed=seed,
            dtype=make.storage,
        )
        model.train(bool(sizes["training"]))
        model.set_random_state(seed, seed % 1000)
        for name, buffer in model.named_buffers().items():  # statistics as of a network that has been trained
            low, high = (0.5, 2.0) if name.endswith("var") else (-0.3, 0.3)
            device.write(buffer.data, rng.uniform(low, high, buffer.data.shape))
        for parameter in model.parameters():
            if len(parameter.shape) == 1:
                device.write(parameter.data, parameter.numpy() + 0.2 * rng.standard_normal(parameter.shape))
        image = make.leaf("image", sizes["image"])
        labels = rng.integers(0, classes, image.shape[:-1]).astype(np.uint8)
        labels[rng.random(labels.shape) < 0.1] = VOID
        make.leaves.update(model.named_parameters())
        mode = "training" if sizes["training"] else "evaluation"
        what = f"{architecture} in {mode}, decoder {sizes['decoder']}"
        case = f"{what}, image {image.shape}, dropout {dropout}, seed {seed}"
        return Problem(case, make.leaves, lambda: functions.cross_entropy(model(image), labels))


class OfRow(Differentiable):
    """A row of the op table, with what it declares as its backward: op against op, without functions.py."""

    arrays = ()
    usual = 6
    LARGEST = 20_000  # elements of inputs: larger cases are about sizes, and not about gradients

    def __init__(self, row: Row) -> None:
        self.row, self.name = row, row.name  # type: ignore[misc]

    def expect_known(self, chosen: Chosen) -> None:
        if chosen.sizes or chosen.ties:
            raise ConfigError(f"gradcheck: {self.name} is a row of the op table: its cases are those of the row")

    def make(self, make: Maker, index: int) -> Problem:
        small = [c for c in self.row.cases() if sum(s.size for s in self._plan(c).inputs.values()) <= self.LARGEST]
        case = small[index] if index < len(small) else self.row.random_case(make.rng)
        op, backward = self.row.plan(case, make.storage), self.row.backward(case, make.storage)
        given: dict[str, Array | None] = {}
        for name, array in self.row.inputs(self._plan(case), case, make.rng).items():
            if array is None or not is_floating(array.dtype):
                given[name] = None if array is None else make.device.upload(array)
            elif name in op.updates or name in self.row.constants:
                given[name] = make.constant(array)
            else:
                make.leaves[name] = Tensor(make.constant(array), make.device, requires_grad=True)
        leaves = make.leaves
        function = functools.partial(_OfOps, make.device, op, backward, given, tuple(leaves))
        return Problem(str(case), leaves, lambda: function()(*leaves.values()))

    def _plan(self, case: Case) -> Op:
        return self.row.plan(case, np.float64)


class _OfOps(Function):
    """One op and its backward ops, wired by the names of their arrays."""

    def __init__(
        self,
        device: Device,
        op: Op,
        backward: tuple[Op, ...],
        given: Mapping[str, Array | None],
        leaves: tuple[str, ...],
    ) -> None:
        super().__init__(device)
        self.op, self.backward_ops, self.given, self.leaves = op, backward, given, leaves

    def forward(self, *arrays: Array) -> Array:
        given = {**self.given, **dict(zip(self.leaves, arrays, strict=True))}
        copies = {name: self.device.copy(given[name]) for name in self.op.updates}
        outputs = vars(self.op(self.device, **{**given, **copies}))
        self.held = {**given, **outputs}
        return outputs[next(iter(self.op.outputs))]

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        held = {**self.held, f"d{next(iter(self.op.outputs))}": dy}
        found: dict[str, Array] = {}
        for op in self.backward_ops:
            found |= vars(op(self.device, **{name: held[name] for name in op.inputs}))
        return tuple(found.get(f"d{name}") for name in self.leaves)


def of_rows(rows: Sequence[Row] | None = None) -> dict[str, OfRow]:
    """What rows of the op table declare with a backward, by the name of the row."""
    wide = [row for row in rows or table.ROWS if np.dtype(np.float64) in row.elements]
    return {row.name: OfRow(row) for row in wide if row.backward(row.cases()[0], np.float64)}


_CLASSES: tuple[type[Differentiable], ...] = (
    *(_Add, _BatchNorm, _Conv2d, _ConvTranspose2d, _CrossEntropy, _Dropout, _Fit),
    *(_MaxPool, _MaxUnpool, _Relu, _ResizeBilinear, _SegNet),
)
DIFFERENTIABLE: dict[str, Differentiable] = {c.name: c() for c in _CLASSES}


def differentiable(name: str) -> Differentiable:
    """The op of this name. ConfigError lists the names there are."""
    if name in DIFFERENTIABLE:
        return DIFFERENTIABLE[name]
    rows = of_rows()
    if name in rows:
        return rows[name]
    close = difflib.get_close_matches(name, [*DIFFERENTIABLE, *rows], n=1)
    hint = f"did you mean {close[0]}? The ops are " if close else "expected one of "
    more = f"; of the op table also {', '.join(rows)}"
    raise ConfigError(f"gradcheck: there is no op {name!r}; {hint}{', '.join(DIFFERENTIABLE)}{more}")


def uncovered() -> list[str]:
    """The rows with a backward whose op none of DIFFERENTIABLE differentiates: what users have added."""
    return [name for name, op in of_rows().items() if not op.row.op.name.startswith(tuple(DIFFERENTIABLE))]
