"""2-D convolution (cross-correlation, as every network means it) of NHWC maps with OHWI weights, and its gradients.

Kernels come in rungs of a ladder (docs/explanation/kernels.md), chosen by name:

    direct   any shape, one thread an element; float32 and float64
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
from collections.abc import Callable
from typing import Any

import numpy as np

from segnet_scratch.errors import DTypeError, ShapeError
from segnet_scratch.ops.convolution import conv2d_mma as mma
from segnet_scratch.ops.convolution import fast
from segnet_scratch.ops.convolution.conv2d_geometry import Geometry
from segnet_scratch.ops.op import (
    ELEMENT_THREADS,
    Buffers,
    Columns,
    Op,
    Spec,
    element_grid,
    expect,
    expect_map,
)
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
        if dtype == BFLOAT16 and mma.misfit(g) is None:
            return "bf16"
        return "tiled" if g.stride == 1 or dtype == BFLOAT16 else "direct"
    if rung not in RUNGS:
        raise ShapeError(f"conv2d: there is no rung {rung!r}; expected one of {', '.join(RUNGS)}")
    if rung in ELEMENTS_OF_RUNG:
        if dtype != ELEMENTS_OF_RUNG[rung]:
            raise DTypeError(
                f"conv2d: rung {rung!r} takes {ELEMENTS_OF_RUNG[rung]}, not {dtype}; convert it, or use 'tiled'"
            )
        reason = mma.misfit(g)
        expect(reason is None, f"conv2d: rung {rung!r} {reason}; use {'tiled' if g.stride == 1 else 'direct'!r}")
    if rung == "tiled":
        expect(g.stride == 1, f"conv2d: rung 'tiled' takes stride 1, not {g.stride}; use 'direct'")
    if rung == "direct" and dtype == BFLOAT16:
        raise DTypeError("conv2d: rung 'direct' takes float32 and float64, not bfloat16; use 'tiled' or 'bf16'")
    return rung


class _ConvOp(Op):
    """A convolution with its geometry and rung. `accumulated` is the type of sums over pixels, and of the bias."""

    def __init__(self, x: Spec, weight: Spec, stride: int, padding: int, rung: str | None) -> None:
        expect_map(self.name, "x", x, bfloat16=True)
        if weight.dtype != x.dtype:
            raise DTypeError(f"{self.name}: weight has element type {weight.dtype}, x {x.dtype}; convert one")
        self.geometry = Geometry.of(x.shape, weight.shape, stride, padding)
        self.rung = choose_rung(self.geometry, x.dtype, rung)
        self.accumulated = ElementTypes.of(x.dtype).accumulate
        self.flops = self.geometry.flops
        self.workspace = {}

    def _factor(self, array: np.ndarray) -> np.ndarray:
        """What the rung multiplies: for tf32 the rounded numbers, for bfloat16 the same in float32."""
        if self.rung == "tf32":
            return round_to_tf32(array)
        return array.astype(np.float32) if array.dtype == BFLOAT16 else array


def _into(output: np.ndarray, compute: Callable[[np.ndarray], None]) -> None:
    """Lets NumPy compute an output in float32 and rounds it, where it is bfloat16."""
    if output.dtype != BFLOAT16:
        return compute(output)
    exact = np.empty(output.shape, np.float32)
    compute(exact)
    output[...] = exact
    return None


class Conv2dForward(_ConvOp):
    """y = x * weight + bias: fprop. x (n, h, w, c), weight (o, kh, kw, c), bias (o) or None."""

    name = "conv2d_forward"
    optional = ("bias",)

    def __init__(self, x: Spec, weight: Spec, stride: int = 1, padding: int = 0, rung: str | None = None) -> None:
        super().__init__(x, weight, stride, padding, rung)
        self.inputs = {"x": x, "weight": weight, "bias": Spec((self.geometry.o,), self.accumulated)}
        self.outputs = {"y": x.with_shape(*self.geometry.y)}

    def launch(self, device: Device, b: Buffers) -> None:
        g = self.geometry
        if self.rung == "direct":
            self.kernel(device, "conv2d_forward_direct", b, stride=g.stride, padding=g.padding)
        else:
            _launch_gemm(self, device, g, g.pads, b)

    def reference(self, b: Buffers) -> None:
        b.y[...] = 0 if b.bias is None else b.bias
        for ky, kx, patch in _taps(self.geometry, _padded(self.geometry, b.x)):
            b.y += patch @ b.weight[:, ky, kx].T

    def gradient(self) -> tuple[Op, ...]:
        x, weight, *_ = self.inputs.values()
        options = self.geometry.stride, self.geometry.padding, self.rung
        of_bias = Conv2dBackwardBias.plan(self.outputs["y"])
        return Conv2dBackwardData.plan(x, weight, *options), Conv2dBackwardWeight.plan(x, weight, *options), of_bias

    def numpy(self, b: Buffers) -> None:
        x, weight = self._factor(b.x), self._factor(b.weight)
        _into(b.y, lambda y: fast.forward(x, weight, b.bias, y, self.geometry.stride, self.geometry.padding))


class Conv2dBackwardData(_ConvOp):
    """dx: dgrad. `x` is the Spec of the forward's input."""

    name = "conv2d_backward_data"

    def __init__(self, x: Spec, weight: Spec, stride: int = 1, padding: int = 0, rung: str | None = None) -> None:
        super().__init__(x, weight, stride, padding, rung)
        g = self.geometry
        self.inputs = {"dy": x.with_shape(*g.y), "weight": weight}
        self.outputs = {"dx": x}
        if self.rung != "direct":
            self.workspace = {"flipped": x.with_shape(g.c, g.kh, g.kw, g.o)}

    def launch(self, device: Device, b: Buffers) -> None:
        g = self.geometry
        if self.rung == "direct":
            self.kernel(device, "conv2d_backward_data_direct", b, stride=g.stride, padding=g.padding)
        else:
            self.kernel(device, "conv2d_flip_weight", b, element_grid(b.weight.size))
            of_dgrad = Buffers(x=b.dy, weight=b.flipped, bias=None, y=b.dx)
            _launch_gemm(self, device, g.mirrored, g.mirrored_pads, of_dgrad)

    def reference(self, b: Buffers) -> None:
        g = self.geometry
        padded = np.zeros((g.n, g.h + 2 * g.padding, g.w + 2 * g.padding, g.c), b.dx.dtype)
        for ky, kx, patch in _taps(g, padded):
            patch += b.dy @ b.weight[:, ky, kx]
        b.dx[...] = padded[:, g.padding : g.padding + g.h, g.padding : g.padding + g.w]

    def numpy(self, b: Buffers) -> None:
        dy, weight = self._factor(b.dy), self._factor(b.weight)
        _into(b.dx, lambda dx: fast.backward_data(dy, weight, dx, self.geometry.stride, self.geometry.padding))


