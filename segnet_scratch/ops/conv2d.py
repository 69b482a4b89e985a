"""2-D convolution (cross-correlation, as every network means it) of NHWC maps with OHWI weights, and its gradients.

Kernels come in rungs of a ladder, chosen by name: "direct" (any shape, one thread an element) and "tiled" (stride 1,
implicit GEMM with tiles in shared memory and registers). None takes the fastest that fits.
"""

from dataclasses import dataclass

import numpy as np

from segnet_scratch.autograd import Function, Tensor
from segnet_scratch.cpu import conv2d as fast
from segnet_scratch.device import Array, Device
from segnet_scratch.errors import DTypeError, ShapeError
from segnet_scratch.ops.op import (
    ELEMENT_THREADS,
    Buffers,
    Columns,
    Op,
    Spec,
    element_grid,
    expect,
    expect_map,
    spec_of,
)

RUNGS = ("direct", "tiled")
# The tiles of cuda/conv2d_tiled.cu.
TILE_ROWS, TILE_COLUMNS, TILE_THREADS = 128, 64, 128


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

    def choose_rung(self, rung: str | None) -> str:
        """The rung of this name, or the default one; ShapeError where it does not take this shape."""
        if rung is None:
            return "tiled" if self.stride == 1 else "direct"
        if rung not in RUNGS:
            raise ShapeError(f"conv2d: there is no rung {rung!r}; expected one of {', '.join(RUNGS)}")
        expect(
            rung != "tiled" or self.stride == 1,
            f"conv2d: rung 'tiled' takes stride 1, not {self.stride}; use 'direct'",
        )
        return rung

    @property
    def direct_arguments(self) -> tuple[int, ...]:
        """The sizes as the kernels of conv2d_direct.cu take them."""
        return (*self.x, self.oh, self.ow, self.o, self.kh, self.kw, self.stride, self.padding)


class _ConvOp(Op):
    """A convolution kernel with its geometry and rung."""

    def __init__(self, x: Spec, weight: Spec, stride: int, padding: int, rung: str | None) -> None:
        expect_map(self.name, "x", x)
        if weight.dtype != x.dtype:
            raise DTypeError(f"{self.name}: weight has element type {weight.dtype}, x {x.dtype}; convert one")
        self.geometry = Geometry.of(x.shape, weight.shape, stride, padding)
        self.rung = self.geometry.choose_rung(rung)
        self.flops = self.geometry.flops
        self.workspace = {}


class Conv2dForward(_ConvOp):
    """y = x * weight + bias: fprop. x (n, h, w, c), weight (o, kh, kw, c), bias (o) or None."""

    name = "conv2d_forward"
    optional = ("bias",)

    def __init__(self, x: Spec, weight: Spec, stride: int = 1, padding: int = 0, rung: str | None = None) -> None:
        super().__init__(x, weight, stride, padding, rung)
        self.inputs = {"x": x, "weight": weight, "bias": x.with_shape(self.geometry.o)}
        self.outputs = {"y": x.with_shape(*self.geometry.y)}

    def launch(self, device: Device, b: Buffers) -> None:
        if self.rung == "tiled":
            _launch_tiled(self, device, self.geometry, b.x, b.weight, b.bias, b.y)
        else:
            grid = element_grid(b.y.size)
            arguments = (b.x, b.weight, b.bias, b.y, *self.geometry.direct_arguments)
            self.kernel(device, "conv2d_forward_direct", grid, ELEMENT_THREADS, *arguments)

    def reference(self, b: Buffers) -> None:
        b.y[...] = 0 if b.bias is None else b.bias
        for ky, kx, patch in _taps(self.geometry, _padded(self.geometry, b.x)):
            b.y += patch @ b.weight[:, ky, kx].T

    def numpy(self, b: Buffers) -> None:
        fast.forward(b.x, b.weight, b.bias, b.y, self.geometry.stride, self.geometry.padding)


