"""The launch gate: every launch is checked against the kernel's signature before anything runs.

CUDA and CuPy check nothing: a float64 array for a float pointer, a transposed view, a swapped argument all run and
corrupt memory. Here each of them is an error that names kernel and argument.
"""

from collections.abc import Sequence
from math import inf, prod
from typing import Any

import numpy as np

from segnet_scratch.errors import DeviceError, DTypeError, LaunchError, SegnetError, ShapeError
from segnet_scratch.runtime.devices.base import Device
from segnet_scratch.runtime.observe import Launch
from segnet_scratch.runtime.occupancy import largest_shared
from segnet_scratch.runtime.signature import ElementTypes, Kernel, Parameter
from segnet_scratch.runtime.tensor_map import TensorMap

MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_BLOCK = (1024, 1024, 64)
MAX_THREADS = 1024


def check_launch(device: Device, launch: Launch) -> list[Any]:
    """The arguments ready to be passed: arrays (or None) for pointers, TensorMaps, NumPy scalars of the declared type.

    Raises LaunchError, ShapeError, DTypeError or DeviceError, each with the kernel's name, the argument, the expected,
    the got and the fix. Nothing has been launched then.
    """
    kernel, types, arguments = launch.kernel, launch.types, launch.arguments
    _check_geometry(kernel, launch.grid, launch.block)
    _check_shared(kernel, launch.shared, device.architecture)
    if types.name not in kernel.source.elements:
        raise DTypeError(
            f"{kernel.name}: cannot be launched for {types.name}; {kernel.source.path.name} is for "
            f"{', '.join(kernel.source.elements)}"
        )
    if len(arguments) != len(kernel.parameters):
        raise LaunchError(
            f"{kernel.name}: takes {len(kernel.parameters)} arguments, got {len(arguments)}; pass {kernel.signature}"
        )
    values: list[Any] = []
    scalars: dict[str, int] = {}
    ranges: list[tuple[int, int, Parameter]] = []
    for parameter, argument in zip(kernel.parameters, arguments, strict=True):
        what = f"{kernel.name}: argument {parameter.name}"
        if parameter.pointer:
            _check_array(device, what, parameter, types, argument)
            values.append(argument)
            if argument is not None:
                start = device.address(argument)
                if start % argument.itemsize != 0:
                    raise LaunchError(
                        f"{what} lies at address {start:#x}, expected a multiple of its element size, "
                        f"{argument.itemsize} bytes; copy it"
                    )
                ranges.append((start, start + argument.nbytes, parameter))
        elif parameter.tensor_map:
            start = _check_tensor_map(device, what, types, argument)
            values.append(argument)
            ranges.append((start, start + argument.array.nbytes, parameter))
        else:
            value = _scalar(what, parameter, types, argument)
            values.append(value)
            if value.dtype.kind in "iu":
                scalars[parameter.name] = int(value)
    for parameter, argument in zip(kernel.parameters, arguments, strict=True):
        if argument is not None and parameter.extent_code is not None:
            _check_extent(kernel, parameter, argument.array if parameter.tensor_map else argument, scalars)
    _check_overlap(kernel, ranges)
    return values


def _check_geometry(kernel: Kernel, grid: Sequence[int], block: Sequence[int]) -> None:
    for what, size, limits in (("grid", grid, MAX_GRID), ("block", block, MAX_BLOCK)):
        if len(size) != 3 or any(type(n) is not int or n < 1 for n in size):
            raise LaunchError(f"{kernel.name}: {what} {tuple(size)}; expected up to three positive Python integers")
        for axis, n, limit in zip("xyz", size, limits, strict=True):
            if n > limit:
                raise LaunchError(
                    f"{kernel.name}: {what}.{axis} is {n}, the limit is {limit}; give each thread more work"
                )
    if prod(block) > MAX_THREADS:
        raise LaunchError(f"{kernel.name}: a block of {prod(block)} threads; the limit is {MAX_THREADS}")


def _check_shared(kernel: Kernel, shared: int, architecture: str | None) -> None:
    limit = largest_shared(architecture)
    if type(shared) is not int or not 0 <= shared <= limit:
        raise LaunchError(
            f"{kernel.name}: {shared!r} bytes of dynamic shared memory; expected an integer, 0 to {limit}"
        )


