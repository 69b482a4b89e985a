"""Ceilings of the GPU, and each convolution of SegNet on its own: cuDNN beside ours, in TFLOP/s."""

from collections.abc import Callable

import numpy as np
import torch

from bench_gpu.cases import Case
from bench_gpu.peers import set_precision
from bench_gpu.timing import Clock, in_turn
from segnet_scratch.engine.network import RUNG_OF_PRECISION, layers_of, storage
from segnet_scratch.ops.convolution.conv2d import Conv2dBackwardData, Conv2dBackwardWeight, Conv2dForward
from segnet_scratch.ops.op import Buffers, Op, Spec
from segnet_scratch.runtime.devices import Device
from segnet_scratch.segnet import SegNet

GIGABYTE = 10**9


def ceilings(clock: Clock, seconds: float) -> dict[str, float]:
    """TB/s of a large copy, TFLOP/s of a large product in each precision."""
    source = torch.empty(GIGABYTE // 4, device="cuda")
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source)}
    for precision in ("bf16", "tf32", "float32"):
        matrix = torch.randn((8192, 8192), device="cuda", dtype=torch.bfloat16 if precision == "bf16" else None)
        calls[precision] = lambda m=matrix, p=precision: (set_precision(p), m @ m)
    times = in_turn(calls, clock, seconds)
    speeds = {name: 2 * 8192**3 / times[name].median / 1e12 for name in calls if name != "copy"}
    return {"copy, TB/s": 2 * GIGABYTE / times["copy"].median / 1e12, **{f"{k}, TFLOP/s": v for k, v in speeds.items()}}


def convolutions(case: Case, device: Device, clock: Clock, seconds: float) -> list[dict[str, object]]:
    """One row for each shape of a convolution and each direction: FLOP, and TFLOP/s of cuDNN and of ours."""
    shapes = dict.fromkeys(
        (layer.full, layer.weight) for layer in layers_of(SegNet.blocks_of(1.0), case.batch, *case.size)
    )
    rows: list[dict[str, object]] = []
    share = seconds / (3 * len(shapes))
    for full, weight in shapes:
        for direction, op in (("fprop", Conv2dForward), ("dgrad", Conv2dBackwardData), ("wgrad", Conv2dBackwardWeight)):
            if direction == "dgrad" and weight[3] == 3:
                continue
            rows.append(_measure(direction, op, case, full, weight, device, clock, share))
    return rows


def _measure(
    direction: str,
    op: type[Op],
    case: Case,
    full: tuple[int, ...],
    weight: tuple[int, ...],
    device: Device,
    clock: Clock,
    seconds: float,
) -> dict[str, object]:
    set_precision(case.precision)
    dtype = storage(RUNG_OF_PRECISION[case.precision])
    x = Spec((*full[:3], weight[3]), dtype)
    plan = op.plan(x, Spec(weight, dtype), 1, weight[1] // 2, RUNG_OF_PRECISION[case.precision])
    rng = np.random.default_rng(0)
    given = {
        name: device.upload(rng.standard_normal(s.shape, np.float32).astype(s.dtype)) for name, s in plan.inputs.items()
    }
    made = {name: device.empty(s.shape, s.dtype) for name, s in {**plan.outputs, **plan.workspace}.items()}
    buffers = Buffers(**given, **made)
    theirs = _cudnn(direction, case.precision, x.shape, weight)
    times = in_turn({"ours": lambda: plan.run(device, buffers), "cuDNN": theirs}, clock, seconds)
    speeds = {name: plan.flops / t.median / 1e12 for name, t in times.items()}
    shape = f"{weight[3]} -> {weight[0]}, {full[1]}x{full[2]}"
    return {"layer": shape, "direction": direction, "GFLOP": plan.flops / 1e9, **speeds}


def _cudnn(direction: str, precision: str, x: tuple[int, ...], weight: tuple[int, ...]) -> Callable[[], object]:
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    n, h, w, c = x
    o, k = weight[:2]
    options = {"device": "cuda", "dtype": kind}
    image = torch.randn((n, c, h, w), **options).to(memory_format=torch.channels_last)
    kernel = torch.randn((o, c, k, k), **options).to(memory_format=torch.channels_last)
    if direction == "fprop":
        return lambda: torch.nn.functional.conv2d(image, kernel, padding=k // 2)
    gradient = torch.randn((n, o, h, w), **options).to(memory_format=torch.channels_last)
    mask = [direction == "dgrad", direction == "wgrad", False]
    pad = [k // 2, k // 2]
    backward = torch.ops.aten.convolution_backward
    return lambda: backward(gradient, image, kernel, None, [1, 1], pad, [1, 1], False, [0, 0], 1, mask)
