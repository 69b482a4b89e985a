"""The operations, a chapter a folder: of each its plan and launches, its fast NumPy, its NumPy reference, its cases."""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    """The functions on tensors, under the name that users' programs import them by; they live in `nn.functions`."""
    function = (
        None if name.startswith("_") else getattr(importlib.import_module("segnet_scratch.nn.functions"), name, None)
    )
    if getattr(function, "__module__", None) != "segnet_scratch.nn.functions":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return function