class Conv2dBackwardWeight(_ConvOp):
    """dweight: wgrad. All rungs but direct split the pixels into chunks and add their results in a fixed order."""

    name = "conv2d_backward_weight"

    def __init__(self, x: Spec, weight: Spec, stride: int = 1, padding: int = 0, rung: str | None = None) -> None:
        super().__init__(x, weight, stride, padding, rung)
        g = self.geometry
        self.inputs = {"x": x, "dy": x.with_shape(*g.y)}
        self.outputs = {"dweight": Spec(weight.shape, self.accumulated)}
        tile = mma.weight_tile(g, self.rung) if self.rung in ELEMENTS_OF_RUNG else TILED
        self.chunks = mma.Chunks.of(g, tile.rows, tile.columns)
        if self.rung != "direct":
            self.workspace = {"partials": Spec((self.chunks.count, *weight.shape), self.accumulated)}

    def launch(self, device: Device, b: Buffers) -> None:
        g = self.geometry
        if self.rung == "direct":
            self.kernel(device, "conv2d_backward_weight_direct", b, stride=g.stride, padding=g.padding)
            return
        if self.rung == "tiled":
            grid = *TILED.grid(g.depth, g.o), self.chunks.count
            sizes = {**g.pads, "pixels_per_chunk": self.chunks.pixels}
            self.kernel(device, "conv2d_backward_weight_tiled", b, grid, TILED_THREADS, **sizes)
        else:
            mma.launch_backward_weight(self, device, self.rung, g, self.chunks, b)
        self.launch_merge(device, b)

    def launch_merge(self, device: Device, b: Buffers) -> None:
        """dweight = the sum of partials (chunks, *dweight.shape)."""
        sizes: dict[str, Any] = {"chunks": b.partials.shape[0], "count": b.dweight.size}
        lanes = 8 if sizes["chunks"] >= 32 else 1  # from the shape alone: they decide the order of the sum
        grid, block = element_grid(sizes["count"] * lanes), (ELEMENT_THREADS // lanes, lanes)
        types = ElementTypes.of(self.inputs["x"].dtype)
        self.kernel(device, "conv2d_backward_weight_merge", b, grid, block, types=types, **sizes)

    def reference(self, b: Buffers) -> None:
        for ky, kx, patch in _taps(self.geometry, _padded(self.geometry, b.x)):
            b.dweight[:, ky, kx] = np.einsum("nyxo,nyxc->oc", b.dy, patch)

    def numpy(self, b: Buffers) -> None:
        x, dy = self._factor(b.x), self._factor(b.dy)
        fast.backward_weight(x, dy, b.dweight, self.geometry.stride, self.geometry.padding)


class Conv2dBackwardBias(Op):
    """dbias = sum of dy over pixels. dy (n, oh, ow, o); of bfloat16 the sum is float32."""

    name = "conv2d_backward_bias"

    def __init__(self, dy: Spec) -> None:
        n, h, w, o = expect_map(self.name, "dy", dy, bfloat16=True)
        self.columns = Columns(n * h * w, o)
        accumulated = ElementTypes.of(dy.dtype).accumulate
        self.inputs = {"dy": dy}
        self.outputs = {"dbias": Spec((o,), accumulated)}
        self.workspace = {"partials": Spec((self.columns.chunks, o), accumulated)}
        self.flops = dy.size

    def launch(self, device: Device, b: Buffers) -> None:
        g = self.columns
        self.kernel(device, "conv2d_backward_bias_partial", b, g.grid, g.block, rows_per_chunk=g.rows_per_chunk)
        self.kernel(device, "conv2d_backward_bias_merge", b, g.merge_grid)

    def reference(self, b: Buffers) -> None:
        b.dbias[...] = b.dy.sum((0, 1, 2))

    def numpy(self, b: Buffers) -> None:
        fast.backward_bias(b.dy.astype(b.dbias.dtype, copy=False), b.dbias)


def _launch_gemm(op: _ConvOp, device: Device, g: Geometry, pads: dict[str, Any], b: Buffers) -> None:
    """The implicit GEMM of fprop, and of dgrad with other arguments."""
    if op.rung == "tiled":
        op.kernel(device, "conv2d_forward_tiled", b, TILED.grid(g.pixels, g.o), TILED_THREADS, **pads)
    else:
        mma.launch_forward(op, device, op.rung, g, pads, b)


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


@functools.cache
def _tell_fallback(architecture: str, rung: str) -> None:
    log.warning("conv2d: rung %r needs sm_80 or newer, this GPU is %s; rung 'tiled' is used", rung, architecture)


def rung_for(device: Device, g: Geometry, dtype: np.dtype, rung: str | None) -> str | None:
    """The rung for a device: what is float32 multiplies on the tensor cores of a GPU, unless SEGNET_FMA=1.

    "tiled", with one message, on a GPU whose tensor cores are too old for the rung.
    """
    if rung is None and dtype == np.float32 and device.architecture is not None and mma.has_tensor_cores(device):
        return "tf32x3" if mma.misfit(g) is None and not mma.without_tensor_cores() else None
    wanted = "bf16" if rung is None and dtype == BFLOAT16 else rung
    if wanted not in ELEMENTS_OF_RUNG or mma.has_tensor_cores(device):
        return rung
    _tell_fallback(str(device.architecture), str(wanted))
    return "tiled"
