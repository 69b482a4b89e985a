"""What this machine can do at most, measured in the same run as what is held against it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from segnet_scratch.runtime.devices import Device
from segnet_scratch.runtime.launch import ElementTypes, launch
from segnet_scratch.runtime.signature import parse_kernels
from segnet_scratch.runtime.source import read_source

SOURCE = Path(__file__).with_name("ceilings.cu")
COPY_BYTES = {"cuda": 1 << 30}  # elsewhere 64 MiB: also far more than a cache holds
MATRIX = 1536  # a product of 7 GFLOP
CHAINS = 8  # of ceilings.cu
FMA_THREADS, FMA_BLOCK, FMA_ROUNDS = 1 << 20, 256, 4096  # 69 GFLOP
PASSES = 5


@dataclass(frozen=True)
class Ceilings:
    """Operations and bytes a second, and how they were found."""

    flops: float
    bandwidth: float  # bytes read and written
    source: str

    def seconds(self, flops: int, nbytes: int) -> float:
        """The shortest time in which so much could be done: the roofline (Williams, Waterman, Patterson 2009)."""
        return max(flops / self.flops, nbytes / self.bandwidth)


def measure(device: Device) -> Ceilings:
    """On `cuda` a large copy, and multiply-adds in registers; on the CPU a large copy and a matrix product of NumPy."""
    nbytes = COPY_BYTES.get(device.name, 1 << 26)
    source, target = device.zeros((nbytes // 4,), np.float32), device.zeros((nbytes // 4,), np.float32)
    bandwidth = 2 * nbytes / _seconds(device, lambda: device.write(target, source))
    if device.name == "cuda":
        flops = 2 * CHAINS * FMA_ROUNDS * FMA_THREADS / _seconds(device, lambda: multiply_adds(device))
        return Ceilings(flops, bandwidth, "a large copy, float32 multiply-adds in registers (no tensor cores)")
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
