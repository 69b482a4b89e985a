"""The sizes of a convolution, derived in one place."""

from dataclasses import dataclass
from typing import Any

from segnet_scratch.ops.op import expect


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
    padding: int

    @staticmethod
    def of(x: tuple[int, ...], weight: tuple[int, ...], stride: int, padding: int) -> "Geometry":
        """From x (n, h, w, c) and weight (o, kh, kw, c); ShapeError where they do not fit."""
        expect(len(x) == 4, f"conv2d: x has shape {x}; expected (n, h, w, c), channels last")
        expect(
            len(weight) == 4 and min(weight) > 0,
            f"conv2d: weight has shape {weight}; expected (o, kh, kw, c)",
        )
        n, h, w, c = x
        o, kh, kw, weight_channels = weight
        expect(
            c == weight_channels,
            f"conv2d: x {x} has {c} channels, weight {weight} takes {weight_channels}; weights are (o, kh, kw, c)",
        )
        expect(
            stride >= 1 and padding >= 0,
            f"conv2d: stride {stride}, padding {padding}; expected >= 1 and >= 0",
        )
        oh, ow = (h + 2 * padding - kh) // stride + 1, (w + 2 * padding - kw) // stride + 1
        expect(
            h + 2 * padding >= kh and w + 2 * padding >= kw,
            f"conv2d: the kernel {kh}x{kw} is larger than the padded image {h + 2 * padding}x{w + 2 * padding}",
        )
        return Geometry(n, h, w, c, oh, ow, o, kh, kw, stride, padding)

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
        """dgrad (stride 1) as an fprop: of dy, with the flipped weight (c, kh, kw, o), padded by `mirrored_pads`."""
        return Geometry(self.n, self.oh, self.ow, self.o, self.h, self.w, self.c, self.kh, self.kw, 1, self.padding)

    @property
    def pads(self) -> dict[str, Any]:
        """Rows and columns of zeros before x, as the implicit GEMMs take them."""
        return {"pad_y": self.padding, "pad_x": self.padding}

    @property
    def mirrored_pads(self) -> dict[str, Any]:
        """Those before dy, in `mirrored`; negative where the padding was wider than the kernel."""
        return {"pad_y": self.kh - 1 - self.padding, "pad_x": self.kw - 1 - self.padding}
