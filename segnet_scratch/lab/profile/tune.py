"""Measures the tiles of the tensor-core convolutions on a GPU; the fastest are kept: ops/convolution/tile_table.py."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from segnet_scratch.engine.convolutions import Convolutions
from segnet_scratch.engine.inference import InferenceProgram
from segnet_scratch.engine.network import RUNG_OF_PRECISION, Network
from segnet_scratch.engine.training import Objective, TrainingProgram
from segnet_scratch.errors import DeviceError
from segnet_scratch.lab.profile.ceilings import seconds_of
from segnet_scratch.lab.profile.measure import stopwatch
from segnet_scratch.lab.profile.stopwatch import Stopwatch
from segnet_scratch.ops.convolution import conv2d_mma as mma
from segnet_scratch.ops.convolution.conv2d import Conv2dForward
from segnet_scratch.ops.convolution.conv2d_fused import FusedBackwardData, FusedForward
from segnet_scratch.ops.convolution.conv2d_geometry import Geometry
from segnet_scratch.ops.convolution.conv2d_hopper import HopperBackwardData, HopperForward
from segnet_scratch.ops.convolution.tile_table import TileTable, key_of, table_of
from segnet_scratch.ops.op import Buffers, Op, Spec
from segnet_scratch.runtime.devices import Array, Device


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


# One convolution in every tile that it could take, by name, and the tile that its shape suggests. Kernels of mma.sync
# look their tile up when they are launched: there all are the same op. One of Hopper's kernels is another op, as other
# pixels are summed up together.
Candidates = tuple[Mapping[str, Op], str]


def convolutions(network: Network, kernels: Convolutions) -> dict[str, Candidates]:
    """Candidates by key, of a training step and of inference, each shape once."""
    training, inference = TrainingProgram(network, kernels, Objective()), InferenceProgram(network, kernels)
    found: dict[str, Candidates] = {}
    for step in (*training.steps, *inference.steps):
        for key, candidates in _candidates_of(step.op, kernels.rung):
            if len(candidates[0]) > 1:
                found.setdefault(key, candidates)
    return found


def _candidates_of(op: Op, rung: str) -> Iterator[tuple[str, Candidates]]:
    """(key, candidates) of the convolution of an op, if it has one whose tile can be chosen."""

    def of_mma(kind: str, g: Geometry, default: mma.Tile) -> tuple[str, Candidates]:
        return key_of(kind, rung, g), ({tile.name: op for tile in mma.candidates(default)}, default.name)

    if isinstance(op, HopperForward | HopperBackwardData):
        yield op.key, (dict(op.alternatives()), op.tile_of_shape.name)
    elif isinstance(op, FusedForward) and op.split is None:
        yield of_mma("fused_forward", op.geometry, op.default_tile)
    elif isinstance(op, FusedBackwardData):
        yield of_mma("fused_backward_data", op.geometry.mirrored, op.default_tile)
    elif isinstance(op, Conv2dForward):
        yield of_mma("forward", op.geometry, mma.forward_tile(op.geometry, rung))


def tune(
    device: Device, network: Network, precision: str, progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[list[Choice], Path]:
    """Times every tile of every convolution and stores the choices.

    Says where. DeviceError without a GPU.
    """
    if device.gpu is None:
        where = f"tiles are measured on a GPU, and the device is {device.name}"
        raise DeviceError(f"tune: {where}; run it where segnet doctor sees one")
    kernels = Convolutions.on(device, RUNG_OF_PRECISION[precision])
    work = convolutions(network, kernels)
    watch, table, choices = stopwatch(device), table_of(device), []
    for number, (key, (ops, default)) in enumerate(work.items()):
        progress(number, len(work))
        choices.append(Choice(key, _measure(device, watch, table, key, ops), default))
    path = table.save(device.gpu, {choice.key: choice.fastest for choice in choices})
    return choices, path


def _measure(device: Device, watch: Stopwatch, table: TileTable, key: str, ops: Mapping[str, Op]) -> dict[str, float]:
    """Median seconds with each tile, in turn, with a cache that holds nothing of use."""
    buffers = {op: random_buffers(device, op) for op in set(ops.values())}

    def run(name: str) -> None:
        table.choices[key] = name
        ops[name].run(device, buffers[ops[name]])

    before = dict(table.choices)
    try:
        return dict(zip(ops, seconds_of(watch, [partial(run, name) for name in ops]), strict=True))
    finally:
        table.choices.clear()
        table.choices |= before


def _random(device: Device, specs: Mapping[str, Spec]) -> dict[str, Array]:
    rng, arrays = np.random.default_rng(0), {}
    for name, spec in specs.items():
        of_bytes = spec.dtype == np.uint8
        random = rng.integers(0, 256, spec.shape) if of_bytes else rng.standard_normal(spec.shape, np.float32)
        arrays[name] = device.upload(random.astype(spec.dtype))
    return arrays


def random_buffers(device: Device, op: Op) -> Buffers:
    """Random inputs, and room for what the op makes."""
    made = {name: device.empty(s.shape, s.dtype) for name, s in {**op.outputs, **op.workspace}.items()}
    return Buffers(**_random(device, op.inputs), **made)
