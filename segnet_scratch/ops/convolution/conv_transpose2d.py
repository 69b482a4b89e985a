"""Transposed convolution of kernel 4, stride 2, padding 1: learned upsampling by 2, as in FCN (arXiv 1411.4038).

It is computed as a 2x2 convolution to four times the channels, one group for each parity of output row and column,
whose pixels are then interleaved; cuda/conv_transpose2d.cu derives that. So each rung of conv2d serves here too.

Weights are (c, 4, 4, o), those of the convolution whose transpose this is: PyTorch's and Caffe's convention.
"""

from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from segnet_scratch.errors import DTypeError
from segnet_scratch.ops.convolution.conv2d import Conv2dBackwardData, Conv2dBackwardWeight, Conv2dForward
from segnet_scratch.ops.op import Buffers, Op, Spec, element_grid, expect, expect_map
from segnet_scratch.ops.pooling.windows import windows_of
from segnet_scratch.runtime.devices import Array, Device

KERNEL = 4  # the smallest one that can interpolate bilinearly by 2, which is how FCN initialises it


class _ConvTransposeOp(Op):
    """One direction and the 2x2 convolution that does its work. x (n, h', w', c) goes with y of `size` = (h, w).

    The references are those of the convolution of stride 2 whose transpose this is: `transposed`. It takes `full`,
    which is y with the row and column that an odd size does not have.
    """

    direction: ClassVar[type[Conv2dForward] | type[Conv2dBackwardData] | type[Conv2dBackwardWeight]]

    def __init__(self, x: Spec, weight: Spec, size: tuple[int, int], rung: str | None = None) -> None:
        n, rows, columns, c = expect_map(self.name, "x", x)
        fits = len(weight.shape) == 4 and weight.shape[:3] == (c, KERNEL, KERNEL) and weight.size > 0
        wanted = f"expected (c, {KERNEL}, {KERNEL}, o) with the {c} channels of x {x.shape}"
        expect(fits, f"{self.name}: weight has shape {weight.shape}; {wanted}")
        if weight.dtype != x.dtype:
            raise DTypeError(f"{self.name}: weight has element type {weight.dtype}, x {x.dtype}; convert one")
        o = weight.shape[3]
        wanted = f"expected a size in {2 * rows - 1}..{2 * rows} x {2 * columns - 1}..{2 * columns}"
        what = f"{self.name}: x {x.shape} cannot become a map of size {size}"
        expect(windows_of(n, *size, c) == x.shape, f"{what}; {wanted}")
        self.x, self.weight, self.rung = x, weight, rung
        self.y, self.full = x.with_shape(n, *size, o), x.with_shape(n, 2 * rows, 2 * columns, o)
        self.z = x.with_shape(n, rows + 1, columns + 1, 4 * o)
        self.packed = x.with_shape(4 * o, 2, 2, c)
        self.flops = 2 * x.size * KERNEL * KERNEL * o  # each element of x meets every weight of its channel
        self.conv = self.direction.plan(x, self.packed, 1, 1, rung)
        self.workspace = {"packed": self.packed, "z": self.z, **self.conv.workspace}

    def pack(self, device: Device, b: Buffers) -> None:
        """b.packed from b.weight."""
        self.kernel(device, "conv_transpose2d_pack_weight", b, element_grid(b.weight.size))

    def separate(self, device: Device, b: Buffers) -> None:
        """b.z, here the gradient of z, from b.dy."""
        self.kernel(device, "conv_transpose2d_backward_separate", b, element_grid(b.z.size), dz=b.z)

    def launch_conv(self, device: Device, b: Buffers, **arrays: Array | None) -> None:
        """The convolution, whose own workspace is part of this op's."""
        self.conv.launch(device, Buffers(**arrays, **{name: getattr(b, name) for name in self.conv.workspace}))

    def transposed(self, op: type[Op], **arrays: np.ndarray | None) -> None:
        """The reference of an op of the convolution that goes from `full` to x."""
        op.plan(self.full, self.weight, 2, 1, "direct").reference(Buffers(**arrays))

    def filled_up(self, dy: np.ndarray) -> np.ndarray:
        """dy in the size of `full`: nothing comes from what y does not have."""
        (_, h, w, _), (_, height, width, _) = self.y.shape, self.full.shape
        return np.pad(dy, ((0, 0), (0, height - h), (0, width - w), (0, 0)))


class ConvTranspose2dForward(_ConvTransposeOp):
    """y (n, h, w, o) from x (n, ceil(h/2), ceil(w/2), c) and weight (c, 4, 4, o)."""

    name, direction = "conv_transpose2d_forward", Conv2dForward

    def __init__(self, x: Spec, weight: Spec, size: tuple[int, int], rung: str | None = None) -> None:
        super().__init__(x, weight, size, rung)
        self.inputs, self.outputs = {"x": x, "weight": weight}, {"y": self.y}

    def launch(self, device: Device, b: Buffers) -> None:
        self.pack(device, b)
        self.launch_conv(device, b, x=b.x, weight=b.packed, bias=None, y=b.z)
        self.kernel(device, "conv_transpose2d_forward_interleave", b)

    def gradient(self) -> tuple[Op, ...]:
        options = self.x, self.weight, self.y.shape[1:3], self.rung
        return ConvTranspose2dBackwardData.plan(*options), ConvTranspose2dBackwardWeight.plan(*options)

    def reference(self, b: Buffers) -> None:
        full = np.empty(self.full.shape, b.y.dtype)
        self.transposed(Conv2dBackwardData, dy=b.x, weight=b.weight, dx=full)
        b.y[...] = full[:, : b.y.shape[1], : b.y.shape[2]]

    def numpy(self, b: Buffers) -> None:
        z = np.empty(self.z.shape, self.z.dtype)
        self.conv.numpy(Buffers(x=b.x, weight=_packed(b.weight), bias=None, y=z))
        for target, source in _shared(b.y, z):
            target[...] = source


