"""Transposed convolution of kernel 4, stride 2, padding 1: learned upsampling by 2, as in FCN (arXiv 1411.4038).

It is computed as a 2x2 convolution to four times the channels, one group for each parity of output row and column,
whose pixels are then interleaved; cuda/conv_transpose2d.cu derives that. So each rung of conv2d serves here too.

Weights are (c, 4, 4, o), those of the convolution whose transpose this is: PyTorch's and Caffe's convention.
"""

import numpy as np

from segnet_scratch.errors import DTypeError
from segnet_scratch.ops.convolution.conv2d import Conv2dBackwardData, Conv2dBackwardWeight, Conv2dForward
from segnet_scratch.ops.op import Buffers, Op, Spec, element_grid, expect, expect_map
from segnet_scratch.ops.pooling.windows import windows_of
from segnet_scratch.runtime.devices import Array, Device

KERNEL = 4  # the smallest one that can interpolate bilinearly by 2, which is how FCN initialises it


class _ConvTransposeOp(Op):
    """One direction and the 2x2 convolution that does its work. x (n, h', w', c) goes with y of `size` = (h, w)."""

    conv: Conv2dForward | Conv2dBackwardData | Conv2dBackwardWeight

    def __init__(self, x: Spec, weight: Spec, size: tuple[int, int], rung: str | None = None) -> None:
        n, rows, columns, c = expect_map(self.name, "x", x)
        expect(
            len(weight.shape) == 4 and weight.shape[:3] == (c, KERNEL, KERNEL) and weight.size > 0,
            f"{self.name}: weight has shape {weight.shape}; expected (c, {KERNEL}, {KERNEL}, o) with the {c} channels "
            f"of x {x.shape}",
        )
        if weight.dtype != x.dtype:
            raise DTypeError(f"{self.name}: weight has element type {weight.dtype}, x {x.dtype}; convert one")
        o = weight.shape[3]
        expect(
            windows_of(n, *size, c) == x.shape,
            f"{self.name}: x {x.shape} cannot become a map of size {size}; expected a size in "
            f"{2 * rows - 1}..{2 * rows} x {2 * columns - 1}..{2 * columns}",
        )
        self.x, self.weight, self.rung = x, weight, rung
        self.y = x.with_shape(n, *size, o)
        self.z = x.with_shape(n, rows + 1, columns + 1, 4 * o)
        self.packed = x.with_shape(4 * o, 2, 2, c)
        self.flops = 2 * x.size * KERNEL * KERNEL * o  # each element of x meets every weight of its channel

    def pack(self, device: Device, b: Buffers) -> None:
        """b.packed from b.weight."""
        self.kernel(device, "conv_transpose2d_pack_weight", b, element_grid(b.weight.size))

    def separate(self, device: Device, b: Buffers) -> None:
        """b.z, here the gradient of z, from b.dy."""
        self.kernel(device, "conv_transpose2d_backward_separate", b, element_grid(b.z.size), dz=b.z)

    def workspace_of_conv(self, b: Buffers) -> dict[str, Array]:
        """The convolution's own workspace, which is part of this op's."""
        return {name: getattr(b, name) for name in self.conv.workspace}


class ConvTranspose2dForward(_ConvTransposeOp):
    """y (n, h, w, o) from x (n, ceil(h/2), ceil(w/2), c) and weight (c, 4, 4, o)."""

    name = "conv_transpose2d_forward"

    def __init__(self, x: Spec, weight: Spec, size: tuple[int, int], rung: str | None = None) -> None:
        super().__init__(x, weight, size, rung)
        self.conv = Conv2dForward.plan(x, self.packed, 1, 1, rung)
        self.inputs = {"x": x, "weight": weight}
        self.outputs = {"y": self.y}
        self.workspace = {"packed": self.packed, "z": self.z, **self.conv.workspace}

    def launch(self, device: Device, b: Buffers) -> None:
        self.pack(device, b)
        self.conv.launch(device, Buffers(x=b.x, weight=b.packed, bias=None, y=b.z, **self.workspace_of_conv(b)))
        self.kernel(device, "conv_transpose2d_forward_interleave", b)

    def gradient(self) -> tuple[Op, ...]:
        options = self.x, self.weight, self.y.shape[1:3], self.rung
        return ConvTranspose2dBackwardData.plan(*options), ConvTranspose2dBackwardWeight.plan(*options)

    def reference(self, b: Buffers) -> None:
        spread = _spread(b.x, b.y)
        for ky, kx, pixels in _taps(spread, b.x):
            pixels += b.x @ b.weight[:, ky, kx]
        b.y[...] = _cropped(spread, b.y)

    def numpy(self, b: Buffers) -> None:
        z = np.empty(self.z.shape, self.z.dtype)
        self.conv.numpy(Buffers(x=b.x, weight=_packed(b.weight), bias=None, y=z))
        for parity, pixels in _parities(z):
            target, source = _shared(b.y, pixels, parity)
            target[...] = source


