"""Convolutions on Hopper's tensor cores (cuda/conv2d_hopper_*.cu): the rung above "bf16" of conv2d_fused.py.

The ops are those of conv2d_fused.py and conv2d.py with the same inputs, outputs and references, except that pixels
are summed up for batch norm in other groups, whose sizes are an output (`counts`), and that dgrad reads the weight as
it is. They multiply bfloat16: of maps and weights of float32 (the rungs "tf32" and "tf32x3"), for which they are
planned, their inputs are the planes (split_planes.py).

What they do not take, by the rule in `unsupported_reason`, goes to mma.sync (conv2d_fused.py, conv2d.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, ClassVar, Self

import numpy as np

from segnet_scratch.ops.convolution.conv2d import Conv2dBackwardWeight
from segnet_scratch.ops.convolution.conv2d_fused import (
    MULTIPROCESSORS,
    Below,
    FusedBackwardData,
    FusedConv,
    FusedForward,
    Size,
)
from segnet_scratch.ops.convolution.conv2d_geometry import Cut, Geometry
from segnet_scratch.ops.convolution.split_planes import PLANES, in_planes, joined
from segnet_scratch.ops.convolution.tile_table import TileTable, key_of, table_of
from segnet_scratch.ops.op import Buffers, Op, Spec, expect
from segnet_scratch.runtime.devices import Array, Device
from segnet_scratch.runtime.machine import switch
from segnet_scratch.runtime.precision import BFLOAT16, ELEMENTS_OF_RUNG
from segnet_scratch.runtime.signature import ElementTypes
from segnet_scratch.runtime.tensor_map import Im2col, TensorMap

CHANNELS = 64  # of which maps have a multiple: rows of 128 bytes
PIECE = 8  # of which they have one where there are fewer: distances in a tensor map are multiples of 16 bytes
SIDE = 8  # pixels of a block
WARPGROUP = 128  # threads
ALIGNMENT = 1024  # bytes, of the stages in shared memory
HALO, HALO_PLACE, ROW = (1, SIDE + 2, SIDE + 2, CHANNELS), 13312, 128  # a block with its border; bytes of it, of a row
EPILOGUE = 8192  # bytes of shared memory, of a consumer


@dataclass(frozen=True)
class Tile:
    """What a block of threads computes at a time, and which kernel does it: `name` ends the kernel's name.

    `halo`: pixels come as blocks of 8x8 with their borders; otherwise in a row of the batch, for each tap anew.
    """

    name: str
    pixels: int
    columns: int
    halo: bool
    stages: int  # of pixels in shared memory
    weight_stages: int
    blocks: int = MULTIPROCESSORS  # of threads, at most: what is summed up together must not depend on the GPU at hand

    def consumers(self, rung: str) -> int:
        """Warpgroups of a block that multiply."""
        return 2 if rung != "bf16" and self.columns == 128 else self.pixels // SIDE**2

    def shared(self, rung: str) -> int:
        """Bytes of dynamic shared memory."""
        pixels = self.pixels // SIDE**2 * HALO_PLACE if self.halo else self.pixels * ROW
        stages = self.stages * pixels + self.weight_stages * self.columns * ROW
        return stages + self.consumers(rung) * EPILOGUE + ALIGNMENT

    def rows(self, n: int, h: int, w: int) -> int:
        """Tiles that cover the pixels of a map."""
        pixels = n * -(-h // SIDE) * -(-w // SIDE) * SIDE**2 if self.halo else n * h * w
        return -(-pixels // self.pixels)

    def fits(self, columns: int, windows: bool) -> bool:
        """Can it compute so many columns; and 2x2 windows, if there are any? They lie within a block of 8x8."""
        whole = self.columns >= CHANNELS and columns % self.columns == 0
        return (whole or columns <= self.columns <= CHANNELS) and (self.halo or not windows)

    def map(self, array: Array) -> TensorMap:
        """How the kernel reads a map (n, h, w, c)."""
        if self.halo:
            return TensorMap(array, HALO)
        return TensorMap(array, (self.pixels, CHANNELS), im2col=Im2col((-1, -1), (-1, -1)))


TILES = (
    Tile("halo_256x128", 256, 128, True, 2, 5),
    Tile("halo_256x64", 256, 64, True, 2, 9),
    Tile("halo_256x32", 256, 32, True, 2, 9),  # fprop of a classifier
    Tile("halo_128x128", 128, 128, True, 2, 6),
    Tile("columns_256x128", 256, 128, False, 4, 4),
    Tile("columns_128x128", 128, 128, False, 6, 6),
)
NAMED = {tile.name: tile for tile in TILES}


def unsupported_weight(weight: tuple[int, ...]) -> str | None:
    """Why these kernels do not take a weight (o, kh, kw, c); None where they do."""
    o, kh, kw, c = weight
    if (kh, kw) != (3, 3):
        return f"takes 3x3 kernels, not {kh}x{kw}"
    if c % CHANNELS or o % (CHANNELS if o > CHANNELS else PIECE):
        few = f"below {CHANNELS} outputs in multiples of {PIECE}"
        return f"takes channels in multiples of {CHANNELS}, not {c} to {o} ({few})"
    return None


def unsupported_reason(g: Geometry) -> str | None:
    """Why these kernels do not take a convolution; None where they do."""
    if reason := unsupported_weight(g.weight):
        return reason
    if (g.stride, g.pad_y) != (1, 1):
        return f"takes stride 1 and padding 1, not {g.stride} and {g.pad_y}"
    if g.n * (g.h + SIDE) * (g.w + SIDE) >= 2**31:
        return f"takes less than 2^31 pixels, not {g.n}x{g.h}x{g.w}"
    return None


def tiles_on(device: Device) -> TileTable | None:
    """What was measured on a device that computes with these kernels; None where the engine leaves them alone.

    They are for sm_90, and not for newer GPUs, which lack the instructions. The host device has them for proofs: it
    takes them where the environment says SEGNET_HOPPER=1; with SEGNET_HOPPER=0 an sm_90 does without.
    """
    able = device.runs_kernels and device.architecture in (None, "sm_90")
    wanted = switch("SEGNET_HOPPER", device.architecture == "sm_90", "Hopper's kernels", "mma.sync")
    return table_of(device) if able and wanted else None


class _InPlanes(Op):
    """A convolution whose factors are bfloat16, or planes of it, of float32: more exact than tf32 would be."""

    multiplied: str  # the rung; a plan of float64, which is for the reference alone, has none of its own
    geometry: Geometry

    def multiply_as(self, rung: str) -> None:
        """In planes of this rung; ShapeError for a convolution that these kernels do not take."""
        self.multiplied, reason = rung, unsupported_reason(self.geometry)
        expect(reason is None, f"{self.name}: {reason}; use the kernels of mma.sync, rung {rung!r}")

    @property
    def types(self) -> ElementTypes:
        return ElementTypes.named(self.multiplied)

    def _factor(self, array: np.ndarray) -> np.ndarray:
        return array.astype(np.float32) if array.dtype == BFLOAT16 else array

    def expect_planes(self, *names: str) -> None:
        """These inputs are planes, where they are float32; a plan of float64 takes them as they are."""
        self.inputs_in_planes = [name for name in names if self.inputs[name].dtype == np.float32]
        self.inputs |= {name: in_planes(self.inputs[name], PLANES[self.multiplied]) for name in self.inputs_in_planes}

    def numpy(self, b: Buffers) -> None:
        planes = PLANES[self.multiplied]
        super().numpy(Buffers(**vars(b) | {name: joined(getattr(b, name), planes) for name in self.inputs_in_planes}))

    @property
    def _sizes(self) -> dict[str, Any]:
        """What the planes in the arrays do not tell."""
        return {"planes": PLANES[self.multiplied], "c": self.geometry.c, "o": self.geometry.o}


class _Tiled(_InPlanes, FusedConv):
    """What has a tile that could be another one, and is tuned by trying them."""

    def choose_tile(self, again: Callable[..., Self], tile: Tile | None) -> None:
        """Computes in this tile, or in the one of its shape; `again` plans it in another tile.

        As many tiles of pixels as there are `slots` are computed at a time. For batch norm the pixels of a slot are
        summed up together.
        """
        g, self.again = self.product, again
        self.multiply_as(self.rung)
        self.tile_of_shape = tile_for(g.n, g.oh, g.ow, g.o, self.by_windows)
        self.tile = tile or self.tile_of_shape
        what = f"{self.name}: the tile {self.tile.name} does not fit {g.o} columns"
        expect(self.tile.fits(g.o, self.by_windows), f"{what}; expected one of {', '.join(self._fitting())}")
        self.row_tiles, self.column_tiles = self.tile.rows(g.n, g.oh, g.ow), -(-g.o // self.tile.columns)
        self.slots = min(self.row_tiles, max(1, self.tile.blocks // self.column_tiles))

    @property
    def partials(self) -> Spec:
        """Of each slot two sums a column."""
        return Spec((self.slots, 2, self.product.o), self.vector)

    def _fitting(self) -> dict[str, Tile]:
        return {tile.name: tile for tile in TILES if tile.fits(self.product.o, self.by_windows)}

    @property
    def key(self) -> str:
        """What its choice of a tile belongs to."""
        return key_of(f"{self.name.removeprefix('conv2d_')}{'_windows' * self.by_windows}", self.rung, self.geometry)

    def launch_tiles(self, device: Device, b: Buffers, name: str, weight_box: tuple[int, ...]) -> None:
        """The kernel for this tile, of the map of this name."""
        taps = TensorMap(b.weight.reshape(b.weight.shape[0], 9, b.weight.shape[3]), weight_box)
        grid, kernel = self.slots * self.column_tiles, f"{self.name}_{self.tile.name}"
        threads = WARPGROUP * (self.tile.consumers(self.rung) + 1)
        given: dict[str, Any] = {**self._sizes, "weight": taps, name: self.tile.map(getattr(b, name))}
        self.kernel(device, kernel, b, grid, threads, shared=self.tile.shared(self.rung), **given)

    def alternatives(self) -> dict[str, Self]:
        """The op in every tile that fits, by name."""
        return {name: self.again(tile=tile) for name, tile in self._fitting().items()}

    def in_best_tile(self, table: TileTable | None) -> Self:
        """The op in the tile that was fastest where this one was measured."""
        name = table.choices.get(self.key) if table else None
        return self.alternatives().get(name or "", self)

    def summed_together(self, map_: np.ndarray) -> Sequence[np.ndarray]:
        return groups_of(self.tile, self.slots, map_, SIDE // 2 if self.by_windows and not self.forward else SIDE)


def tile_for(n: int, h: int, w: int, columns: int, windows: bool) -> Tile:
    """The tile that the shape suggests, from measurements on an H200 (docs/explanation/kernels.md).

    Pixels in a row where nothing asks for 2x2 windows; the smaller tile where the larger one would leave many more
    multiprocessors of an H100 without work in its last round.
    """
    if columns % 128:
        return NAMED["halo_256x32" if columns <= 32 else "halo_256x64"]

    def busy(tile: Tile) -> float:
        tiles = tile.rows(n, h, w) * (columns // tile.columns)
        return tiles / (-(-tiles // MULTIPROCESSORS) * MULTIPROCESSORS)

    kind = "halo" if windows else "columns"
    large, small = NAMED[f"{kind}_256x128"], NAMED[f"{kind}_128x128"]
    return small if busy(large) < 0.85 * busy(small) else large


def groups_of(tile: Tile, slots: int, map_: np.ndarray, side: int = SIDE) -> list[np.ndarray]:
    """(pixels, c) of each slot; `side` 4: of a map that was pooled, or gathered."""
    n, h, w, c = map_.shape
    together = tile.pixels
    if not tile.halo:
        flat = map_.reshape(-1, c)
        parts = [flat[start : start + together] for start in range(0, len(flat), together)]
    else:
        corners = ((i, y, x) for i in range(n) for y in range(0, h, side) for x in range(0, w, side))
        blocks = [map_[i, y : y + side, x : x + side].reshape(-1, c) for i, y, x in corners]
        together //= SIDE**2
        parts = [np.concatenate(blocks[k : k + together]) for k in range(0, len(blocks), together)]
    return [np.concatenate([map_[:0, 0, 0], *parts[start::slots]]) for start in range(slots)]


class HopperForward(_Tiled, FusedForward):
    """FusedForward on Hopper. With statistics `partials` has mean and M2 of groups of pixels, `counts` their sizes."""

    name = "conv2d_hopper_forward"

    def __init__(self, x: Spec, weight: Spec, rung: str = "bf16", tile: Tile | None = None, **options: bool) -> None:
        super().__init__(x, weight, rung, **options)
        self.choose_tile(partial(self.plan, x, weight, rung, **options), tile)
        self.split, self.workspace = None, {}
        self.expect_planes("x", "weight")
        if self.statistics:
            self.outputs["partials"] = self.partials
            self.outputs["counts"] = Spec(self.partials.shape[:1], np.dtype(np.int32))

    def launch(self, device: Device, b: Buffers) -> None:
        self.launch_tiles(device, b, "x", (self.tile.columns, 1, CHANNELS))

    def _compute(self, b: Buffers, convolve: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
        super()._compute(b, convolve)
        if self.statistics:
            b.counts[...] = [len(group) for group in self.summed_together(b.y)]


class HopperBackwardData(_Tiled, FusedBackwardData):
    """FusedBackwardData on Hopper, from the weight (o, 3, 3, c) as it is."""

    name = "conv2d_hopper_backward_data"

    def __init__(
        self,
        dy: Spec,
        weight: Spec,
        below: Below,
        rung: str = "bf16",
        unpool: Size | None = None,
        tile: Tile | None = None,
    ) -> None:
        super().__init__(dy, weight, below, rung, unpool)
        self.choose_tile(partial(self.plan, dy, weight, below, rung, unpool), tile)
        others = {name: spec for name, spec in self.inputs.items() if name not in ("dy", "flipped")}
        self.inputs = {"dy": dy, "weight": weight, **others}
        self.expect_planes("dy", "weight")
        self.outputs["partials"] = self.partials

    def launch(self, device: Device, b: Buffers) -> None:
        self.launch_tiles(device, b, "dy", (CHANNELS, 1, CHANNELS))

    def flipped(self, b: Buffers) -> np.ndarray:
        return np.ascontiguousarray(b.weight[:, ::-1, ::-1].transpose(3, 1, 2, 0))


BLOCKS = {(8, 8): 9, (16, 7): 6}  # what wgrad loads at a time, pixels across and down: stages in shared memory


def blocks_of(g: Geometry, across: int, down: int) -> int:
    """Blocks of so many pixels that cover a map."""
    return g.n * -(-g.h // down) * -(-g.w // across)


def parts_of(g: Geometry, blocks: int) -> Cut:
    """How wgrad splits the blocks, for tiles of 64 outputs x 64 channels."""
    return Cut.of(blocks, max(1, min(blocks, MULTIPROCESSORS // (g.c // CHANNELS * -(-g.o // CHANNELS)))))


class HopperBackwardWeight(_InPlanes, Conv2dBackwardWeight):
    """Conv2dBackwardWeight on Hopper, 3x3 with stride 1 and padding 1."""

    name = "conv2d_hopper_backward_weight"
    THREADS: ClassVar[int] = 512

    def __init__(self, x: Spec, weight: Spec, rung: str = "bf16") -> None:
        # A plan of float64 is for the reference alone.
        super().__init__(x, weight, 1, 1, rung if x.dtype == ELEMENTS_OF_RUNG[rung] else None)
        self.multiply_as(rung)
        g = self.geometry
        # The block that leaves the fewest pixels beyond the edges.
        self.block = min(BLOCKS, key=lambda block: blocks_of(g, *block) * prod(block))
        self.parts = parts_of(g, blocks_of(g, *self.block))
        # A single part is the gradient itself.
        several = self.parts.count > 1
        self.workspace = {"partials": Spec((self.parts.count, *weight.shape), self.accumulated)} if several else {}
        self.expect_planes("x", "dy")

    def launch(self, device: Device, b: Buffers) -> None:
        g, parts, (across, down) = self.geometry, self.parts, self.block
        several = "partials" in self.workspace
        x, dy = (1, down + 2, across + 2, CHANNELS), (1, down, across, CHANNELS)
        stage = 2 * prod(dy) + -(-2 * prod(x) // ALIGNMENT) * ALIGNMENT
        shared = BLOCKS[self.block] * stage + ALIGNMENT
        arrays: dict[str, Any] = {"x": TensorMap(b.x, x), "dy": TensorMap(b.dy, dy)}
        arrays["partials"] = b.partials if several else b.dweight
        grid = g.c // CHANNELS * -(-g.o // CHANNELS), parts.count
        arrays |= self._sizes | {"parts": parts.count, "blocks_of_part": parts.each}
        self.kernel(device, f"{self.name}_{across}x{down}", b, grid, self.THREADS, shared=shared, **arrays)
        if several:
            self.launch_merge(device, b)