def _check_array(device: Device, what: str, parameter: Parameter, types: ElementTypes, array: Any) -> None:
    if array is None:
        if parameter.optional:
            return
        raise LaunchError(f"{what} is None; only parameters marked OPTIONAL may be null")
    if not device.owns(array):
        raise DeviceError(
            f"{what} is a {type(array).__module__}.{type(array).__name__}; "
            f"expected an array of the {device.name} device; move it there with device.upload(...)"
        )
    expected = parameter.dtype(types)
    if array.dtype != expected:
        raise DTypeError(f"{what} has element type {array.dtype}, expected {expected}; convert it with astype")
    if not array.flags.c_contiguous:
        raise LaunchError(
            f"{what} is a view with strides {array.strides} of shape {array.shape}; "
            "expected a C-contiguous array; copy it"
        )
    if array.size == 0:
        raise ShapeError(f"{what} is empty: shape {array.shape}; a kernel needs at least one element")
    if not parameter.const and isinstance(array, np.ndarray) and not array.flags.writeable:
        raise LaunchError(f"{what} is written by the kernel but is read-only; pass a copy")


def _check_tensor_map(device: Device, what: str, types: ElementTypes, argument: Any) -> int:
    """The address of its array."""
    if not isinstance(argument, TensorMap):
        raise DTypeError(f"{what} is a {type(argument).__name__}; expected a TensorMap of an array")
    if not device.owns(argument.array):
        raise DeviceError(
            f"{what} describes an array that is not of the {device.name} device; move it there and describe that"
        )
    if argument.array.dtype != types.factors:
        raise DTypeError(f"{what} is {argument.describe()}; expected element type {types.factors}")
    address = device.address(argument.array)
    if address % 16:
        raise LaunchError(f"{what} describes an array at address {address:#x}; expected a multiple of 16; copy it")
    return address


def _scalar(what: str, parameter: Parameter, types: ElementTypes, value: Any) -> np.generic:
    dtype = parameter.dtype(types)
    if dtype.kind == "b":
        if not isinstance(value, (bool, np.bool_)) and not (isinstance(value, int) and value in (0, 1)):
            raise DTypeError(f"{what} is {value!r} ({type(value).__name__}); expected True or False (bool)")
    elif dtype.kind in "iu":
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
            raise DTypeError(f"{what} is {value!r} ({type(value).__name__}); expected an integer ({parameter.c_type})")
        limits = np.iinfo(dtype)
        if not limits.min <= int(value) <= limits.max:
            raise LaunchError(
                f"{what} is {int(value)}, outside the range of {parameter.c_type} ({limits.min} to {limits.max}); "
                "split the work into smaller arrays, for example a smaller batch"
            )
    elif isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise DTypeError(f"{what} is {value!r} ({type(value).__name__}); expected a number ({parameter.c_type})")
    elif float(np.finfo(dtype).max) < abs(value if isinstance(value, int) else float(value)) < inf:
        raise LaunchError(f"{what} is out of the range of {parameter.c_type}, {np.finfo(dtype).max:.3g}; scale it")
    return dtype.type(value)


def _check_extent(kernel: Kernel, parameter: Parameter, array: Any, scalars: dict[str, int]) -> None:
    what = f"{kernel.name}: argument {parameter.name}"
    try:
        expected = parameter.extent_shape(scalars)
    except NameError as error:
        raise SegnetError(
            f"{kernel.source.path}: {kernel.name}: the shape comment {parameter.extent} of {parameter.name} uses "
            f"a name that is no integer parameter ({error}); it can use {', '.join(scalars) or 'none'}"
        ) from error
    except ZeroDivisionError as error:
        values = ", ".join(f"{name}={value}" for name, value in scalars.items())
        raise ShapeError(
            f"{what} should have the shape {parameter.extent}, which divides by zero with {values}"
        ) from error
    if any(n < 1 for n in expected):
        raise ShapeError(f"{what} should have the shape {parameter.extent} = {expected}; expected positive sizes")
    if parameter.tensor_map and tuple(array.shape) != expected:
        raise ShapeError(
            f"{what} describes an array of shape {tuple(array.shape)}; expected {expected}, {parameter.extent}; "
            "reshape it"
        )
    if array.size != prod(expected):
        raise ShapeError(
            f"{what} has {array.size} elements, shape {array.shape}; expected {prod(expected)}, {parameter.extent} = "
            f"{expected}"
        )


def _check_overlap(kernel: Kernel, ranges: list[tuple[int, int, Parameter]]) -> None:
    for i, (start, end, parameter) in enumerate(ranges):
        for other_start, other_end, other in ranges[i + 1 :]:
            if (not parameter.const or not other.const) and start < other_end and other_start < end:
                raise LaunchError(
                    f"{kernel.name}: arguments {parameter.name} and {other.name} overlap in memory and one of them is "
                    "written; pass separate arrays"
                )
