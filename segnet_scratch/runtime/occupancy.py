"""Occupancy: what a multiprocessor of each GPU holds, and how many blocks of a kernel at once, by NVIDIA's calculation.

The limits are those of the CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
"""

from dataclasses import dataclass

WARP = 32
REGISTERS = 65536  # of a multiprocessor, on every architecture here
REGISTER_UNIT = 256  # registers are handed to a warp in such portions
WARP_UNIT = 4  # warps that hold registers come in fours, one for each scheduler


@dataclass(frozen=True)
class Multiprocessor:
    """What one multiprocessor of an architecture holds."""

    threads: int
    blocks: int
    shared: int  # bytes
    shared_unit: int = 128  # bytes: portions of shared memory
    shared_reserved: int = 1024  # bytes that the system takes of each block's


# Turing to Blackwell: T4 and RTX 20, A100, RTX 30, RTX 40 and L4, H100, B200, RTX 50. Kernels are compiled for these.
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
MULTIPROCESSORS = {
    "sm_75": Multiprocessor(1024, 16, 64 * 1024, 256, 0),
    "sm_80": Multiprocessor(2048, 32, 164 * 1024),
    "sm_86": Multiprocessor(1536, 16, 100 * 1024),
    "sm_87": Multiprocessor(1536, 16, 164 * 1024),
    "sm_89": Multiprocessor(1536, 24, 100 * 1024),
    "sm_90": Multiprocessor(2048, 32, 228 * 1024),
    "sm_100": Multiprocessor(2048, 32, 228 * 1024),
    "sm_120": Multiprocessor(1536, 24, 100 * 1024),
    "sm_121": Multiprocessor(1536, 24, 100 * 1024),
}
MAX_SHARED = 227 * 1024  # bytes for one block, of GPUs that are not named here and of the host device


def largest_shared(architecture: str | None) -> int:
    """Bytes of shared memory that a GPU grants one block which asks for it; 48 KiB need no asking."""
    limits = MULTIPROCESSORS.get(architecture or "")
    return limits.shared - limits.shared_reserved if limits else MAX_SHARED


def max_threads(registers: int) -> int:
    """The largest block that the register file holds, with so many a thread, handed out 8 at a time to whole warps."""
    return min(1024, REGISTERS // (_rounded(max(registers, 1), 8) * WARP) * WARP)


@dataclass(frozen=True)
class Occupancy:
    """Blocks of a kernel on a multiprocessor at a time."""

    blocks: int
    share: float  # of the threads that the multiprocessor could hold, 0 to 1
    limit: str  # what allows no more: "registers", "shared memory", "threads" or "blocks"


def occupancy(architecture: str, threads: int, registers: int, shared: int) -> Occupancy:
    """Of blocks of so many threads, each with so many registers, and so many bytes of shared memory a block.

    KeyError for an architecture without limits here.
    """
    limits = MULTIPROCESSORS[architecture]
    warps = -(-threads // WARP)
    warp_registers = _rounded(max(registers, 1) * WARP, REGISTER_UNIT)
    warps_with_registers = REGISTERS // warp_registers // WARP_UNIT * WARP_UNIT
    block_shared = _rounded(shared + limits.shared_reserved, limits.shared_unit)
    fits = {
        "threads": limits.threads // WARP // warps,
        "registers": warps_with_registers // warps,
        "shared memory": limits.shared // block_shared if block_shared else limits.blocks,
        "blocks": limits.blocks,
    }
    limit = min(fits, key=lambda what: fits[what])
    return Occupancy(fits[limit], fits[limit] * warps * WARP / limits.threads, limit)


def _rounded(size: int, unit: int) -> int:
    return -(-size // unit) * unit
