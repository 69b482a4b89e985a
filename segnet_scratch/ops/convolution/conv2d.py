"""2-D convolution (cross-correlation, as every network means it) of NHWC maps with OHWI weights, and its gradients.

Kernels come in rungs of a ladder (docs/explanation/kernels.md), chosen by name:

    direct   any shape, one thread per element; float32 and float64
    tiled    stride 1, implicit GEMM with tiles in shared memory and registers; float32, float64 and bfloat16
    tf32     the same on tensor cores, factors rounded to tf32; float32
    tf32x3   the same, factors split in two: float32's accuracy; float32
    bf16     the same of bfloat16 maps and weights

None takes "tiled" ("direct" for a stride), and "bf16" for bfloat16; for layers on a GPU with tensor cores "tf32x3"
(`rung_for`). "tf32" is taken by name only.

With bfloat16 maps and weights the bias and the gradients of weight and bias are float32: they are sums over all pixels,
and what an optimiser adds up.
"""

import functools
import logging
from typing import Any, ClassVar

import numpy as np

from segnet_scratch.errors import DTypeError, ShapeError
from segnet_scratch.ops.convolution import conv2d_mma as mma
from segnet_scratch.ops.convolution import fast
from segnet_scratch.ops.convolution.conv2d_geometry import Geometry
from segnet_scratch.ops.op import ELEMENT_THREADS, Buffers, ColumnsOp, Op, Spec, element_grid, expect, expect_map
from segnet_scratch.runtime.devices import Device
from segnet_scratch.runtime.launch import ElementTypes
from segnet_scratch.runtime.precision import BFLOAT16, ELEMENTS_OF_RUNG, round_to_tf32

log = logging.getLogger(__name__)

RUNGS = ("direct", "tiled", *ELEMENTS_OF_RUNG)
TILED = mma.Tile("tiled", 128, 64)  # of cuda/conv2d_tiled.cu
TILED_THREADS = 128


def choose_rung(g: Geometry, dtype: np.dtype, rung: str | None) -> str:
    """The rung of this name, or the default one; ShapeError, DTypeError where it does not take shape or type."""
    if rung is None:
        if dtype == BFLOAT16 and mma.unsupported_reason(g) is None:
            return "bf16"
        return "tiled" if g.stride == 1 or dtype == BFLOAT16 else "direct"
    if rung not in RUNGS:
        raise ShapeError(f"conv2d: there is no rung {rung!r}; expected one of {', '.join(RUNGS)}")
    if rung in ELEMENTS_OF_RUNG:
        if dtype != ELEMENTS_OF_RUNG[rung]:
            raise DTypeError(
                f"conv2d: rung {rung!r} takes {ELEMENTS_OF_RUNG[rung]}, not {dtype}; convert it, or use 'tiled'"
            )
        reason = mma.unsupported_reason(g)
        expect(reason is None, f"conv2d: rung {rung!r} {reason}; use {'tiled' if g.stride == 1 else 'direct'!r}")
    if rung == "tiled":
        expect(g.stride == 1, f"conv2d: rung 'tiled' takes stride 1, not {g.stride}; use 'direct'")
    if rung == "direct" and dtype == BFLOAT16:
        raise DTypeError("conv2d: rung 'direct' takes float32 and float64, not bfloat16; use 'tiled' or 'bf16'")
    return rung


class _ConvOp(Op):
    """A convolution with its geometry and rung. `accumulated` is the type of sums over pixels, and of the bias."""

    def __init__(self, x: Spec, weight: Spec, stride: int = 1, padding: int = 0, rung: str | None = None) -> None:
        expect_map(self.name, "x", x, bfloat16=True)
        if weight.dtype != x.dtype:
            raise DTypeError(f"{self.name}: weight has element type {weight.dtype}, x {x.dtype}; convert one")
        self.geometry = Geometry.of(x.shape, weight.shape, stride, padding)
        self.stride, self.padding, self.rung = stride, padding, choose_rung(self.geometry, x.dtype, rung)
        self.accumulated = ElementTypes.of(x.dtype).accumulate
        self.flops = self.geometry.flops
        self.plan_arrays(x, weight, x.with_shape(*self.geometry.y))

    def plan_arrays(self, x: Spec, weight: Spec, y: Spec) -> None:
        """Inputs, outputs and workspace, of the forward's arrays."""
        raise NotImplementedError

    def launch(self, device: Device, b: Buffers) -> None:
        if self.rung == "direct":
            self.kernel(device, f"{self.name}_direct", b)
        else:
            self.launch_product(device, b)

    def launch_product(self, device: Device, b: Buffers) -> None:
        """The kernels of all other rungs: a product of matrices."""
        raise NotImplementedError

    def launch_gemm(self, device: Device, g: Geometry, b: Buffers) -> None:
        """The implicit GEMM of fprop, and of dgrad with other arguments."""
        if self.rung == "tiled":
            self.kernel(device, "conv2d_forward_tiled", b, TILED.grid(g.pixels, g.o), TILED_THREADS, **g.sizes)
        else:
            tile = mma.chosen(device, "forward", self.rung, g, mma.forward_tile(g, self.rung))
            tile.launch(self, device, "conv2d_forward_mma", self.rung, b, tile.grid(g.pixels, g.o), **g.sizes)

    def _factor(self, array: np.ndarray) -> np.ndarray:
        """What the rung multiplies."""
        return round_to_tf32(array) if self.rung == "tf32" else array


