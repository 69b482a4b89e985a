"""What every contender is given and held to, on the CPU and on a GPU."""

from collections.abc import Mapping

import numpy as np

CLASSES, VOID = 21, 255
LR, MOMENTUM, DECAY = 1e-3, 0.9, 5e-4
# A right implementation stays within this factor of PyTorch's own error, give or take a few roundings.
ERROR_FACTOR, ERROR_FLOOR = 4, 1e-6

Arrays = dict[str, np.ndarray]


def data(batch: int, size: tuple[int, int], *seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, h, w, 3), float32, and labels (n, h, w), uint8, a twentieth of them void."""
    rng = np.random.default_rng(seed)
    shape = (batch, *size)
    labels = np.where(rng.random(shape) < 0.05, VOID, rng.integers(0, CLASSES, shape))
    return rng.standard_normal((*shape, 3), np.float32), labels.astype(np.uint8)


def lifted(state: Arrays) -> Arrays:
    """Weights with batch norms lifted by two deviations, so that few ReLUs are near their kink."""
    for name, array in state.items():
        if name.endswith("bn.bias"):
            array[...] = 2
    return state


def relative_errors(got: Mapping[str, np.ndarray], truth: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Of the logits, and of the gradients the worst: |got - truth| / |truth|, as Euclidean lengths."""
    if got.keys() != truth.keys():
        raise SystemExit(f"the gradients are not of the same parameters: {sorted(got.keys() ^ truth.keys())}")
    errors = {name: float(np.linalg.norm(got[name] - wide) / np.linalg.norm(wide)) for name, wide in truth.items()}
    return {"logits": errors.pop("logits"), "gradients": max(errors.values())}
