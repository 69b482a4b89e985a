"""Kernels: found, parsed, compiled, checked and launched. `launch` is the only way to a kernel in this project."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from segnet_scratch.errors import LaunchError
from segnet_scratch.runtime.devices.base import Device
from segnet_scratch.runtime.gate import check_launch
from segnet_scratch.runtime.observe import Launch, current_observer
from segnet_scratch.runtime.signature import ElementTypes, Kernel, parse_kernels
from segnet_scratch.runtime.source import shipped_sources

__all__ = ["ElementTypes", "Kernel", "Launch", "dim3", "find_kernel", "launch", "shipped_kernels"]


@functools.cache
def shipped_kernels() -> dict[str, Kernel]:
    """Every kernel in `cuda/`, by name."""
    kernels: dict[str, Kernel] = {}
    for source in shipped_sources():
        for kernel in parse_kernels(source):
            if kernel.name in kernels:
                raise LaunchError(
                    f"kernel {kernel.name} is defined in {source.path} and in {kernels[kernel.name].source.path}"
                )
            kernels[kernel.name] = kernel
    return kernels


def find_kernel(name: str) -> Kernel:
    """The shipped kernel of this name. LaunchError lists the names there are."""
    try:
        return shipped_kernels()[name]
    except KeyError:
        raise LaunchError(
            f"there is no kernel {name!r}; the kernels are {', '.join(sorted(shipped_kernels()))}"
        ) from None


def launch(
    device: Device,
    kernel: str | Kernel,
    grid: Sequence[int] | int,
    block: Sequence[int] | int,
    arguments: Sequence[Any],
    types: ElementTypes,
    shared: int = 0,
) -> None:
    """Checks a launch against the kernel's signature, then runs it on the device.

    `grid` and `block` are blocks and threads in x, y, z (missing ones are 1); `arguments` are arrays of the device,
    None for a null pointer, TensorMaps, and Python or NumPy numbers; `types` says what storage_t and accumulate_t are;
    `shared` is dynamic shared memory in bytes.
    """
    if isinstance(kernel, str):
        kernel = find_kernel(kernel)
    asked = Launch(kernel, types, dim3(grid), dim3(block), shared, arguments)
    checked = replace(asked, arguments=check_launch(device, asked))
    current_observer().launch(checked, lambda: device.execute(checked))


def dim3(size: Sequence[int] | int) -> tuple[int, ...]:
    """Blocks or threads in x, y and z; those left out are 1, as in CUDA's dim3."""
    size = tuple(size) if isinstance(size, Sequence) else (size,)
    return size + (1,) * (3 - len(size))
