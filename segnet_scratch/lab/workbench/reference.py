"""A NumPy function as the definition of what a kernel should compute."""

import importlib.util
import inspect
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from segnet_scratch.errors import ConfigError, ShapeError
from segnet_scratch.files import real
from segnet_scratch.lab.workbench.setup import Setup
from segnet_scratch.runtime.precision import is_floating

Reference = Callable[..., Any]


def load_reference(text: str) -> Reference:
    """The function of `file.py:function`."""
    path, _, name = text.rpartition(":")
    what = f"reference {text!r}"
    if not path or not name.isidentifier():
        raise ConfigError(f"{what}: expected file.py:function")
    file = real(path)
    if not file.is_file():
        raise ConfigError(f"{what}: there is no file {file}")
    spec = importlib.util.spec_from_file_location(f"reference_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{what}: {file.name} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.parent))  # as `python file.py` does, for what it imports from beside it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"{what}: {file.name} does not import: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(file.parent))
    function = getattr(module, name, None)
    if not callable(function):
        functions = [n for n, value in vars(module).items() if inspect.isfunction(value) and not n.startswith("_")]
        raise ConfigError(f"{what}: {file.name} has no function {name}; it has {', '.join(functions) or 'none'}")
    return function


def expected_outputs(function: Reference, setup: Setup) -> dict[str, np.ndarray]:
    """Calls the reference with copies of those inputs and scalars that it names; its results by name of the output."""
    available: dict[str, Any] = {name: None if a is None else a.copy() for name, a in setup.contents.items()}
    available |= setup.scalars
    parameters = inspect.signature(function).parameters.values()
    kernel, what = setup.kernel.name, f"reference {getattr(function, '__name__', 'reference')}"
    wanted = available
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        wanted = {p.name: available[p.name] for p in parameters if p.name in available}
        if missing := [p.name for p in parameters if p.name not in available and p.default is p.empty]:
            offer = f"{kernel} has {', '.join(available)} to offer"
            under = "its inputs and scalars, under their names in the kernel's signature"
            raise ConfigError(f"{what}: it asks for {', '.join(missing)}; {offer} ({under})")
    try:
        result = function(**wanted)
    except Exception as error:
        line = error.__traceback__.tb_next.tb_lineno if error.__traceback__ and error.__traceback__.tb_next else 0
        raise ConfigError(f"{what}: line {line}: {type(error).__name__}: {error}") from error
    outputs = setup.of_role("output", "updated")
    if not isinstance(result, dict):
        results = result if isinstance(result, tuple) else (result,)
        if len(results) != len(outputs):
            returned = f"it returned {len(results)} array{'s' if len(results) > 1 else ''}"
            writes = f"the kernel writes {len(outputs)}: {', '.join(outputs)}"
            raise ConfigError(f"{what}: {returned}, {writes}; return a tuple in this order, or a dict by name")
        result = dict(zip(outputs, results, strict=True))
    arrays = {name: np.asarray(value) for name, value in result.items()}
    for name, array in arrays.items():
        if name not in outputs:
            writes = f"it writes {', '.join(outputs)}"
            raise ConfigError(f"{what}: it returned {name!r}, which the kernel does not write; {writes}")
        if array.shape != setup.shapes[name]:
            raise ShapeError(f"{what}: {name} has shape {array.shape}, the kernel's has {setup.shapes[name]}")
    return arrays


def worst_element(
    got: np.ndarray, expected: np.ndarray, bound: np.ndarray | float, same: bool = False
) -> tuple[int, tuple[int, ...]]:
    """(how many elements lie beyond the bound, the one furthest beyond it). Integers must be equal; NaN is never near.

    With `same` a NaN is right where a NaN is expected, and an infinity where the same one is.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.abs(got.astype(np.float64) - expected.astype(np.float64))
        if is_floating(got.dtype) or is_floating(expected.dtype):
            right = same & ((got == expected) | (np.isnan(got) & np.isnan(expected)))
            wrong = ~((error <= bound) & np.isfinite(error) | right)
            error = np.where(np.isnan(error), np.inf, error - bound)
        else:
            wrong = got != expected
        if not wrong.any():
            return 0, ()
        at = np.unravel_index(int(np.argmax(np.where(wrong, error, -np.inf))), got.shape)
    return int(np.count_nonzero(wrong)), tuple(int(i) for i in at)


def deviation(name: str, got: np.ndarray, expected: np.ndarray, rtol: float, atol: float) -> tuple[bool, str]:
    """(within tolerance?, the largest error and where). A NaN is right only where a NaN is expected."""
    floating = is_floating(got.dtype) or is_floating(expected.dtype)
    wide = expected.astype(np.float64)
    allowed = f"within {rtol:g} |expected| + {atol:g}" if floating else "exactly"
    with np.errstate(invalid="ignore", over="ignore"):
        count, at = worst_element(got, expected, atol + rtol * np.abs(wide), same=True)
        error = np.abs(got.astype(np.float64) - wide)
    if not count:
        largest = np.max(error, initial=0.0, where=np.isfinite(error))
        return True, f"{name} equals the reference {allowed}; largest error {largest:.3g}"
    values = f"{name}{list(at)} = {got[at]}, expected {expected[at]} {allowed}"
    return False, f"{name}: {count} of {got.size} elements differ from the reference; worst {values}"
