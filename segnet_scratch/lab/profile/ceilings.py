"""The roofline's ceilings: the highest rates of this machine, measured in the run that is compared with them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from segnet_scratch.lab.profile.stopwatch import Lap, Stopwatch
from segnet_scratch.ops.convolution.conv2d_mma import has_tensor_cores
from segnet_scratch.runtime.devices import Array, Device
from segnet_scratch.runtime.launch import ElementTypes, launch
from segnet_scratch.runtime.signature import parse_kernels
from segnet_scratch.runtime.source import read_source

SOURCE = Path(__file__).with_name("ceilings.cu")
MMA_SOURCE = Path(__file__).with_name("ceilings_mma.cu")
COPY_BYTES = {"cuda": 1 << 30}  # elsewhere 64 MiB: also far more than a cache holds
MATRIX = 1536  # a product of 7 GFLOP
CHAINS = 8  # of ceilings.cu
BLOCK = 256
FMA_THREADS, FMA_ROUNDS = 1 << 20, 4096  # 69 GFLOP
MMA_THREADS, MMA_ROUNDS = 1 << 18, 4096  # CHAINS products of 16 x 8 x (32 bytes) a warp and round
MMA_FLOPS = {"tf32": 2 * 16 * 8 * 8, "bf16": 2 * 16 * 8 * 16}  # of one
PASSES = 9


@dataclass(frozen=True)
class Ceilings:
    """Operations and bytes per second, and how they were found."""

    flops: float
    bandwidth: float  # bytes read and written
    source: str
    tensor_cores: Mapping[str, float] = field(default_factory=dict)  # operations per second by rung: tf32, tf32x3, bf16

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        per_second = {"flops_per_second": self.flops, "bytes_per_second": self.bandwidth}
        return {**per_second, "tensor_core_flops_per_second": dict(self.tensor_cores), "source": self.source}

    def flops_of(self, multiply: str) -> float:
        """Operations a second for kernels that multiply so: a rung of tensor cores, or anything else."""
        return self.tensor_cores.get(multiply, self.flops)

    def seconds(self, flops: int, nbytes: int, multiply: str = "") -> float:
        """The shortest time in which so much could be done: the roofline (Williams, Waterman, Patterson 2009)."""
        return max(flops / self.flops_of(multiply), nbytes / self.bandwidth)


def measure(device: Device) -> Ceilings:
    """On `cuda` a large copy, and products in registers; on the CPU a large copy and a matrix product of NumPy."""
    nbytes = COPY_BYTES.get(device.name, 1 << 26)
    source, target = device.zeros((nbytes // 4,), np.float32), device.zeros((nbytes // 4,), np.float32)
    bandwidth = 2 * nbytes / _seconds(device, lambda: device.write(target, source))
    if device.name == "cuda":
        flops = 2 * CHAINS * FMA_ROUNDS * FMA_THREADS / _seconds(device, lambda: multiply_adds(device))
        tensor = {}
        if has_tensor_cores(device):
            warps = MMA_THREADS // 32
            for rung, each in MMA_FLOPS.items():
                tensor[rung] = CHAINS * MMA_ROUNDS * warps * each / _seconds(device, partial(products, device, rung))
            tensor["tf32x3"] = tensor["tf32"] / 3  # three products for one
        return Ceilings(flops, bandwidth, "a large copy; multiply-adds and mma.sync in registers", tensor)
    a, b = np.random.default_rng(0).standard_normal((2, MATRIX, MATRIX)).astype(np.float32)
    product = np.empty_like(a)
    flops = 2 * MATRIX**3 / _seconds(device, lambda: np.matmul(a, b, out=product))
    return Ceilings(flops, bandwidth, "a large copy and a float32 matrix product by NumPy, on all cores")


def multiply_adds(device: Device) -> Array:
    """Launches the kernel of ceilings.cu; its result, one number per thread."""
    return _launch(device, SOURCE, FMA_THREADS, FMA_ROUNDS, "float32")


def products(device: Device, rung: str) -> Array:
    """Launches the kernel of ceilings_mma.cu; its result, one number per thread."""
    return _launch(device, MMA_SOURCE, MMA_THREADS, MMA_ROUNDS, rung)


def _launch(device: Device, source: Path, threads: int, rounds: int, types: str) -> Array:
    (kernel,) = parse_kernels(read_source(source))
    y = device.empty((threads,), np.float32)
    launch(device, kernel, threads // BLOCK, BLOCK, (y, threads, rounds), ElementTypes.named(types))
    return y


def seconds_of(watch: Stopwatch, works: Sequence[Callable[[], object]], warm: int = 1) -> list[float]:
    """The median time of each piece of work, all in turn PASSES times, after `warm` turns that do not count."""
    laps: list[list[Lap]] = [[] for _ in works]
    for _ in range(warm + PASSES):
        for work, own in zip(works, laps, strict=True):
            own.append(watch.lap(work))
    return [median(watch.seconds(own[warm:])) for own in laps]


def _seconds(device: Device, work: Callable[[], object]) -> float:
    (seconds,) = seconds_of(Stopwatch(device.timer()), [work])
    return seconds
