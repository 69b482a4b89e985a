"""What this machine can do at most, measured in the same run as what is held against it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

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
FMA_THREADS, FMA_BLOCK, FMA_ROUNDS = 1 << 20, 256, 4096  # 69 GFLOP
MMA_THREADS, MMA_ROUNDS = 1 << 18, 4096  # CHAINS products of 16 x 8 x (32 bytes) a warp and round
MMA_FLOPS = {"tf32": 2 * 16 * 8 * 8, "bf16": 2 * 16 * 8 * 16}  # of one
PASSES = 5


@dataclass(frozen=True)
class Ceilings:
    """Operations and bytes a second, and how they were found."""

    flops: float
    bandwidth: float  # bytes read and written
    source: str
    tensor_cores: Mapping[str, float] = field(default_factory=dict)  # operations a second by rung: tf32, tf32x3, bf16

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


def multiply_adds(device: Device) -> np.ndarray:
    """Launches the kernel of ceilings.cu; its result, one number a thread."""
    (kernel,) = parse_kernels(read_source(SOURCE))
    y = device.empty((FMA_THREADS,), np.float32)
    types = ElementTypes.of(np.dtype(np.float32))
    launch(device, kernel, FMA_THREADS // FMA_BLOCK, FMA_BLOCK, (y, FMA_THREADS, FMA_ROUNDS), types)
    return y


def products(device: Device, rung: str) -> Array:
    """Launches the kernel of ceilings_mma.cu; its result, one number a thread."""
    (kernel,) = parse_kernels(read_source(MMA_SOURCE))
    y = device.empty((MMA_THREADS,), np.float32)
    types = ElementTypes.named(rung)
    launch(device, kernel, MMA_THREADS // FMA_BLOCK, FMA_BLOCK, (y, MMA_THREADS, MMA_ROUNDS), types)
    return y


def _seconds(device: Device, work: Callable[[], object]) -> float:
    """The median time of some repetitions, after one that does not count."""
    timer = device.timer()
    work()
    marks = []
    for _ in range(PASSES):
        begin = timer.mark()
        work()
        marks.append((begin, timer.mark()))
    return median(timer.seconds(*pair) for pair in marks)
