"""The machine code of the tensor-core kernels: what their main loops consist of, seen by NVIDIA's disassembler.

No result would show it if a loop fell back to narrow copies, to loads of single numbers or to local memory; it would be
slow on a GPU, and no more. By default one architecture of each kind of machine code is looked at, all of them with
SEGNET_TEST_FULL=1.
"""

import re
from collections import Counter

import pytest
from support import FULL
from support.machine_code import loops_of, main_loops, needs_disassembler, sass_of

from segnet_scratch.ops.convolution.conv2d_hopper import NAMED
from segnet_scratch.runtime.budget import read_budget
from segnet_scratch.runtime.launch import find_kernel, shipped_kernels
from segnet_scratch.runtime.occupancy import ARCHITECTURES
from segnet_scratch.runtime.resources import compile_all

SOURCE = find_kernel("conv2d_forward_mma_128x128").source
ALL = tuple(filter(SOURCE.compiles_for, ARCHITECTURES))
CHOSEN = ALL if FULL else ("sm_80", "sm_90", "sm_120")
FUSED_CHOSEN = ALL if FULL else ("sm_90",)  # large: a quarter of a minute for each
COLUMNS = {  # of a block's tile, whose rows are 128
    "conv2d_forward_mma_128x128": 128,
    "conv2d_forward_mma_128x64": 64,
    "conv2d_forward_mma_128x32": 32,
    "conv2d_backward_weight_mma_128x128": 128,
    "conv2d_backward_weight_mma_128x64": 64,
    "conv2d_fused_forward_128x128": 128,
    "conv2d_fused_forward_128x64": 64,
    "conv2d_fused_forward_128x32": 32,
    "conv2d_fused_split_128x64": 64,
    "conv2d_fused_backward_data_128x128": 128,
    "conv2d_fused_backward_data_128x64": 64,
    "conv2d_fused_backward_data_128x32": 32,
}
# Rows and columns of a warp's tile, by those columns and the threads of a block.
WARP_TILES = {
    (128, 128): (64, 64), (64, 128): (64, 32), (32, 128): (32, 32),
    (128, 256): (64, 32), (64, 256): (32, 32), (32, 256): (16, 32),
}  # fmt: skip
STEPS, STEPS_OF_PART = 4, 2  # instructions deep is a stage, is what tensor cores add up of float32


LOOP = """
.text.f:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDSM.16.M88.4 R4, [R2] ;
        /*0020*/              @!PT LDS RZ, [RZ] ;
.L_x_2:
        /*0030*/                   IADD3 R3, R3, 0x1, RZ ;
        /*0040*/               @P1 BRA `(.L_x_2) ;
        /*0050*/                   HMMA.1688.F32.TF32 R8, R4, R6, R8 ;
        /*0060*/               @P0 BRA `(.L_x_1) ;
        /*0070*/                   EXIT ;
"""


def test_a_loop_is_found():
    assert main_loops(LOOP) == {"f": ["LDSM.16.M88.4", "IADD3", "BRA", "HMMA.1688.F32.TF32", "BRA"]}
    assert main_loops(LOOP.replace("HMMA", "FFMA")) == {}


def chosen_for(kernel):
    return FUSED_CHOSEN if "fused" in kernel else CHOSEN


