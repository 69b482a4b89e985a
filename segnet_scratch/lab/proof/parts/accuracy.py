"""How exactly the rungs of convolutions add in float32, beside a chain of multiply-adds: one term after the other.

What tensor cores cut off shows here, on a GPU, and on the host device as its emulation predicts it.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from segnet_scratch.lab.proof.parts.base import Part, Rows
from segnet_scratch.lab.proof.work import Tally, Work
from segnet_scratch.ops.convolution import conv2d_mma as mma
from segnet_scratch.ops.convolution.conv2d import Conv2dBackwardData, Conv2dBackwardWeight, Conv2dForward
from segnet_scratch.ops.convolution.conv2d_hopper import HopperBackwardWeight, HopperForward, tiles_on
from segnet_scratch.ops.convolution.split_planes import split_for
from segnet_scratch.ops.op import Op, spec
from segnet_scratch.runtime.devices import Array, Device

F32 = np.dtype(np.float32)
DEPTHS = 576, 1152, 2304, 4608  # of SegNet's 3x3 convolutions of 64 to 512 channels
RESULTS = 64, 32
LIMIT = 1.0  # of a chain's error, for all but tf32, whose factors are rounded


class Accuracy(Part):
    """fprop, dgrad and wgrad as bare matrix products, with positive left factors, as a ReLU leaves them."""

    name = "accuracy"
    proves = "float32 errs no more than a chain of multiply-adds, on tensor cores too"
    devices = ("host", "cuda")

    def targets(self, rows: Rows) -> Sequence[str]:
        return ["conv2d"] if any(row.op is Conv2dForward for row in rows) else []

    def problems(self, work: Work, device: Device, tally: Tally) -> Iterator[str]:
        tally.notes.append(f"errors of sums of {', '.join(map(str, DEPTHS))} terms, of a chain's")
        rungs = ["tiled", *(["tf32x3", "tf32"] if mma.has_tensor_cores(device) else [])]
        rungs += [f"hopper {rung}" for rung in rungs[1:] if device.architecture is None or tiles_on(device)]
        for rung in rungs:
            # dgrad on Hopper is the loop of fprop, with an epilogue.
            for direction in ("fprop", "wgrad") if "hopper" in rung else ("fprop", "dgrad", "wgrad"):
                ratios = [error_beside_a_chain(device, rung, direction, depth) for depth in DEPTHS]
                tally.counts["products"] += len(ratios)
                tally.notes.append(f"{rung} {direction} {' '.join(f'{ratio:.3g}' for ratio in ratios)}")
                if not rung.endswith("tf32") and not max(ratios) <= LIMIT:
                    errs = f"errs {max(ratios):.3g} times as much as a chain"
                    yield f"{rung} {direction} {errs}; expected at most {LIMIT:g}"


def error_beside_a_chain(device: Device, rung: str, direction: str, depth: int) -> float:
    """The root-mean-square error of a rung's sums of so many terms against float64, by that of a chain in float32."""
    rng = np.random.default_rng(depth)
    left = np.maximum(rng.standard_normal((RESULTS[0], depth), np.float32), 0)
    right = rng.standard_normal((depth, RESULTS[1]), np.float32)
    exact = left.astype(np.float64) @ right
    chain = np.zeros(exact.shape, np.float32)
    for k in range(depth):  # the product is exact in float64: as if fused
        chain[...] = chain + left[:, k, None].astype(np.float64) * right[k]
    error = _product(device, rung, direction, left, right) - exact
    return float(np.sqrt((error**2).mean() / ((chain - exact) ** 2).mean()))


def _product(device: Device, rung: str, direction: str, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """left (m, k) times right (k, n) as a 1x1 convolution of m pixels, or as the gradients of one."""
    (m, k), n = left.shape, right.shape[1]

    def upload(array: np.ndarray, *shape: int) -> Array:
        return device.upload(np.ascontiguousarray(array).reshape(shape))

    cut: Any = ...
    match rung.partition("hopper ")[2], direction:
        case "", "fprop":
            op: Op = Conv2dForward.plan(spec((1, 1, m, k), F32), spec((n, 1, 1, k), F32), 1, 0, rung)
            factors = {"x": upload(left, 1, 1, m, k), "weight": upload(right.T, n, 1, 1, k), "bias": None}
        case "", "dgrad":
            op = Conv2dBackwardData.plan(spec((1, 1, m, n), F32), spec((k, 1, 1, n), F32), 1, 0, rung)
            factors = {"dy": upload(left, 1, 1, m, k), "weight": upload(right, k, 1, 1, n)}
        case "", _:
            op = Conv2dBackwardWeight.plan(spec((1, 1, k, n), F32), spec((m, 1, 1, n), F32), 1, 0, rung)
            factors = {"x": upload(right, 1, 1, k, n), "dy": upload(left.T, 1, 1, k, m)}
        case rung, "fprop":  # of a block of 8x8 pixels, through the middle tap of nine
            weight = np.zeros((n, 3, 3, k), F32)
            weight[:, 1, 1] = right.T
            op = HopperForward.plan(spec((1, 8, m // 8, k), F32), spec(weight.shape, F32), rung)
            factors = {"x": upload(left, 1, 8, m // 8, k), "weight": upload(weight, *weight.shape)}
        case rung, _:
            columns, size = np.pad(right, ((0, 0), (0, m - n))), (1, k // 24, 24, m)
            op, cut = HopperBackwardWeight.plan(spec(size, F32), spec((m, 3, 3, m), F32), rung), np.s_[:, 1, 1, :n]
            factors = {"x": upload(columns, *size), "dy": upload(left.T, *size)}
    read = {name: a if a is None else split_for(device, a, op.inputs[name]) for name, a in factors.items()}
    result = getattr(op(device, **read), next(iter(op.outputs)))[cut]
    return device.download(result).reshape(m, n).astype(np.float64)