class Conv2dForward(_ConvOp):
    """y = x * weight + bias: fprop. x (n, h, w, c), weight (o, kh, kw, c), bias (o) or None."""

    name = "conv2d_forward"
    optional = ("bias",)

    def plan_arrays(self, x: Spec, weight: Spec, y: Spec) -> None:
        self.inputs = {"x": x, "weight": weight, "bias": Spec((self.geometry.o,), self.accumulated)}
        self.outputs = {"y": y}

    def launch_product(self, device: Device, b: Buffers) -> None:
        self.launch_gemm(device, self.geometry, b)

    def reference(self, b: Buffers) -> None:
        b.y[...] = 0 if b.bias is None else b.bias
        for ky, kx, patch in _taps(self.geometry, _padded(self.geometry, b.x)):
            b.y += patch @ b.weight[:, ky, kx].T

    def gradient(self) -> tuple[Op, ...]:
        x, weight, *_ = self.inputs.values()
        options = self.stride, self.padding, self.rung
        of_bias = Conv2dBackwardBias.plan(self.outputs["y"])
        return Conv2dBackwardData.plan(x, weight, *options), Conv2dBackwardWeight.plan(x, weight, *options), of_bias

    def numpy(self, b: Buffers) -> None:
        fast.forward(self._factor(b.x), self._factor(b.weight), b.bias, b.y, self.stride, self.padding)


class Conv2dBackwardData(_ConvOp):
    """dx: dgrad. `x` is the Spec of the forward's input."""

    name = "conv2d_backward_data"

    def plan_arrays(self, x: Spec, weight: Spec, y: Spec) -> None:
        o, kh, kw, c = weight.shape
        self.inputs, self.outputs = {"dy": y, "weight": weight}, {"dx": x}
        self.workspace = {} if self.rung == "direct" else {"flipped": x.with_shape(c, kh, kw, o)}

    def launch_product(self, device: Device, b: Buffers) -> None:
        self.kernel(device, "conv2d_flip_weight", b, element_grid(b.weight.size))
        self.launch_gemm(device, self.geometry.mirrored, Buffers(x=b.dy, weight=b.flipped, bias=None, y=b.dx))

    def reference(self, b: Buffers) -> None:
        g, p = self.geometry, self.padding
        padded = _padded(g, np.zeros_like(b.dx))
        for ky, kx, patch in _taps(g, padded):
            patch += b.dy @ b.weight[:, ky, kx]
        b.dx[...] = padded[:, p : p + g.h, p : p + g.w]

    def numpy(self, b: Buffers) -> None:
        fast.backward_data(self._factor(b.dy), self._factor(b.weight), b.dx, self.stride, self.padding)


