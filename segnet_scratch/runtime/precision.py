"""Number formats of tensor cores: bfloat16, which is stored, and tf32, to which float32 is rounded on the way.

NumPy has no bfloat16. The dtype comes from ml_dtypes, a small library kept by the JAX team: it is an ordinary dtype
with casts and arithmetic, so that arrays carry what they hold through every check of plans and of the launch gate, and
CuPy 14 takes it as it is (with NumPy 2.1.2 or newer). Arrays of uint16 would need nothing, but would be integers to
whoever looks at them: to the gate, to comparisons, to DLPack.
"""

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# How tensor cores multiply (cuda/common/warp_tile.cuh), and the arrays that such kernels read.
ELEMENTS_OF_RUNG = {"tf32": np.dtype(np.float32), "tf32x3": np.dtype(np.float32), "bf16": BFLOAT16}
BFLOAT16_ROUNDING = 2.0**-8  # half a unit of its 8 significant bits, relative


def is_floating(dtype: np.dtype) -> bool:
    """Is this a floating-point type? (NumPy files bfloat16 under "V", raw bytes.)"""
    return dtype.kind == "f" or dtype == BFLOAT16


def round_to_tf32(array: np.ndarray) -> np.ndarray:
    """float32 numbers rounded to tf32 (10 bits of fraction), to nearest, ties away from zero, as float32."""
    bits = (np.ascontiguousarray(array, np.float32).view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isnan(array), np.float32(np.nan), bits.view(np.float32))
