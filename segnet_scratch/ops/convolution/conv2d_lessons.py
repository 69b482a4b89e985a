"""Rungs of the convolution's ladder that teach: fprop alone, one idea each (docs/learn/convolution.md).

No layer takes them. They are planned, launched, proven and timed like any op, so that what a page says of them can be
looked at: `segnet profile conv2d`, `segnet run`, `segnet doctor --kernels`.
"""

from dataclasses import dataclass

from segnet_scratch.errors import DTypeError
from segnet_scratch.ops.convolution.conv2d import Conv2dForward
from segnet_scratch.ops.op import Buffers, Spec, expect
from segnet_scratch.runtime.devices import Device


@dataclass(frozen=True)
class Lesson:
    """What a kernel of this kind computes in a block, and what it takes."""

    elements: tuple[str, ...]
    channels: int  # of x, a multiple of it: what one copy moves
    tile: tuple[int, int]  # pixels, outputs
    block: tuple[int, ...]  # threads


LESSONS = {
    "shared": Lesson(("float32", "float64", "bfloat16"), 1, (16, 16), (16, 16)),
    "pipelined": Lesson(("float32",), 4, (128, 64), (128,)),
    "mma_plain": Lesson(("bfloat16",), 8, (64, 64), (128,)),
}


class Conv2dLesson(Conv2dForward):
    """y = x * weight + bias of stride 1, by the kernel of a lesson."""

    def __init__(self, x: Spec, weight: Spec, stride: int, padding: int, lesson: str) -> None:
        super().__init__(x, weight, stride, padding, "tiled")
        self.lesson, self.rung = LESSONS[lesson], lesson
        whole, c = self.lesson.channels, self.geometry.c
        expect(c % whole == 0, f"conv2d: rung {lesson!r} takes channels in multiples of {whole}, not {c}; use 'tiled'")
        if x.dtype.name not in self.lesson.elements:
            raise DTypeError(f"conv2d: rung {lesson!r} takes {', '.join(self.lesson.elements)}, not {x.dtype}")

    def launch_product(self, device: Device, b: Buffers) -> None:
        g, (rows, columns) = self.geometry, self.lesson.tile
        grid = (-(-g.pixels // rows), -(-g.o // columns))
        self.kernel(device, f"conv2d_forward_{self.rung}", b, grid, self.lesson.block, **g.sizes)
