"""Measures the tiles of the tensor-core convolutions on a GPU, keeps the fastest (ops/convolution/tile_table.py)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from segnet_scratch.engine.inference import inference_program
from segnet_scratch.engine.network import RUNG_OF_PRECISION
from segnet_scratch.engine.training import Objective, training_program
from segnet_scratch.errors import DeviceError
from segnet_scratch.lab.profile.measure import CACHE_BYTES
from segnet_scratch.ops.convolution import conv2d_mma as mma
from segnet_scratch.ops.convolution.conv2d import Conv2dForward
from segnet_scratch.ops.convolution.conv2d_fused import FusedBackwardData, FusedForward
from segnet_scratch.ops.convolution.tile_table import TileTable, key_of, table_of
from segnet_scratch.ops.op import Buffers, Op
from segnet_scratch.runtime.devices import Array, Device
from segnet_scratch.segnet import Block

PASSES = 9  # timed, of each tile
CLASSES = 21


@dataclass(frozen=True)
class Choice:
    """One convolution: seconds with each tile, the one that its shape suggests, and the fastest."""

    key: str
    seconds: dict[str, float]
    default: str

    @property
    def fastest(self) -> str:
        """The name of the fastest tile."""
        return min(self.seconds, key=lambda name: self.seconds[name])


def convolutions(
    blocks: list[Block], batch: int, size: tuple[int, int], precision: str, classifier_kernel: int
) -> dict[str, tuple[Op, tuple[mma.Tile, ...], mma.Tile]]:
    """(op, tiles it could take, its default) by key, of a training step and of inference, each shape once."""
    rung = RUNG_OF_PRECISION[precision]
    training = training_program(blocks, batch, size, rung, Objective(CLASSES), classifier_kernel)
    inference = inference_program(blocks, CLASSES, batch, size, rung, classifier_kernel)
    found: dict[str, tuple[Op, tuple[mma.Tile, ...], mma.Tile]] = {}
    for step in (*training.steps, *inference.steps):
        for key, default in _tiles_of(step.op, rung):
            tiles = mma.candidates(default)
            if len(tiles) > 1:
                found.setdefault(key, (step.op, tiles, default))
    return found


def _tiles_of(op: Op, rung: str) -> Iterator[tuple[str, mma.Tile]]:
    """(key, default) of the convolution of an op, if it has one whose tile can be chosen."""
    if isinstance(op, FusedForward) and op.split is None:
        yield key_of("fused_forward", rung, op.geometry), op.default_tile
    elif isinstance(op, FusedBackwardData):
        yield key_of("fused_backward_data", rung, op.geometry.mirrored), op.default_tile
    elif isinstance(op, Conv2dForward):
        default = mma.forward_tile(op.geometry, op.inputs["x"].dtype.itemsize)
        yield key_of("forward", rung, op.geometry), default


def tune(
    device: Device,
    blocks: list[Block],
    batch: int,
    size: tuple[int, int],
    precision: str,
    classifier_kernel: int = 3,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[Choice], Path]:
    """Times every tile of every convolution and stores the choices, and says where. DeviceError without a GPU."""
    if device.gpu is None:
        raise DeviceError(
            f"tune: tiles are measured on a GPU, and the device is {device.name}; run it where segnet doctor sees one"
        )
    work = convolutions(blocks, batch, size, precision, classifier_kernel)
    scratch = device.empty((CACHE_BYTES,), np.uint8)
    table, choices = table_of(device), []
    for number, (key, (op, tiles, default)) in enumerate(work.items()):
        progress(number, len(work))
        choices.append(Choice(key, _measure(device, table, op, key, tiles, scratch), default.name))
    path = table.save(device.gpu, {choice.key: choice.fastest for choice in choices})
    return choices, path


def _measure(
    device: Device, table: TileTable, op: Op, key: str, tiles: tuple[mma.Tile, ...], scratch: Array
) -> dict[str, float]:
    """Median seconds of an op with each tile, in turn, with a cache that holds nothing of use."""
    buffers = _buffers(device, op)
    timer = device.timer()
    taken: dict[str, list[float]] = {tile.name: [] for tile in tiles}
    before = table.choices.get(key)
    try:
        for repetition in range(-1, PASSES):  # the first loads the kernel
            for tile in tiles:
                table.choices[key] = tile.name
                device.write(scratch, 0)
                first = timer.mark()
                op.run(device, buffers)
                seconds = timer.seconds(first, timer.mark())
                if repetition >= 0:
                    taken[tile.name].append(seconds)
    finally:
        table.choices.pop(key, None)
        if before is not None:
            table.choices[key] = before
    return {name: median(seconds) for name, seconds in taken.items()}


def _buffers(device: Device, op: Op) -> Buffers:
    """Random inputs, and room for what the op makes."""
    rng = np.random.default_rng(0)
    given = {}
    for name, spec in op.inputs.items():
        random = (
            rng.integers(0, 256, spec.shape) if spec.dtype == np.uint8 else rng.standard_normal(spec.shape, np.float32)
        )
        given[name] = device.upload(random.astype(spec.dtype))
    made = {name: device.empty(s.shape, s.dtype) for name, s in {**op.outputs, **op.workspace}.items()}
    return Buffers(**given, **made)