class Conv2dBackwardData(_ConvOp):
    """dx: dgrad. `x` is the Spec of the forward's input."""

    name = "conv2d_backward_data"

    def __init__(self, x: Spec, weight: Spec, stride: int = 1, padding: int = 0, rung: str | None = None) -> None:
        super().__init__(x, weight, stride, padding, rung)
        g = self.geometry
        self.inputs = {"dy": x.with_shape(*g.y), "weight": weight}
        self.outputs = {"dx": x}
        if self.rung == "tiled":
            self.workspace = {"flipped": x.with_shape(g.c, g.kh, g.kw, g.o)}

    def launch(self, device: Device, b: Buffers) -> None:
        g = self.geometry
        if self.rung == "tiled":
            grid = element_grid(b.weight.size)
            self.kernel(device, "conv2d_flip_weight", grid, ELEMENT_THREADS, b.weight, b.flipped, g.o, g.kh, g.kw, g.c)
            mirrored = Geometry(g.n, g.oh, g.ow, g.o, g.h, g.w, g.c, g.kh, g.kw, 1, g.padding)
            pads = (g.kh - 1 - g.padding, g.kw - 1 - g.padding)
            _launch_tiled(self, device, mirrored, b.dy, b.flipped, None, b.dx, pads)
        else:
            grid = element_grid(b.dx.size)
            arguments = (b.dy, b.weight, b.dx, *g.direct_arguments)
            self.kernel(device, "conv2d_backward_data_direct", grid, ELEMENT_THREADS, *arguments)

    def reference(self, b: Buffers) -> None:
        g = self.geometry
        padded = np.zeros((g.n, g.h + 2 * g.padding, g.w + 2 * g.padding, g.c), b.dx.dtype)
        for ky, kx, patch in _taps(g, padded):
            patch += b.dy @ b.weight[:, ky, kx]
        b.dx[...] = padded[:, g.padding : g.padding + g.h, g.padding : g.padding + g.w]

    def numpy(self, b: Buffers) -> None:
        fast.backward_data(b.dy, b.weight, b.dx, self.geometry.stride, self.geometry.padding)