class ConvTranspose2dBackwardData(_ConvTransposeOp):
    """dx from dy. `x` is the Spec of the forward's input."""

    name = "conv_transpose2d_backward_data"

    def __init__(self, x: Spec, weight: Spec, size: tuple[int, int], rung: str | None = None) -> None:
        super().__init__(x, weight, size, rung)
        self.conv = Conv2dBackwardData.plan(x, self.packed, 1, 1, rung)
        self.inputs = {"dy": self.y, "weight": weight}
        self.outputs = {"dx": x}
        self.workspace = {"packed": self.packed, "z": self.z, **self.conv.workspace}

    def launch(self, device: Device, b: Buffers) -> None:
        self.pack(device, b)
        self.separate(device, b)
        self.conv.launch(device, Buffers(dy=b.z, weight=b.packed, dx=b.dx, **self.workspace_of_conv(b)))

    def reference(self, b: Buffers) -> None:
        spread = _spread(b.dx, b.dy)
        _cropped(spread, b.dy)[...] = b.dy
        b.dx[...] = 0
        for ky, kx, pixels in _taps(spread, b.dx):
            b.dx += pixels @ b.weight[:, ky, kx].T

    def numpy(self, b: Buffers) -> None:
        self.conv.numpy(Buffers(dy=_separated(b.dy, self.z), weight=_packed(b.weight), dx=b.dx))


class ConvTranspose2dBackwardWeight(_ConvTransposeOp):
    """dweight from x and dy."""

    name = "conv_transpose2d_backward_weight"

    def __init__(self, x: Spec, weight: Spec, size: tuple[int, int], rung: str | None = None) -> None:
        super().__init__(x, weight, size, rung)
        self.conv = Conv2dBackwardWeight.plan(x, self.packed, 1, 1, rung)
        self.inputs = {"x": x, "dy": self.y}
        self.outputs = {"dweight": weight}
        self.workspace = {"dpacked": self.packed, "z": self.z, **self.conv.workspace}

    def launch(self, device: Device, b: Buffers) -> None:
        self.separate(device, b)
        self.conv.launch(device, Buffers(x=b.x, dy=b.z, dweight=b.dpacked, **self.workspace_of_conv(b)))
        self.kernel(device, "conv_transpose2d_unpack_weight", b)

    def reference(self, b: Buffers) -> None:
        spread = _spread(b.x, b.dy)
        _cropped(spread, b.dy)[...] = b.dy
        for ky, kx, pixels in _taps(spread, b.x):
            b.dweight[:, ky, kx] = np.einsum("nyxc,nyxo->co", b.x, pixels)

    def numpy(self, b: Buffers) -> None:
        dpacked = np.empty(self.packed.shape, self.packed.dtype)
        self.conv.numpy(Buffers(x=b.x, dy=_separated(b.dy, self.z), dweight=dpacked))
        o = self.weight.shape[3]
        by_tap = dpacked.reshape(2, 2, o, 2, 2, -1)[:, :, :, ::-1, ::-1]  # (p, q, o, ky // 2, kx // 2, c)
        b.dweight[...] = by_tap.transpose(5, 3, 0, 4, 1, 2).reshape(b.dweight.shape)


# --------------------------------------------------------------------------------- the references: pixels spread out


def _spread(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Zeros for y before padding is taken away: (n, 2 h' + 2, 2 w' + 2, o)."""
    n, rows, columns, _ = x.shape
    return np.zeros((n, 2 * rows + 2, 2 * columns + 2, y.shape[3]), y.dtype)


def _cropped(spread: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The part of the spread-out map that y keeps: padding 1 is taken away, and what an odd size does not have."""
    return spread[:, 1 : 1 + y.shape[1], 1 : 1 + y.shape[2]]


def _taps(spread: np.ndarray, x: np.ndarray) -> list[tuple[int, int, np.ndarray]]:
    """(ky, kx, view (n, h', w', o)) for each tap: the pixels that it writes."""
    rows, columns = 2 * x.shape[1], 2 * x.shape[2]
    return [
        (ky, kx, spread[:, ky : ky + rows : 2, kx : kx + columns : 2]) for ky in range(KERNEL) for kx in range(KERNEL)
    ]


# --------------------------------------------------------------------------------- the fast way: pixels by parity


def _packed(weight: np.ndarray) -> np.ndarray:
    """The 2x2 convolution's weight (4 o, 2, 2, c) of weight (c, 4, 4, o)."""
    c, _, _, o = weight.shape
    by_tap = weight.reshape(c, 2, 2, 2, 2, o)[:, ::-1, :, ::-1]  # (c, ty, p, tx, q, o)
    return np.ascontiguousarray(by_tap.transpose(2, 4, 5, 1, 3, 0)).reshape(4 * o, 2, 2, c)


def _parities(z: np.ndarray) -> list[tuple[tuple[int, int], np.ndarray]]:
    """((p, q), view (n, h' + 1, w' + 1, o)) for each group of channels of z."""
    o = z.shape[3] // 4
    return [((p, q), z[..., (2 * p + q) * o : (2 * p + q + 1) * o]) for p in (0, 1) for q in (0, 1)]


def _shared(y: np.ndarray, pixels: np.ndarray, parity: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The pixels of y that have this parity, counted from one before y, and where z holds them."""
    p, q = parity
    target = y[:, 1 - p :: 2, 1 - q :: 2]
    rows, columns = target.shape[1:3]
    return target, pixels[:, 1 - p : 1 - p + rows, 1 - q : 1 - q + columns]


def _separated(dy: np.ndarray, z: Spec) -> np.ndarray:
    """The gradient of z: the pixels of dy by parity, 0 where y was cropped."""
    dz = np.zeros(z.shape, z.dtype)
    for parity, pixels in _parities(dz):
        source, target = _shared(dy, pixels, parity)
        target[...] = source
    return dz


def bilinear_weight(channels: int) -> np.ndarray:
    """The weight (c, 4, 4, c) that interpolates each channel bilinearly by 2, as FCN initialises its upsampling.

    Away from the border that is resize_bilinear; at the border zeros are interpolated with.
    """
    line = np.array([0.25, 0.75, 0.75, 0.25])
    return np.eye(channels)[:, None, None, :] * (line[:, None] * line)[:, :, None]