class Conv2dBackwardWeight(_ConvOp):
    """dweight: wgrad. All rungs but direct split the pixels into chunks and add their results in a fixed order."""

    name = "conv2d_backward_weight"

    def plan_arrays(self, x: Spec, weight: Spec, y: Spec) -> None:
        self.inputs, self.outputs = {"x": x, "dy": y}, {"dweight": Spec(weight.shape, self.accumulated)}
        self.tile = mma.weight_tile(self.geometry, self.rung) if self.rung in ELEMENTS_OF_RUNG else TILED
        self.chunks = mma.chunks_of(self.geometry, self.tile.rows, self.tile.columns)
        if self.rung != "direct":
            self.workspace = {"partials": Spec((self.chunks.count, *weight.shape), self.accumulated)}

    def launch_product(self, device: Device, b: Buffers) -> None:
        g = self.geometry
        grid = *self.tile.grid(g.depth, g.o), self.chunks.count
        sizes: dict[str, Any] = {**g.sizes, "pixels_per_chunk": self.chunks.each}
        if self.rung == "tiled":
            self.kernel(device, "conv2d_backward_weight_tiled", b, grid, TILED_THREADS, **sizes)
        else:
            self.tile.launch(self, device, "conv2d_backward_weight_mma", self.rung, b, grid, **sizes)
        self.launch_merge(device, b)

    def launch_merge(self, device: Device, b: Buffers) -> None:
        """dweight = the sum of partials (chunks, *dweight.shape)."""
        sizes: dict[str, Any] = {"chunks": b.partials.shape[0], "count": b.dweight.size}
        lanes = 8 if sizes["chunks"] >= 32 else 1  # from the shape alone: they decide the order of the sum
        grid, block = element_grid(sizes["count"] * lanes, 4), (ELEMENT_THREADS // lanes, lanes)
        types = ElementTypes.of(self.inputs["x"].dtype)
        self.kernel(device, "conv2d_backward_weight_merge", b, grid, block, types=types, **sizes)

    def reference(self, b: Buffers) -> None:
        for ky, kx, patch in _taps(self.geometry, _padded(self.geometry, b.x)):
            b.dweight[:, ky, kx] = np.einsum("nyxo,nyxc->oc", b.dy, patch)

    def numpy(self, b: Buffers) -> None:
        fast.backward_weight(self._factor(b.x), self._factor(b.dy), b.dweight, self.stride, self.padding)


class Conv2dBackwardBias(ColumnsOp):
    """dbias = sum of dy over pixels. dy (n, oh, ow, o); of bfloat16 the sum is float32."""

    name = "conv2d_backward_bias"
    stages: ClassVar = {"conv2d_backward_bias_partial": "rows"}
    MERGE_BLOCK = (8, 64)  # channels, lanes of chunks

    def __init__(self, dy: Spec) -> None:
        super().__init__("dy", dy, bfloat16=True)
        accumulated = ElementTypes.of(dy.dtype).accumulate
        self.inputs = {"dy": dy}
        self.outputs = {"dbias": Spec((self.channels,), accumulated)}
        self.workspace = {"partials": Spec((self.chunks, self.channels), accumulated)}
        self.flops = dy.size

    def launch(self, device: Device, b: Buffers) -> None:
        super().launch(device, b)
        grid = -(-self.channels // self.MERGE_BLOCK[0])
        self.kernel(device, "conv2d_backward_bias_merge", b, grid, self.MERGE_BLOCK)

    def reference(self, b: Buffers) -> None:
        b.dbias[...] = b.dy.sum((0, 1, 2))

    def numpy(self, b: Buffers) -> None:
        fast.backward_bias(b.dy, b.dbias)


def _padded(g: Geometry, x: np.ndarray) -> np.ndarray:
    return np.pad(x, ((0, 0), (g.pad_y, g.pad_y), (g.pad_x, g.pad_x), (0, 0)))


def _taps(g: Geometry, padded: np.ndarray) -> list[tuple[int, int, np.ndarray]]:
    """(ky, kx, view (n, oh, ow, c)) for each tap: the padded pixels that it meets."""
    rows, columns = (g.oh - 1) * g.stride + 1, (g.ow - 1) * g.stride + 1
    return [
        (ky, kx, padded[:, ky : ky + rows : g.stride, kx : kx + columns : g.stride])
        for ky in range(g.kh)
        for kx in range(g.kw)
    ]


@functools.cache
def _tell_fallback(architecture: str, rung: str) -> None:
    log.warning("conv2d: rung %r needs sm_80 or newer, this GPU is %s; rung 'tiled' is used", rung, architecture)


def rung_for(device: Device, g: Geometry, dtype: np.dtype, rung: str | None) -> str | None:
    """The rung for a device: what is float32 multiplies on the tensor cores of a GPU, unless SEGNET_FMA=1.

    "tiled", with one message, on a GPU whose tensor cores are too old for the rung.
    """
    if rung is None and dtype == np.float32 and device.architecture is not None and mma.has_tensor_cores(device):
        return "tf32x3" if mma.unsupported_reason(g) is None and not mma.without_tensor_cores() else None
    wanted = "bf16" if rung is None and dtype == BFLOAT16 else rung
    if wanted not in ELEMENTS_OF_RUNG or mma.has_tensor_cores(device):
        return rung
    _tell_fallback(str(device.architecture), str(wanted))
    return "tiled"