@needs_disassembler
@pytest.mark.parametrize("element", SOURCE.elements)
@pytest.mark.parametrize(("kernel", "architecture"), [(k, a) for k in COLUMNS for a in chosen_for(k)])
def test_main_loop(kernel, element, architecture):
    loop = Counter(loops_of(find_kernel(kernel).source, element, architecture)[kernel])
    threads = 256 if element == "tf32x3" else 128
    rows, columns = WARP_TILES[COLUMNS[kernel], threads]
    strict = element == "tf32x3"
    steps = STEPS_OF_PART if strict else STEPS  # of float32 a stage is a loop

    def count(prefix):
        return sum(n for name, n in loop.items() if name.startswith(prefix))

    # Every product of the stage, unrolled, on tensor cores.
    products = rows // 16 * columns // 8 * steps * (3 if strict else 1)
    assert count("HMMA") == products
    assert loop["HMMA.16816.F32.BF16" if element == "bf16" else "HMMA.1688.F32.TF32"] == products

    # Fragments: four matrices, or of tf32 with its depth running down four numbers, a load.
    fragments = rows // 16 * 4 + columns // 8 * 2
    if "weight" in kernel and element != "bf16":
        assert count("LDSM") == 0
        assert loop["LDS.128"] == fragments // 4 * steps
    else:
        assert loop["LDSM.16.MT88.4" if "weight" in kernel else "LDSM.16.M88.4"] == fragments // 4 * steps
        assert count("LDSM") == fragments // 4 * steps
    assert loop["LDS"] == 0
    # The small part of every number, and the sums that ordinary additions take over.
    assert loop["FADD"] == (fragments * steps + rows * columns // 32 if strict else 0)

    # Copies: 16 bytes each, past the registers. Nothing else comes from global memory.
    assert count("LDGSTS") == loop["LDGSTS.E.BYPASS.128"] == (128 + COLUMNS[kernel]) * 8 // threads
    assert count("LDG.") == count("STS.U") == 0

    assert count("BAR") == 1, "one barrier a stage"
    if not any(
        (e.kernel, e.element, e.architecture) == (kernel, element, architecture) for e in read_budget().exemptions
    ):
        assert count("LDL") == count("STL") == 0, "local memory"


GATHERED = ("conv2d_forward_mma_elements", "conv2d_backward_weight_mma_elements", "conv2d_fused_forward_elements")


def body_of(kernel, element, architecture):
    """The machine code of one kernel."""
    text = re.split(r"^\.text\.", sass_of(find_kernel(kernel).source, element, architecture), flags=re.MULTILINE)
    (own,) = (body for body in text if body.startswith(f"{kernel}:"))
    return own


@needs_disassembler
@pytest.mark.parametrize("element", SOURCE.elements)
@pytest.mark.parametrize(("kernel", "architecture"), [(k, a) for k in GATHERED for a in chosen_for(k)])
def test_few_channels(kernel, element, architecture):
    """A step of 32 x 64 results a warp: its numbers are loaded before the first product, and stay in registers."""
    body = body_of(kernel, element, architecture)
    assert len(re.findall(r"\bHMMA\.", body)) == 16 * (3 if element == "tf32x3" else 1)
    loads = r"\bLDG\.E\.U16" if element == "bf16" else r"\bLDG\.E\b"
    before = re.findall(loads, body[: body.index("HMMA.")])
    assert len(before) >= (16 if element == "bf16" else 8)
    assert not re.search(r"\b(?:LDL|STL)\b", body), "local memory"


# What the fused engine's kernels store beside whole pieces of maps: floats of partial sums, codes (a byte or two).
# Those of normalisation: test_norm_relu.py.
OTHER_STORES = {
    "conv2d_fused_forward_128x128": {"", "U8", "U16"},
    "conv2d_fused_backward_data_128x128": {""},
    "conv2d_fused_merge": {"U8", "U16"},
    "softmax_cross_entropy": {"64"},
}


@needs_disassembler
@pytest.mark.parametrize("architecture", FUSED_CHOSEN)
@pytest.mark.parametrize("kernel", OTHER_STORES)
def test_maps_move_in_pieces_of_16_bytes(kernel, architecture):
    """Left to itself the compiler splits them into words where they come out of branches or arithmetic."""
    source = find_kernel(kernel).source
    for element in source.elements:
        own = body_of(kernel, element, architecture)
        stores = set(re.findall(r"\bSTG\.E\.?(\w*)", own))
        assert stores - {"128"} <= OTHER_STORES[kernel], element
        assert "128" in stores, element
        assert "LDG.E.128" in own or kernel == "conv2d_fused_forward_128x128", element


# Columns of a product, operands whose depth is not contiguous, how many dimensions the boxes have that the TMA brings.
HOPPER = {
    "conv2d_hopper_forward_halo_256x128": (128, "", {"3D", "4D"}),
    "conv2d_hopper_forward_halo_256x64": (64, "", {"3D", "4D"}),
    "conv2d_hopper_forward_halo_256x32": (32, "", {"3D", "4D"}),
    "conv2d_hopper_forward_halo_128x128": (128, "", {"3D", "4D"}),
    "conv2d_hopper_forward_columns_256x128": (128, "", {"3D", "4D.IM2COL"}),
    "conv2d_hopper_forward_columns_128x128": (128, "", {"3D", "4D.IM2COL"}),
    "conv2d_hopper_backward_data_halo_256x128": (128, "B", {"3D", "4D"}),
    "conv2d_hopper_backward_data_halo_256x64": (64, "B", {"3D", "4D"}),
    "conv2d_hopper_backward_data_halo_128x128": (128, "B", {"3D", "4D"}),
    "conv2d_hopper_backward_data_columns_256x128": (128, "B", {"3D", "4D.IM2COL"}),
    "conv2d_hopper_backward_data_columns_128x128": (128, "B", {"3D", "4D.IM2COL"}),
    "conv2d_hopper_backward_weight_8x8": (192, "AB", {"4D"}),
    "conv2d_hopper_backward_weight_16x7": (192, "AB", {"4D"}),
}
OF_HOPPER = [find_kernel(kernel).source for kernel in HOPPER]


def test_every_kernel_of_hopper_is_looked_at():
    assert {name for name, kernel in shipped_kernels().items() if kernel.source in OF_HOPPER} == HOPPER.keys()


@needs_disassembler
@pytest.mark.parametrize("element", ["bf16", "tf32x3", *(["tf32"] if FULL else [])])
@pytest.mark.parametrize("name", dict.fromkeys(source.path.stem for source in OF_HOPPER))
def test_on_hopper(name, element):
    kernels = [kernel for kernel, source in zip(HOPPER, OF_HOPPER, strict=True) if source.path.stem == name]
    source = find_kernel(kernels[0]).source
    (compiled,) = compile_all([source], ["sm_90"], [element])  # first: it keeps the machine code, too
    assert compiled.remarks == ()  # as (C7510): products that are serialised
    for kernel in kernels:
        columns, transposed, boxes = HOPPER[kernel]
        of_weight, short = transposed == "AB", element == "tf32x3"
        if of_weight:
            products, groups, registers = 7 if "16x7" in kernel else 4, 1, 128
        else:  # of 64 deep and its nine taps, for each 64 pixels of a consumer
            tile = NAMED["_".join(kernel.split("_")[-2:])]
            consumers = tile.consumers(element)
            products, registers = 36 * tile.pixels // 64 // consumers, {2: 168, 4: 96}[consumers]
            groups = products // 4 if short else 9
        if of_weight and short:  # a product for each tap, whose sum is added by itself
            columns, products, groups = 64, 3 * products, 3
        own = body_of(kernel, element, "sm_90")
        multiplied = re.findall(r"\bHGMMA\.(\S+)([^;]*);", own)
        assert [shape for shape, _ in multiplied] == [f"64x{columns}x16.F32.BF16"] * products, kernel
        for _, operands in multiplied:
            assert {side for side in "AB" if f"tnsp{side}" in operands} == set(transposed), kernel
        assert set(re.findall(r"\bUTMALDG\.(\S+)", own)) == boxes, kernel
        # One group of products stays in flight, only after the last is none; the sums of short ones are added at once.
        waits = re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x\w)", own)
        assert len(re.findall(r"WARPGROUP\.ARRIVE", own)) == groups, kernel
        assert (waits.count("0x0"), waits.count("0x1")) == ((groups + 1, 0) if short else (1, groups)), kernel
        assert not short or len(re.findall(r"\bFADD\b", own)) >= groups * columns // 2, kernel
        # Registers move from the producer to the consumers.
        assert len(re.findall(r"USETMAXREG\.(?:DEALLOC|TRY_ALLOC)", own)) == 2, kernel
        assert not re.search(r"\b(?:LDL|STL)\b", own), kernel
        (usage,) = (u for u in compiled.usages if u.kernel == kernel)
        assert usage.registers == registers, kernel  # before they are shared out
        assert usage.spill_stores == usage.spill_loads == usage.stack == 0, kernel
