"""What a row of the op table is: its cases, its inputs, its error bound.

A row says which shapes an op must get right and why each is there, how to make its inputs, and how far a result may
lie from the reference evaluated in float64. Everything else (outputs, workspace, FLOPs) comes from the op's plan.

Error bounds have the form  c * eps * growth(K) * (sum of absolute terms),  K the length of the sum behind an output.
In the worst case growth(K) is K (Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1); rounding
errors of mixed sign make it sqrt(K) in practice (section 2.8), so that is what the rows use, with c between 2 and 8
for the other roundings on the way. An op without sums has bound 0: every bit must be right.
"""

import functools
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import DTypeLike

from segnet_scratch.errors import SegnetError, ShapeError
from segnet_scratch.ops.op import Buffers, Op, Spec, expect_map, spec

Inputs = dict[str, np.ndarray | None]
Bounds = dict[str, np.ndarray | float]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """The sizes and options of one run of an op, and why they are there."""

    reason: str
    sizes: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.sizes[name]

    def __str__(self) -> str:
        return " ".join(f"{k}={v}".replace(" ", "") for k, v in self.sizes.items()) + f" ({self.reason})"


@dataclass(frozen=True)
class Refusal:
    """A plan or call that must fail, with this error and these words in its message."""

    reason: str
    attempt: Callable[[], object]
    error: type[SegnetError]
    message: str


@dataclass(frozen=True)
class Hostile:
    """Inputs that nobody should give, and what an op has to make of them, by a definition of its own."""

    op: Op
    inputs: Inputs
    expected: dict[str, np.ndarray]


