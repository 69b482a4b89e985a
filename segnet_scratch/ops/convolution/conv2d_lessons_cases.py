"""Rows of the rungs that teach: the cases of the other rungs, with channels that the kernel takes."""

import numpy as np
from numpy.typing import DTypeLike

from segnet_scratch.errors import DTypeError, ShapeError
from segnet_scratch.ops.cases import Case, Refusal, in_whole_pieces
from segnet_scratch.ops.convolution.conv2d import Conv2dForward
from segnet_scratch.ops.convolution.conv2d_cases import CONVOLUTIONS, TILES, Conv2dRow, conv_case
from segnet_scratch.ops.convolution.conv2d_lessons import LESSONS, Conv2dLesson
from segnet_scratch.ops.op import Op, spec

# Blocks of 16 x 16, 128 x 64 and 64 x 64 results, depths of 16 and 32.
EDGES = [
    *(conv_case(f"{p} pixels, {o} outputs", (1, 1, p, 16), o, (1, 1)) for p, o in ((15, 17), (16, 16), (17, 15))),
    *(conv_case(f"{p} pixels, {o} outputs", (1, 1, p, 16), o, (1, 1)) for p, o in ((63, 65), (64, 64), (65, 63))),
    *(conv_case(f"{c} channels: rounds of the depth", (1, 3, 5, c), 9, (1, 1)) for c in (8, 24, 32, 40, 72)),
]


class LessonRow(Conv2dRow):
    """fprop by the kernel of a lesson."""

    function = ""  # nobody calls it but this row

    def cases(self) -> list[Case]:
        return [in_whole_pieces(case, self.channels) for case in CONVOLUTIONS + TILES + EDGES]

    def random_case(self, rng: np.random.Generator) -> Case:
        return in_whole_pieces(super().random_case(rng), self.channels)

    def reference_plan(self, case: Case) -> Op:
        weight = spec((case["o"], *case["kernel"], case["x"][3]), np.float64)
        return Conv2dForward.plan(spec(case["x"], np.float64), weight, case["stride"], case["padding"], "direct")

    def refusals(self) -> list[Refusal]:
        def attempt(c: int, stride: int, dtype: DTypeLike) -> object:
            return Conv2dLesson(spec((1, 4, 5, c), dtype), spec((2, 3, 3, c), dtype), stride, 1, self.rung)

        taken = self.elements[0]
        refusals = [Refusal("stride 2", lambda: attempt(8, 2, taken), ShapeError, "use 'direct'")]
        if self.channels > 1:
            multiples = f"multiples of {self.channels}"
            refusals.append(Refusal("channels", lambda: attempt(9, 1, taken), ShapeError, multiples))
            refusals.append(Refusal("element type", lambda: attempt(8, 1, np.float64), DTypeError, "not float64"))
        return refusals


ROWS = tuple(
    LessonRow(Conv2dLesson, lesson, elements=tuple(spec((), kind).dtype for kind in of.elements), channels=of.channels)
    for lesson, of in LESSONS.items()
)
