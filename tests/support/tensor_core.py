"""How a tensor core adds, in float64: what cuda/common/host_tensor_core.h does in integers of a C++ compiler."""

import numpy as np

BITS_BELOW = 25  # an H100's


def exponents(values: np.ndarray) -> np.ndarray:
    """floor(log2(|values|)), very small for 0."""
    return np.where(values == 0, -(2**20), np.frexp(values)[1] - 1)


def cut(values: np.ndarray, exponent: np.ndarray) -> np.ndarray:
    """Without the bits below 2^exponent, towards zero."""
    return np.ldexp(np.trunc(np.ldexp(values, -exponent)), exponent)


def multiply_add(a: np.ndarray, b: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """sums (m, n) + a (m, k) b (k, n), as one instruction adds it."""
    a, b, sums = (array.astype(np.float64) for array in (a, b, sums))
    terms = np.concatenate([a[:, :, None] * b[None], sums[:, None]], 1)  # exact: 2 x 11 significant bits
    powers = np.concatenate([exponents(a)[:, :, None] + exponents(b)[None], exponents(sums)[:, None]], 1)
    lowest = powers.max(1) - BITS_BELOW
    total = cut(terms, np.maximum(lowest, -1000)[:, None]).sum(1)  # exact: below 2^32 times the lowest bit
    return cut(total, np.maximum(exponents(total), -1000) - 23).astype(np.float32)
