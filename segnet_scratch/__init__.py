"""SegNet without a deep learning framework: hand-written CUDA kernels, a minimal autograd, SGD."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segnet_scratch.nn.autograd import Tensor, no_grad, tensor
    from segnet_scratch.runtime.devices import get_device
    from segnet_scratch.segnet import SegNet, SegNetBasic
    from segnet_scratch.weights import load

__version__ = "0.1.0"

__all__ = ["SegNet", "SegNetBasic", "Tensor", "__version__", "get_device", "load", "no_grad", "tensor"]

_MODULES = {
    "nn.autograd": ("Tensor", "no_grad", "tensor"),
    "runtime.devices": ("get_device",),
    "segnet": ("SegNet", "SegNetBasic"),
    "weights": ("load",),
}


def __getattr__(name: str) -> Any:
    """Imports what is asked for when it is first asked for: `segnet doctor` must speak where NumPy does not import."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"segnet_scratch.{module}"), name)
    raise AttributeError(f"module 'segnet_scratch' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
