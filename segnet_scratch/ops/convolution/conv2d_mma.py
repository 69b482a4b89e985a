"""The plan of the tensor-core convolutions (cuda/conv2d_mma.cu): what they take, tiles, chunks, launches.

Rungs and how they multiply (cuda/common/warp_tile.cuh): "tf32" and "tf32x3" float32 arrays, "bf16" bfloat16 arrays.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from segnet_scratch.ops.convolution.conv2d_geometry import Cut, Geometry
from segnet_scratch.ops.convolution.tile_table import key_of, table_of
from segnet_scratch.ops.op import Buffers, Op
from segnet_scratch.runtime.devices import Device
from segnet_scratch.runtime.launch import ElementTypes
from segnet_scratch.runtime.machine import switch
from segnet_scratch.runtime.precision import ELEMENTS_OF_RUNG

OLDEST = 80  # compute capability: asynchronous copies, tf32, bfloat16
MAX_KERNEL = 15  # rows or columns of taps: they travel as bits
MAX_OFFSET = 2**31


@dataclass(frozen=True)
class Tile:
    """What a block computes, and which kernel does it: `name` ends the kernel's name."""

    name: str
    rows: int
    columns: int

    STAGES: ClassVar[int] = 3
    DEPTH_BYTES: ClassVar[int] = 128  # of a row or column in a stage

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory: the stages of the pipeline, or what kernels without patches in them need."""
        stages = 2 if self.name == "elements" else self.STAGES
        return stages * (self.rows + self.columns) * self.DEPTH_BYTES

    def threads(self, rung: str) -> int:
        """Of a block: float32 needs registers for parts of sums, so that a warp computes half as many of them."""
        return 256 if rung == "tf32x3" and self.name != "elements" else 128

    def grid(self, rows: int, columns: int) -> tuple[int, int]:
        """Blocks that cover so many rows and columns."""
        return -(-rows // self.rows), -(-columns // self.columns)

    def launch(
        self, op: Op, device: Device, name: str, rung: str, b: Buffers, grid: tuple[int, ...], **given: Any
    ) -> None:
        """The kernel of this name for this tile."""
        given |= {"types": ElementTypes.named(rung), "shared": self.shared}
        op.kernel(device, f"{name}_{self.name}", b, grid, self.threads(rung), **given)


WIDE, MEDIUM, NARROW = Tile("128x128", 128, 128), Tile("128x64", 128, 64), Tile("128x32", 128, 32)
# For channels that are no multiple of a 16-byte piece: fprop, wgrad.
ELEMENTS, WEIGHT_ELEMENTS = Tile("elements", 128, 64), Tile("elements", 32, 64)
RESIDENT_ELEMENTS = {"tf32": 4, "tf32x3": 3, "bf16": 4}  # blocks of fprop on a multiprocessor


def pieces_fit(rung: str, *channels: int) -> bool:
    """Do so many channels divide into pieces of 16 bytes?"""
    return not any(c * ELEMENTS_OF_RUNG[rung].itemsize % 16 for c in channels)


def forward_tile(g: Geometry, rung: str) -> Tile:
    """The tile of fprop, and of dgrad with `g.mirrored`, by shape alone.

    In float32 never the widest: of the next two blocks fit a multiprocessor, and three products for one leave the L2
    cache the time for their copies.
    """
    if not pieces_fit(rung, g.c):
        return ELEMENTS
    if g.o <= NARROW.columns:
        return NARROW
    return MEDIUM if g.o <= MEDIUM.columns or rung == "tf32x3" else WIDE


def candidates(default: Tile) -> tuple[Tile, ...]:
    """The tiles that could stand in for a default."""
    return (ELEMENTS,) if default is ELEMENTS else (NARROW, MEDIUM, WIDE)


def chosen(device: Device, kind: str, rung: str, g: Geometry, default: Tile) -> Tile:
    """The tile that was measured to be the fastest on this device, else the default."""
    name = table_of(device).choices.get(key_of(kind, rung, g))
    return next((tile for tile in candidates(default) if tile.name == name), default)


def weight_tile(g: Geometry, rung: str) -> Tile:
    """The tile of wgrad: rows are positions of kh kw c, columns outputs."""
    if not pieces_fit(rung, g.c, g.o):
        return WEIGHT_ELEMENTS
    return MEDIUM if g.o <= MEDIUM.columns else WIDE


MIN_PIXELS = 2048  # of a chunk, so that adding the partial results stays small beside making them
WANTED_BLOCKS = 512  # enough to fill a large GPU


def chunks_of(g: Geometry, rows: int, columns: int) -> Cut:
    """How wgrad splits the pixels, for tiles of so many rows and columns."""
    tiles = -(-g.depth // rows) * -(-g.o // columns)
    return Cut.of(g.pixels, min(-(-WANTED_BLOCKS // tiles), -(-g.pixels // MIN_PIXELS)))


def unsupported_reason(g: Geometry) -> str | None:
    """Why the tensor-core kernels do not take a convolution; None where they do."""
    if g.stride != 1:
        return f"takes stride 1, not {g.stride}"
    if max(g.kh, g.kw) > MAX_KERNEL:
        return f"takes kernels up to {MAX_KERNEL}x{MAX_KERNEL}, not {g.kh}x{g.kw}"
    for images, image in (
        (_images(WIDE.rows, g.oh * g.ow), g.h * g.w * g.c),
        (_images(WIDE.rows, g.h * g.w), g.oh * g.ow * g.o),
        (_images(chunks_of(g, WIDE.rows, WIDE.columns).each, g.oh * g.ow), g.h * g.w * g.c),
    ):
        if images * image >= MAX_OFFSET:
            return f"takes less than 2^31 elements in the images of one block, not {images} x {image}"
    return None


def _images(pixels: int, image: int) -> int:
    """How many images a run of pixels can touch."""
    return -(-pixels // image) + 1


def has_tensor_cores(device: Device) -> bool:
    """Can the device run these kernels? The host device can."""
    return device.architecture is None or int(device.architecture.removeprefix("sm_").rstrip("af")) >= OLDEST


def without_tensor_cores() -> bool:
    """Is float32 to be multiplied as float32: SEGNET_FMA=1."""
    return switch("SEGNET_FMA", False, "float32 without tensor cores", "with them")
