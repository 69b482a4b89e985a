"""Nothing is timed before it is right: fresh data, logits and every gradient against float64."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from bench.cases import PRECISIONS, Arrays, Case, initial_state
from bench.contenders import OURS, Peer
from segnet_scratch.runtime.devices import Device

# A right implementation stays within this factor of PyTorch's own error, give or take a few roundings.
ERROR_FACTOR, ERROR_FLOOR = 4, 1e-6
Errors = dict[str, dict[str, float]]
DRAWS = 3


def errors_of(
    device: Device, width: float = 1.0, size: int = 32, on_gpu: bool = True, precisions: tuple[str, ...] = PRECISIONS
) -> dict[str, Errors]:
    """By precision and contender: relative errors of logits and of the worst gradient, the best of three draws.

    Where an input of a ReLU lies within a rounding of 0, or two values of a pool within one of each other, a rounding
    decides what follows. That adds to an error now and then, a mistake always.
    """
    draws: dict[str, dict[str, list[dict[str, float]]]] = {precision: {} for precision in precisions}
    for seed in range(DRAWS):
        cases = {p: Case("training", 2, (size, size), p, width, on_gpu) for p in precisions}
        batch, state = cases[precisions[0]].data(seed), initial_state(seed, width)
        exact_case = replace(cases[precisions[0]], precision="float32", on_gpu=False)
        exact = Peer(exact_case, state, "contiguous", dtype=torch.float64).training_pass(*batch)
        for precision, case in cases.items():
            contenders = {"PyTorch": Peer(case, state)} | {
                name: make(case, device, state)
                for name, make in OURS.items()
                if (name, precision) != ("ours, layers", "bf16")
            }
            torch.backends.cudnn.benchmark = False  # a search would take longer than what it finds
            for name, contender in contenders.items():
                errors = relative_errors(contender.training_pass(*batch), exact)
                draws[precision].setdefault(name, []).append(errors)
    return {
        precision: {name: {what: min(e[what] for e in es) for what in es[0]} for name, es in of_names.items()}
        for precision, of_names in draws.items()
    }


def relative_errors(got: Mapping[str, np.ndarray], truth: Arrays) -> dict[str, float]:
    """Of the logits, and of the gradients the worst: |got - truth| / |truth|, as Euclidean lengths."""
    if got.keys() != truth.keys():
        raise SystemExit(f"the gradients are not of the same parameters: {sorted(got.keys() ^ truth.keys())}")
    errors = {name: float(np.linalg.norm(got[name] - wide) / np.linalg.norm(wide)) for name, wide in truth.items()}
    return {"logits": errors.pop("logits"), "gradients": max(errors.values())}


def right(errors: Errors) -> dict[str, bool]:
    """Which of ours are right: errors of the size of PyTorch's own. A NaN is never right."""
    peer = errors["PyTorch"]
    return {
        name: all(own[what] <= ERROR_FACTOR * peer[what] + ERROR_FLOOR for what in own)
        for name, own in errors.items()
        if name != "PyTorch"
    }