class Conv2dBackwardWeight(_ConvOp):
    """dweight: wgrad. The tiled rung splits the pixels into chunks and adds their results in a fixed order."""

    name = "conv2d_backward_weight"
    MIN_PIXELS = 2048  # of a chunk, so that adding the partial results stays small beside making them
    MAX_CHUNKS = 64

    def __init__(self, x: Spec, weight: Spec, stride: int = 1, padding: int = 0, rung: str | None = None) -> None:
        super().__init__(x, weight, stride, padding, rung)
        g = self.geometry
        self.inputs = {"x": x, "dy": x.with_shape(*g.y)}
        self.outputs = {"dweight": weight}
        tiles = -(-g.depth // TILE_ROWS) * -(-g.o // TILE_COLUMNS)
        # Enough blocks to fill a large GPU, from the shape alone: the order of the sum must not depend on the GPU.
        wanted = min(self.MAX_CHUNKS, -(-512 // tiles), -(-g.pixels // self.MIN_PIXELS))
        self.pixels_per_chunk = -(-g.pixels // wanted)
        self.chunks = -(-g.pixels // self.pixels_per_chunk)
        if self.rung == "tiled":
            self.workspace = {"partials": x.with_shape(self.chunks, *weight.shape)}

    def launch(self, device: Device, b: Buffers) -> None:
        g = self.geometry
        if self.rung == "tiled":
            tiles = (-(-g.depth // TILE_ROWS), -(-g.o // TILE_COLUMNS), self.chunks)
            sizes = (
                *g.x,
                g.oh,
                g.ow,
                g.o,
                g.kh,
                g.kw,
                g.padding,
                g.padding,
                self.chunks,
                self.pixels_per_chunk,
            )
            self.kernel(device, "conv2d_backward_weight_tiled", tiles, TILE_THREADS, b.x, b.dy, b.partials, *sizes)
            count = b.dweight.size
            arguments = (b.partials, b.dweight, count, self.chunks)
            self.kernel(device, "conv2d_backward_weight_merge", element_grid(count), ELEMENT_THREADS, *arguments)
        else:
            grid = element_grid(b.dweight.size)
            arguments = (b.x, b.dy, b.dweight, *g.direct_arguments)
            self.kernel(device, "conv2d_backward_weight_direct", grid, ELEMENT_THREADS, *arguments)

    def reference(self, b: Buffers) -> None:
        for ky, kx, patch in _taps(self.geometry, _padded(self.geometry, b.x)):
            b.dweight[:, ky, kx] = np.einsum("nyxo,nyxc->oc", b.dy, patch)

    def numpy(self, b: Buffers) -> None:
        fast.backward_weight(b.x, b.dy, b.dweight, self.geometry.stride, self.geometry.padding)


class Conv2dBackwardBias(Op):
    """dbias = sum of dy over pixels. dy (n, oh, ow, o)."""

    name = "conv2d_backward_bias"

    def __init__(self, dy: Spec) -> None:
        n, h, w, o = expect_map(self.name, "dy", dy)
        self.columns = Columns(n * h * w, o)
        self.inputs = {"dy": dy}
        self.outputs = {"dbias": dy.with_shape(o)}
        self.workspace = {"partials": dy.with_shape(self.columns.chunks, o)}
        self.flops = dy.size

    def launch(self, device: Device, b: Buffers) -> None:
        g = self.columns
        cut = (g.rows, g.channels, g.chunks, g.rows_per_chunk)
        self.kernel(device, "conv2d_backward_bias_partial", g.grid, g.block, b.dy, b.partials, *cut)
        merge = (b.partials, b.dbias, g.channels, g.chunks)
        self.kernel(device, "conv2d_backward_bias_merge", g.merge_grid, ELEMENT_THREADS, *merge)

    def reference(self, b: Buffers) -> None:
        b.dbias[...] = b.dy.sum((0, 1, 2))

    def numpy(self, b: Buffers) -> None:
        fast.backward_bias(b.dy, b.dbias)


def _launch_tiled(
    op: Op,
    device: Device,
    g: Geometry,
    x: Array,
    weight: Array,
    bias: Array | None,
    y: Array,
    pads: tuple[int, int] | None = None,
) -> None:
    """The implicit GEMM of fprop, and of dgrad with other arguments. `pads` are rows and columns of zeros before x."""
    grid = (-(-g.pixels // TILE_ROWS), -(-g.o // TILE_COLUMNS))
    sizes = (*g.x, g.oh, g.ow, g.o, g.kh, g.kw, *(pads or (g.padding, g.padding)))
    op.kernel(device, "conv2d_forward_tiled", grid, TILE_THREADS, x, weight, bias, y, *sizes)


def _padded(g: Geometry, x: np.ndarray) -> np.ndarray:
    p = g.padding
    return np.pad(x, ((0, 0), (p, p), (p, p), (0, 0)))


def _taps(g: Geometry, padded: np.ndarray) -> list[tuple[int, int, np.ndarray]]:
    """(ky, kx, view (n, oh, ow, c)) for each tap: the padded pixels that it meets."""
    rows, columns = (g.oh - 1) * g.stride + 1, (g.ow - 1) * g.stride + 1
    return [
        (ky, kx, padded[:, ky : ky + rows : g.stride, kx : kx + columns : g.stride])
        for ky in range(g.kh)
        for kx in range(g.kw)
    ]


class Conv2d(Function):
    """Saves x and the weight."""

    def __init__(self, device: Device, stride: int, padding: int, rung: str | None, input_gradient: bool) -> None:
        super().__init__(device)
        self.options = (stride, padding, rung)
        self.input_gradient = input_gradient  # the first layer of a network needs none

    def forward(self, x: Array, weight: Array, bias: Array | None = None) -> Array:
        self.x, self.weight, self.has_bias = x, weight, bias is not None
        op = Conv2dForward.plan(spec_of(x), spec_of(weight), *self.options)
        return op(self.device, x=x, weight=weight, bias=bias).y

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        specs = spec_of(self.x), spec_of(self.weight)
        dx = None
        if self.input_gradient:
            dx = Conv2dBackwardData.plan(*specs, *self.options)(self.device, dy=dy, weight=self.weight).dx
        dweight = Conv2dBackwardWeight.plan(*specs, *self.options)(self.device, x=self.x, dy=dy).dweight
        if not self.has_bias:
            return dx, dweight
        return dx, dweight, Conv2dBackwardBias.plan(spec_of(dy))(self.device, dy=dy).dbias


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    rung: str | None = None,
) -> Tensor:
    """y (n, oh, ow, o) of x (n, h, w, c), weight (o, kh, kw, c), bias (o); oh = (h + 2 padding - kh) // stride + 1."""
    function = Conv2d(x.device, stride, padding, rung, x.requires_grad)
    return function(x, weight) if bias is None else function(x, weight, bias)
