"""What the gradient check differentiates: the functions of nn/functions.py, ops without one, and whole networks.

Shapes, options and inputs are those of the rows of the op table: their fixed cases that are not too large, random ones
after them, or what a user chooses. An op that nn/functions.py does not know is applied as it is.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from types import SimpleNamespace
from typing import Any

import numpy as np

from segnet_scratch.errors import ConfigError, ShapeError
from segnet_scratch.lab.proof import table
from segnet_scratch.nn import functions
from segnet_scratch.nn.autograd import Tensor, apply
from segnet_scratch.ops.cases import MAPS, Case, Row, Shape
from segnet_scratch.ops.loss.cases import LogSoftmaxRow
from segnet_scratch.ops.loss.log_softmax import LogSoftmaxForward
from segnet_scratch.ops.op import VOID
from segnet_scratch.ops.resampling.cases import ResizeRow
from segnet_scratch.runtime.devices import Array, Device
from segnet_scratch.runtime.precision import is_floating
from segnet_scratch.segnet import ARCHITECTURES

LARGEST = 20_000  # elements of inputs: larger cases are about sizes, and not about gradients
# What stands for an option with a default of this type.
KINDS: dict[type, tuple[Any, str]] = {str: (str, "a name"), int: (int, "an integer"), float: (int | float, "a number")}


@dataclass(frozen=True)
class Subject:
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

    @property
    def given_shapes(self) -> dict[str, Shape]:
        """All shapes, those of given contents among them."""
        return {n: a.shape for n, a in self.contents.items() if isinstance(a, np.ndarray)} | dict(self.shapes)


@dataclass
class Maker:
    """Makes the tensors of a subject on a device. Values are those that `values` can hold, kept as `storage`.

    Two makers with the same random numbers and `values` but unlike `storage` make the same subject in two precisions.
    """

    device: Device
    rng: np.random.Generator
    values: np.dtype
    storage: np.dtype
    chosen: Chosen
    leaves: dict[str, Tensor] = field(default_factory=dict)

    def leaf(self, name: str, drawn: np.ndarray) -> Tensor:
        """A tensor whose gradient is checked, of these values unless the user chose others."""
        array = self.rng.integers(-2, 3, drawn.shape).astype(drawn.dtype) if self.chosen.ties else drawn
        data = self.constant(name, array)
        self.leaves[name] = Tensor(data.reshape(self.chosen.given_shapes.get(name, data.shape)), self.device, True)
        return self.leaves[name]

    def constant(self, name: str, drawn: np.ndarray) -> Array:
        """An array on the device that is no leaf. A number that the user chose stands for every element."""
        array = np.asarray(self.chosen.contents.get(name, drawn))
        if array.ndim and array.size != drawn.size:
            raise ShapeError(f"gradcheck: the contents of {name} have shape {array.shape}, expected {drawn.shape}")
        array = np.broadcast_to(array.reshape(drawn.shape) if array.ndim else array, drawn.shape)
        if is_floating(drawn.dtype):
            return self.device.upload(array.astype(self.values).astype(self.storage))
        return self.device.upload(array.astype(drawn.dtype))


class Differentiable:
    """What has a name, usual cases, and arrays and options that a user may choose: the parameters of `chosen`."""

    name: str
    others: tuple[str, ...] = ()  # arrays whose shape follows, which may be given contents
    chosen: Callable[..., Any]

    @property
    def arrays(self) -> tuple[str, ...]:
        """Whose shapes may be chosen; the first one must be."""
        return tuple(n for n, p in inspect.signature(self.chosen).parameters.items() if p.default in (p.empty, ()))

    @property
    def options(self) -> dict[str, int | float | str]:
        """With their defaults."""
        parameters = inspect.signature(self.chosen).parameters
        return {name: parameters[name].default for name in parameters if name not in self.arrays}

    @property
    def usual(self) -> int:
        """Cases, unless one asks for more."""
        raise NotImplementedError

    def make(self, make: Maker, index: int) -> Subject:
        """The index-th usual subject, or the one that the user chose."""
        raise NotImplementedError

    def sizes_of(self, chosen: Chosen) -> Any:
        """What `chosen` makes of the shapes and options of a user."""
        shapes = {name: shape for name, shape in chosen.given_shapes.items() if name in self.arrays}
        return self.chosen(**shapes, **chosen.arguments)

    def expect_known(self, chosen: Chosen) -> None:
        """ConfigError unless the op has the arrays and options that the user chose, and all that it needs is there."""
        contents = ("array", (*self.arrays, *self.others), chosen.contents)
        options = ("option", tuple(self.options), chosen.arguments)
        for what, known, given in (("array", self.arrays, chosen.shapes), contents, options):
            for name in given.keys() - {*known}:
                has = ", ".join(known) or "none"
                raise ConfigError(f"gradcheck: {self.name} has no {what} {name!r}; it has {has}")
        for name, value in chosen.arguments.items():
            default = self.options[name]
            kind, expected = KINDS[type(default)]
            if not isinstance(value, kind):
                what = f"{self.name}: {name} is {value!r}"
                raise ConfigError(f"gradcheck: {what}; expected {expected}, such as {default}")
        first = self.arrays[0]
        if chosen.sizes and first not in chosen.given_shapes:
            needs = f"{self.name} needs the shape of {first} beside what was given"
            raise ConfigError(f"gradcheck: {needs}, for example --shape {first}=2,9,7,3")


class OfRows(Differentiable):
    """A function of nn/functions.py on the cases of the rows of its op, or a row whose op has none."""

    def __init__(self, name: str, rows: Sequence[Row]) -> None:
        self.name, self.rows, self.chosen = name, rows, rows[0].chosen
        self.others = tuple(rows[0].plan(rows[0].cases()[0], np.float64).inputs)

    def _cases(self, rng: np.random.Generator | None = None) -> Iterator[tuple[Row, Case]]:
        """The fixed cases, of each row in turn; after them random ones, where there are random numbers."""
        fixed = [[(row, case) for case in row.cases() if self._suits(row, case)] for row in self.rows]
        yield from (found for turn in zip_longest(*fixed) for found in turn if found is not None)
        while rng is not None:
            for row in self.rows:
                case = row.random_case(rng)
                if self._suits(row, case):
                    yield row, case

    def _suits(self, row: Row, case: Case) -> bool:
        inputs = row.plan(case, np.float64).inputs.values()
        return row.differentiable(case) and sum(s.size for s in inputs) <= LARGEST

    @property
    def usual(self) -> int:
        return sum(1 for _ in self._cases())

    def make(self, make: Maker, index: int) -> Subject:
        row, case = self.rows[0], self.sizes_of(make.chosen) if make.chosen.sizes else None
        if case is None:
            row, case = next(islice(self._cases(make.rng), index, None))
        wide, op = row.plan(case, np.float64), row.plan(case, make.storage)
        for name, shape in make.chosen.shapes.items():
            if np.prod(shape) != wide.inputs[name].size:
                expected = wide.inputs[name].shape
                raise ShapeError(f"gradcheck: {name} {shape} does not fit the others; expected {expected}")
        arrays: dict[str, Tensor | Array | None] = {}
        for name, drawn in row.inputs(wide, case, make.rng).items():
            if drawn is None:
                arrays[name] = None
            elif is_floating(drawn.dtype) and name not in (*op.updates, *row.constants):
                arrays[name] = make.leaf(name, drawn)
            else:
                arrays[name] = make.constant(name, drawn)

        def fresh() -> dict[str, Tensor | Array | None]:
            return arrays | {name: make.device.copy(arrays[name]) for name in op.updates}

        function = _function(_function_of(row))
        if function is None:
            return Subject(str(case), make.leaves, lambda: apply(op, **fresh()))
        known = inspect.signature(function).parameters
        settings = {name: getattr(row, name) for name in known if hasattr(row, name)}

        def taken() -> dict[str, Any]:
            given = settings | row.arguments(case, fresh())
            return {name: given[name] for name in known if name in given}

        def forward() -> Tensor:
            result = function(**taken())
            return result[0] if isinstance(result, tuple) else result  # a pool gives its codes beside it

        options = {name: value for name, value in taken().items() if not hasattr(value, "dtype") and name not in arrays}
        sizes = {name: leaf.shape for name, leaf in make.leaves.items()} | options
        return Subject(", ".join(f"{name} {value}" for name, value in sizes.items()), make.leaves, forward)


class FitRow(ResizeRow):
    """functions.fit, which is no op: it copies."""

    function = "fit"

    def cases(self) -> list[Case]:
        # A row more, as many, or one less; a column more or less.
        return [
            Case(reason, {"x": x, "size": (max(1, x[1] + 1 - k % 3), x[2] + 1 if x[2] == 1 or k % 2 else x[2] - 1)})
            for k, (reason, x) in enumerate(MAPS.items())
        ]


class SoftmaxRow(LogSoftmaxRow):
    """functions.softmax, which is no op: it is the exponential of log_softmax."""

    function = "softmax"


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


class Network(Differentiable):
    """A whole network with its loss; every parameter and the image are inputs."""

    name, usual = "segnet", 2

    def chosen(
        self,
        image: Shape,
        architecture: str = "segnet",
        decoder: str = "indices",
        training: int = 1,
        dropout: int = 0,
        classes: int = 3,
        width: float = 1 / 32,
    ) -> dict[str, Any]:
        if architecture not in ARCHITECTURES:
            raise ConfigError(f"gradcheck: architecture {architecture!r}; expected one of {', '.join(ARCHITECTURES)}")
        return {name: value for name, value in locals().items() if name != "self"}

    def make(self, make: Maker, index: int) -> Subject:
        architecture, training, dropout, decoder = NETWORKS[index % len(NETWORKS)]
        shape = (2, 32, 33, 3) if architecture == "segnet" else (1, 33, 32, 3)
        usual = self.chosen(shape, architecture, decoder, training, dropout)
        sizes = SimpleNamespace(**(self.sizes_of(make.chosen) if make.chosen.sizes else usual))
        device, rng, dropout = make.device, make.rng, bool(sizes.dropout)
        seed = int(rng.integers(2**31))
        options = {"dropout": dropout, "decoder": sizes.decoder, "seed": seed, "dtype": make.storage}
        model = ARCHITECTURES[sizes.architecture](sizes.classes, float(sizes.width), device, **options)
        model.train(bool(sizes.training))
        model.set_random_state(seed, seed % 1000)
        for name, buffer in model.named_buffers().items():  # statistics as of a network that has been trained
            low, high = (0.5, 2.0) if name.endswith("var") else (-0.3, 0.3)
            device.write(buffer.data, rng.uniform(low, high, buffer.data.shape))
        for parameter in model.parameters():
            if len(parameter.shape) == 1:
                device.write(parameter.data, parameter.numpy() + 0.2 * rng.standard_normal(parameter.shape))
        image = make.leaf("image", rng.standard_normal(sizes.image))
        labels = rng.integers(0, sizes.classes, image.shape[:-1]).astype(np.uint8)
        labels[rng.random(labels.shape) < 0.1] = VOID
        make.leaves.update(model.named_parameters())
        what = f"{sizes.architecture} in {'training' if sizes.training else 'evaluation'}, decoder {sizes.decoder}"
        case = f"{what}, image {image.shape}, dropout {dropout}, seed {seed}"
        return Subject(case, make.leaves, lambda: functions.cross_entropy(model(image), labels))


def _function_of(row: Row) -> str:
    """The name of the function in nn/functions.py that differentiates the op of a row; "" where there is none."""
    op, end, _ = row.op.name.partition("_forward")
    return (op if row.function is None else row.function) if end else ""


def _function(name: str) -> Callable[..., Any] | None:
    found = getattr(functions, name, None)
    return found if getattr(found, "__module__", "") == functions.__name__ else None


def functions_of(rows: Sequence[Row]) -> dict[str, OfRows]:
    """What is differentiated on these rows, by name: functions of nn/functions.py, and other ops with a gradient."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if np.dtype(np.float64) in row.elements:
            if _function(_function_of(row)):
                found.setdefault(_function_of(row), []).append(row)
            elif row.function is None and row.plan(row.cases()[0], np.float64).gradient():
                found[row.name] = [row]
    return {name: OfRows(name, of_name) for name, of_name in found.items()}


def differentiables() -> dict[str, Differentiable]:
    """Everything that is checked: functions, ops of the table that have none, and whole networks."""
    every = functions_of((*table.ROWS, FitRow(), SoftmaxRow(LogSoftmaxForward)))
    return {**{name: every[name] for name in sorted(every) if _function(name)}, "segnet": Network(), **every}


def differentiable(name: str) -> Differentiable:
    """What has this name: one of `differentiables`, or a row of the op table. ConfigError lists the names there are."""
    usual: dict[str, Differentiable] = differentiables()
    rows = {row.name: found for row in table.ROWS for found in functions_of([row]).values()}
    if name not in usual and name not in rows:
        raise table.unknown_op("gradcheck", name, [*usual], [*rows])
    return usual[name] if name in usual else rows[name]
