"""The sizes of a convolution, derived in one place."""

from dataclasses import dataclass
from typing import Any

from segnet_scratch.ops.op import expect


@dataclass(frozen=True)
class Cut:
    """A sum in `count` parts of `each`, the last one with fewer, none with none; from shapes alone, as is its order."""

    count: int
    each: int

    @staticmethod
    def of(total: int, wanted: int) -> "Cut":
        """Into so many parts, or somewhat fewer."""
        each = -(-total // wanted)
        return Cut(-(-total // each), each)


@dataclass(frozen=True)
class Geometry:
    """Every size of one convolution, derived in one place."""

    n: int
    h: int
    w: int
    c: int
    oh: int
    ow: int
    o: int
    kh: int
    kw: int
    stride: int
    pad_y: int  # rows of zeros before x; negative in `mirrored` where the padding was wider than the kernel
    pad_x: int

    @staticmethod
    def of(x: tuple[int, ...], weight: tuple[int, ...], stride: int, padding: int) -> "Geometry":
        """From x (n, h, w, c) and weight (o, kh, kw, c); ShapeError where they do not fit."""
        expect(len(x) == 4, f"conv2d: x has shape {x}; expected (n, h, w, c), channels last")
        expect(len(weight) == 4 and min(weight) > 0, f"conv2d: weight has shape {weight}; expected (o, kh, kw, c)")
        (n, h, w, c), (o, kh, kw, taken) = x, weight
        expect(c == taken, f"conv2d: x {x} has {c} channels, weight {weight} takes {taken}; weights are (o, kh, kw, c)")
        expect(stride >= 1 and padding >= 0, f"conv2d: stride {stride}, padding {padding}; expected >= 1 and >= 0")
        height, width = h + 2 * padding, w + 2 * padding
        larger = f"conv2d: the kernel {kh}x{kw} is larger than the padded image {height}x{width}"
        expect(height >= kh and width >= kw, larger)
        oh, ow = (height - kh) // stride + 1, (width - kw) // stride + 1
        return Geometry(n, h, w, c, oh, ow, o, kh, kw, stride, padding, padding)

    @property
    def x(self) -> tuple[int, int, int, int]:
        return self.n, self.h, self.w, self.c

    @property
    def y(self) -> tuple[int, int, int, int]:
        return self.n, self.oh, self.ow, self.o

    @property
    def weight(self) -> tuple[int, int, int, int]:
        return self.o, self.kh, self.kw, self.c

    @property
    def pixels(self) -> int:
        """Output pixels of the batch."""
        return self.n * self.oh * self.ow

    @property
    def depth(self) -> int:
        """Length of the sum behind one output: kh kw c."""
        return self.kh * self.kw * self.c

    @property
    def flops(self) -> int:
        """Of fprop, dgrad or wgrad each: a multiplication and an addition a term."""
        return 2 * self.pixels * self.depth * self.o

    @property
    def mirrored(self) -> "Geometry":
        """dgrad (stride 1) as an fprop: of dy, with the flipped weight (c, kh, kw, o)."""
        pads = self.kh - 1 - self.pad_y, self.kw - 1 - self.pad_x
        return Geometry(self.n, self.oh, self.ow, self.o, self.h, self.w, self.c, self.kh, self.kw, 1, *pads)

    @property
    def sizes(self) -> dict[str, Any]:
        """What the implicit GEMMs are told beside the shapes of their arrays."""
        return {"oh": self.oh, "ow": self.ow, "pad_y": self.pad_y, "pad_x": self.pad_x}