class Row:
    """One op: its cases, its inputs and its error bound. Subclasses fill in what differs from op to op."""

    name: str
    op: type[Op]
    rung: str  # of its ladder, where there is one
    shapes: ClassVar[Mapping[str, Shape]]  # of `x`, each with its reason, where the cases are no more than that
    exact: ClassVar[bool] = False  # integer-valued inputs give exactly the reference's result
    elements: tuple[np.dtype, ...] = (np.dtype(np.float32), np.dtype(np.float64))  # of arrays, the usual one first
    channels: ClassVar[int] = 1  # those of maps are a multiple of it
    constants: ClassVar[tuple[str, ...]] = ()  # inputs without a gradient
    # Of nn/functions.py, its gradient is checked on these cases; unless given, it has the op's name without "_forward".
    function: str | None = None

    def __init__(self, op: type[Op] | None = None, rung: str = "", name: str = "", **attributes: Any) -> None:
        """Of an op and a rung, which give the name; `attributes` in the place of those of the class."""
        self.op = op or type(self).op
        self.name = name or "_".join(filter(None, (self.op.name, rung)))
        if rung:
            self.rung = rung
        vars(self).update(attributes)

    def cases(self) -> list[Case]:
        """The shapes that must work, each with its reason."""
        return maps(self.shapes)

    def random_case(self, rng: np.random.Generator) -> Case:
        """A case that nobody has thought of."""
        raise NotImplementedError

    def plan(self, case: Case, dtype: DTypeLike) -> Op:
        """The op of a case, for arrays of this element type."""
        raise NotImplementedError

    def inputs(self, op: Op, case: Case, rng: np.random.Generator, integers: bool = False) -> Inputs:
        """An array for each input of the op: normally distributed, or integers from -4 to 4."""
        return {name: values(rng, s, integers) for name, s in op.inputs.items()}

    def reference_plan(self, case: Case) -> Op:
        """The op whose reference is evaluated."""
        return self.plan(case, np.float64)

    def as_seen(self, name: str, array: np.ndarray) -> np.ndarray:
        """What the op makes of an input before it computes: rounded numbers, where it rounds them."""
        return array

    def arguments(self, case: Case, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """What `function` takes, by the names of its parameters: tensors and arrays, sizes, options of the case.

        What is not here is an attribute of the row, such as its `rung`, or has a default.
        """
        return {**case.sizes, **arrays}

    def chosen(self, x: Shape) -> Case:
        """The case that a user asks the gradient check for.

        Its parameters are the arrays whose shapes may be chosen (without a default, or with ()) and the options.
        """
        return Case("chosen", {"x": x})

    def differentiable(self, case: Case) -> bool:
        """Can differences of float64 be compared with the gradient here?"""
        return True

    def bound(self, op: Op, b: Buffers, eps: float) -> Bounds:
        """The largest allowed error of each output; an output that is not named must be exact.

        `op` is planned for float64, `b` holds its inputs as they were seen and the reference's outputs, `eps` belongs
        to the type that sums are carried in. The rounding of an output to bfloat16 is not the row's business.
        """
        return {}

    def planes(self, op: Op, output: str) -> int:
        """In how many planes an output of bfloat16 is (convolution/split_planes.py): the bound is that of their sum."""
        return 1

    def refusals(self) -> list[Refusal]:
        """Plans that must fail, beside what fails for every row: other element types, calls unlike the plan."""
        return []

    def refused(self, plain: Mapping[str, Any], wrong: Mapping[str, tuple[Any, ...]]) -> list[Refusal]:
        """Plans of `plain` arguments, some of them replaced: by reason the words of the message and what is replaced.

        The error is a ShapeError, unless it is the third item.
        """
        return [
            Refusal(reason, functools.partial(self.op, **{**plain, **replaced}), (*error, ShapeError)[0], message)
            for reason, (message, replaced, *error) in wrong.items()
        ]

    def hostile(self, rng: np.random.Generator) -> Hostile | None:
        """Random hostile inputs; None where no input that fits the plan is hostile."""
        return None

    def generator(self, seed: int, *index: int) -> np.random.Generator:
        """Random numbers for the case of this index."""
        return np.random.default_rng([seed, zlib.crc32(self.name.encode()), *index])


def values(rng: np.random.Generator, s: Spec, integers: bool = False) -> np.ndarray:
    """An array of this Spec: standard normal, or integers from -4 to 4 so that short sums are exact."""
    array = rng.integers(-4, 5, s.shape) if integers else rng.standard_normal(s.shape)
    return array.astype(s.dtype)


def size_of_result(x: Shape, h: int, w: int) -> tuple[int, int]:
    """The size (h, w) that a user chose for the result of an op, 0 for twice that of the map x."""
    _, rows, columns, _ = expect_map("gradcheck", "x", spec(x, np.float64))
    return h or 2 * rows, w or 2 * columns


def empty_outputs(op: Op) -> dict[str, np.ndarray]:
    """NumPy arrays for the outputs of an op."""
    return {name: np.empty(s.shape, s.dtype) for name, s in op.outputs.items()}


def of_magnitudes(op: Op, b: Buffers) -> Buffers:
    """The outputs of the reference for the absolute values of the inputs: for a linear op, sums of absolute terms."""
    arrays = {name: getattr(b, name) for name in op.inputs}
    magnitudes = Buffers(**{k: None if a is None else np.abs(a) for k, a in arrays.items()}, **empty_outputs(op))
    op.reference(magnitudes)
    return magnitudes


def maps(shapes: Mapping[str, tuple[int, ...]], **options: Any) -> list[Case]:
    """A case for each shape of `x`, its key the reason."""
    return [Case(reason, {"x": shape, **options}) for reason, shape in shapes.items()]


# Maps (n, h, w, c) for ops that treat each element, or each window, by itself.
MAPS: dict[str, tuple[int, ...]] = {
    "size 1": (1, 1, 1, 1),
    "one pixel, several channels": (1, 1, 1, 5),
    "one row": (1, 1, 8, 3),
    "one column": (2, 9, 1, 2),
    "even": (2, 4, 6, 4),
    "odd height and width": (1, 5, 7, 3),
    "primes": (3, 13, 11, 17),
    "one element less than a block of 256": (1, 5, 17, 3),
    "a block of 256": (1, 8, 8, 4),
    "one element more than a block": (1, 1, 257, 1),
    "channels of SegNet's classifier": (2, 6, 5, 21),
    "deepest map of SegNet": (1, 2, 3, 512),
}

# Maps for sums over n, h, w: common/columns.cuh has blocks of 32 channels x 8 rows and chunks of at least 64 rows.
COLUMN_MAPS: dict[str, tuple[int, ...]] = {
    "two rows": (2, 1, 1, 1),
    "a row less than the row lanes": (1, 7, 1, 31),
    "as many rows as row lanes": (1, 8, 1, 32),
    "a row more than the row lanes": (1, 3, 3, 33),
    "a row less than a chunk": (1, 7, 9, 5),
    "one chunk": (1, 8, 8, 4),
    "a second chunk of one row": (1, 5, 13, 3),
    "primes": (3, 13, 11, 17),
    "three pieces across, more rows than lanes": (2, 13, 9, 24),
    "one pixel an image": (9, 1, 1, 64),
    "more channels than threads in the merge": (1, 2, 3, 257),
    "rows that need longer chunks than 64": (1, 1, 32769, 1),
    "a map of SegNet": (2, 24, 32, 16),
}


def in_whole_pieces(case: Case, channels: int) -> Case:
    """The case with the channels of its map `x` rounded up to a multiple."""
    *size, c = case["x"]
    return Case(case.reason, {**case.sizes, "x": (*size, -(-c // channels) * channels)})


def random_map(rng: np.random.Generator, channels: int = 40) -> tuple[int, ...]:
    """(n, h, w, c) of up to 3 images of 17 x 17 and so many channels."""
    n, h, w, c = rng.integers(1, (4, 18, 18, channels + 1))
    return int(n), int(h), int(w), int(c)


class MapRow(Row):
    """Ops on one map, without sums unless `bound` says otherwise; `options` are further arguments of the plan."""

    exact = True
    shapes = MAPS
    options: tuple[Any, ...] = ()
    most_channels = 40  # of a random map

    def random_case(self, rng: np.random.Generator) -> Case:
        return Case("random", {"x": random_map(rng, self.most_channels)})

    def plan(self, case: Case, dtype: DTypeLike) -> Op:
        return self.op.plan(spec(case["x"], dtype), *self.options)

    def refusals(self) -> list[Refusal]:
        empty = functools.partial(self.op.plan, spec((2, 0)), *self.options)
        return [Refusal("empty", empty, ShapeError, "empty")]