class ConvTranspose2dBackwardData(_ConvTransposeOp):
    """dx from dy. `x` is the Spec of the forward's input."""

    name, direction = "conv_transpose2d_backward_data", Conv2dBackwardData

    def __init__(self, x: Spec, weight: Spec, size: tuple[int, int], rung: str | None = None) -> None:
        super().__init__(x, weight, size, rung)
        self.inputs, self.outputs = {"dy": self.y, "weight": weight}, {"dx": x}

    def launch(self, device: Device, b: Buffers) -> None:
        self.pack(device, b)
        self.separate(device, b)
        self.launch_conv(device, b, dy=b.z, weight=b.packed, dx=b.dx)

    def reference(self, b: Buffers) -> None:
        self.transposed(Conv2dForward, x=self.filled_up(b.dy), weight=b.weight, bias=None, y=b.dx)

    def numpy(self, b: Buffers) -> None:
        self.conv.numpy(Buffers(dy=_separated(b.dy, self.z), weight=_packed(b.weight), dx=b.dx))


class ConvTranspose2dBackwardWeight(_ConvTransposeOp):
    """dweight from x and dy."""

    name, direction = "conv_transpose2d_backward_weight", Conv2dBackwardWeight

    def __init__(self, x: Spec, weight: Spec, size: tuple[int, int], rung: str | None = None) -> None:
        super().__init__(x, weight, size, rung)
        self.inputs, self.outputs = {"x": x, "dy": self.y}, {"dweight": weight}
        self.workspace = {"dpacked": self.packed, "z": self.z, **self.conv.workspace}

    def launch(self, device: Device, b: Buffers) -> None:
        self.separate(device, b)
        self.launch_conv(device, b, x=b.x, dy=b.z, dweight=b.dpacked)
        self.kernel(device, "conv_transpose2d_unpack_weight", b)

    def reference(self, b: Buffers) -> None:
        self.transposed(Conv2dBackwardWeight, x=self.filled_up(b.dy), dy=b.x, dweight=b.dweight)

    def numpy(self, b: Buffers) -> None:
        dpacked = np.empty(self.packed.shape, self.packed.dtype)
        self.conv.numpy(Buffers(x=b.x, dy=_separated(b.dy, self.z), dweight=dpacked))
        o = self.weight.shape[3]
        by_tap = dpacked.reshape(2, 2, o, 2, 2, -1)[:, :, :, ::-1, ::-1]  # (p, q, o, ky // 2, kx // 2, c)
        b.dweight[...] = by_tap.transpose(5, 3, 0, 4, 1, 2).reshape(b.dweight.shape)


# --------------------------------------------------------------------------------- the fast way: pixels by parity


def _packed(weight: np.ndarray) -> np.ndarray:
    """The 2x2 convolution's weight (4 o, 2, 2, c) of weight (c, 4, 4, o)."""
    c, _, _, o = weight.shape
    by_tap = weight.reshape(c, 2, 2, 2, 2, o)[:, ::-1, :, ::-1]  # (c, ty, p, tx, q, o)
    return np.ascontiguousarray(by_tap.transpose(2, 4, 5, 1, 3, 0)).reshape(4 * o, 2, 2, c)


def _shared(y: np.ndarray, z: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each parity (p, q): the pixels of y that have it, counted from one before y, and where z holds them."""
    of_parity = z.reshape(*z.shape[:3], 2, 2, -1)
    for p, q in np.ndindex(2, 2):
        pixels = y[:, 1 - p :: 2, 1 - q :: 2]
        rows, columns = pixels.shape[1:3]
        yield pixels, of_parity[:, 1 - p : 1 - p + rows, 1 - q : 1 - q + columns, p, q]


def _separated(dy: np.ndarray, z: Spec) -> np.ndarray:
    """The gradient of z: the pixels of dy by parity, 0 where y was cropped."""
    dz = np.zeros(z.shape, z.dtype)
    for source, target in _shared(dy, dz):
        target[...] = source
    return dz


def bilinear_weight(channels: int) -> np.ndarray:
    """The weight (c, 4, 4, c) that interpolates each channel bilinearly by 2, as FCN initialises its upsampling.

    Away from the border that is resize_bilinear; at the border zeros are interpolated with.
    """
    line = np.array([0.25, 0.75, 0.75, 0.25])
    return np.eye(channels)[:, None, None, :] * (line[:, None] * line)[:, :, None]
