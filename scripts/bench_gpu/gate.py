"""Nothing is timed before it is right: fresh data, logits and every gradient against float64."""

from collections.abc import Mapping

import numpy as np
import torch
from torch_segnet import TorchSegNet

from bench_gpu.cases import PRECISIONS, Case
from bench_gpu.common import CLASSES, ERROR_FACTOR, ERROR_FLOOR, VOID, Arrays, data, lifted, relative_errors
from bench_gpu.ours import OURS
from bench_gpu.peers import Peer
from segnet_scratch.runtime.devices import Device
from segnet_scratch.segnet import SegNet

Errors = dict[str, dict[str, float]]
DRAWS = 3


def data_of(case: Case, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, h, w, 3) and labels (n, h, w)."""
    return data(case.batch, case.size, 21, seed)


def initial_state(seed: int, width: float) -> Arrays:
    """Weights to start from."""
    return lifted(SegNet(CLASSES, width, "numpy", seed=seed).state_dict())


def truth(state: Mapping[str, np.ndarray], images: np.ndarray, labels: np.ndarray, width: float) -> Arrays:
    """Logits and gradients in float64, by PyTorch on the CPU."""
    model = TorchSegNet(CLASSES, width).double()
    model.load_numpy(state)
    logits = model(torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float64)))
    torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels).long(), ignore_index=VOID).backward()
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters()}
    return {"logits": logits.detach().numpy().transpose(0, 2, 3, 1), **gradients}


def errors_of(device: Device, width: float = 1.0, size: int = 32, torch_device: str = "cuda") -> dict[str, Errors]:
    """By precision and contender: relative errors of logits and of the worst gradient, the best of three draws.

    Where an input of a ReLU lies within a rounding of 0, or two values of a pool within one of each other, a rounding
    decides what follows. That adds to an error now and then, a mistake always.
    """
    found: dict[str, Errors] = {}
    for precision in PRECISIONS:
        case = Case("training", 2, (size, size), precision)
        draws: dict[str, list[dict[str, float]]] = {}
        for seed in range(DRAWS):
            images, labels = data_of(case, seed)
            state = initial_state(seed, width)
            exact = truth(state, images, labels, width)
            for name, make in OURS.items():
                if name == "ours, layers" and precision == "bf16":
                    continue
                contender = make(case, device, state, width)
                result = contender.training_pass(device.upload(images), device.upload(labels))
                draws.setdefault(name, []).append(relative_errors(result, exact))
            peer = Peer(case, state, device=torch_device, width=width)
            nchw = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(torch_device)
            result = peer.training_pass(nchw, torch.from_numpy(labels).long().to(torch_device))
            draws.setdefault("PyTorch", []).append(relative_errors(result, exact))
        found[precision] = {name: {what: min(e[what] for e in es) for what in es[0]} for name, es in draws.items()}
    return found


def right(errors: Errors) -> dict[str, bool]:
    """Which of ours are right: errors of the size of PyTorch's own. A NaN is never right."""
    peer = errors["PyTorch"]
    return {
        name: all(own[what] <= ERROR_FACTOR * peer[what] + ERROR_FLOOR for what in own)
        for name, own in errors.items()
        if name != "PyTorch"
    }
