"""The host device's tiled convolution on one core beside a matrix product of one BLAS thread."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import threadpoolctl

from bench.run import console
from bench.timing import Clock, in_turn
from segnet_scratch.ops.convolution.conv2d import Conv2dBackwardData, Conv2dBackwardWeight, Conv2dForward
from segnet_scratch.ops.op import spec
from segnet_scratch.runtime.devices import HostDevice
from segnet_scratch.runtime.host import HostOptions

BLAS = "BLAS, 1024x1024x1024"


def measure(seconds: float) -> dict[str, Any]:
    """GFLOP/s, and how many times as long as BLAS takes for as much."""
    device, rng = HostDevice(HostOptions(workers=1)), np.random.default_rng(0)
    left, right = rng.standard_normal((2, 1024, 1024), np.float32)
    calls: dict[str, Callable[[], object]] = {BLAS: functools.partial(np.matmul, left, right)}
    flops = {BLAS: 2 * 1024**3}
    for channels in (64, 128):
        x, weight = spec((1, 56, 56, channels), np.float32), spec((channels, 3, 3, channels), np.float32)
        for plan in (Conv2dForward, Conv2dBackwardData, Conv2dBackwardWeight):
            op = plan.plan(x, weight, 1, 1, "tiled")
            arrays = {name: rng.standard_normal(s.shape, np.float32) for name, s in op.inputs.items()}
            name = f"{op.name}, {channels} -> {channels}, 3x3, 56x56"
            calls[name], flops[name] = functools.partial(op, device, **arrays), op.flops
    with threadpoolctl.threadpool_limits(1):
        times = in_turn(calls, Clock(), seconds, warm_up=1)
    speeds = {name: flops[name] / t.median / 1e9 for name, t in times.items()}
    for name, speed in speeds.items():
        console.print(f"{name}: {speed:.2f} GFLOP/s, 1/{speeds[BLAS] / speed:.1f} of BLAS")
    return {"gflops": speeds, "blas_over_this": {name: speeds[BLAS] / speed for name, speed in speeds.items()}}
