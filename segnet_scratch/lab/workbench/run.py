"""Runs one kernel by itself and checks it: behind `segnet run` and `segnet_scratch.lab.workbench.run_kernel`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from segnet_scratch.errors import ConfigError
from segnet_scratch.lab.workbench.checks import check_memory
from segnet_scratch.lab.workbench.execution import Executor, Outcome
from segnet_scratch.lab.workbench.guards import FIRST, SECOND
from segnet_scratch.lab.workbench.races import find_race
from segnet_scratch.lab.workbench.reference import Reference, deviation, expected_outputs, load_reference
from segnet_scratch.lab.workbench.result import Check, KernelRun
from segnet_scratch.lab.workbench.sanitizers import find_memory_errors
from segnet_scratch.lab.workbench.setup import Contents, Setup, load_kernel, make_setup
from segnet_scratch.runtime.devices import Device, get_device
from segnet_scratch.runtime.launch import ElementTypes, Kernel

TOLERANCE = {"float32": 1e-5, "float64": 1e-12}  # both relative and absolute, unless given


def run_kernel(
    kernel: str | Path | Kernel,
    *,
    shapes: Mapping[str, Sequence[int] | int] | None = None,
    arguments: Mapping[str, int | float] | None = None,
    inputs: Mapping[str, Contents] | None = None,
    device: str | Device = "host",
    grid: Sequence[int] | int | None = None,
    block: Sequence[int] | int | None = None,
    shared: int = 0,
    dtype: DTypeLike = np.float32,
    seed: int = 0,
    reference: Reference | str | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    orders: int | None = None,
    sanitize: bool = False,
) -> KernelRun:
    """Runs a shipped kernel (its name) or one of a file (`file.cu`, `file.cu:name`) and checks it.

    `shapes` are those of arrays and `arguments` the scalars, by name; what a shape comment connects need be given only
    once. Const pointers are inputs with seeded random contents (normal; integers 0 to 3), the others outputs that hold
    a pattern first. `inputs` gives an array other contents: an array, a number, "random", or None for a null pointer;
    an output named there is one that the kernel also reads. `grid` and `block` follow from the source unless given
    (see runtime/geometry.py); `shared` is dynamic shared memory in bytes; `dtype` is that of storage_t.

    `reference` (a function, or "file.py:function") takes inputs and scalars by name and returns the outputs: an array,
    a tuple in the order of the signature, or a dict. An error of more than `atol` + `rtol` |expected| fails.
    `orders` runs the kernel in ascending, descending and so many shuffled orders of threads and blocks, `sanitize` with
    AddressSanitizer and UndefinedBehaviorSanitizer; both on the host device.

    A check that fails is in the result. Errors are raised for what cannot be run: ConfigError for wrong or missing
    settings, CompileError, and what the launch gate raises.
    """
    chosen = get_device(device)
    if chosen.name != "host" and (sanitize or orders is not None):
        raise ConfigError(f"orders and sanitizers work on the host device, not on {chosen.name}")
    if orders is not None and orders < 0:
        raise ConfigError(f"orders is {orders}; expected the number of shuffled orders, 0 or more")
    types = ElementTypes.of(np.dtype(dtype))
    setup = make_setup(
        load_kernel(kernel), types, shapes or {}, arguments or {}, inputs or {}, grid, block, shared, seed
    )
    function = load_reference(reference) if isinstance(reference, str) else reference
    executor = Executor(setup, chosen)
    checks: list[Check] = []
    if sanitize:
        errors = find_memory_errors(setup)
        checks.append(Check("sanitizers", not errors, "\n".join(errors) or "nothing to report"))
    first, second = executor.run(FIRST), executor.run(SECOND)
    checks += check_memory(executor, first, second)
    if first.fault is None and second.fault is None:
        if function is not None:
            checks += _check_reference(setup, first, function, rtol, atol)
        if orders is not None:
            race = find_race(executor, orders)
            same = f"the same bits in ascending, descending and {orders} shuffled orders of threads and blocks"
            checks.append(Check("orders", race is None, race or same))
    return KernelRun(setup, chosen.name, first.arrays, min(first.seconds, second.seconds), tuple(checks))


def _check_reference(
    setup: Setup, outcome: Outcome, function: Reference, rtol: float | None, atol: float | None
) -> list[Check]:
    checks = []
    for name, expected in expected_outputs(function, setup).items():
        got = outcome.array(name).reshape(expected.shape)
        default = TOLERANCE.get(got.dtype.name, 0.0)
        limits = default if rtol is None else rtol, default if atol is None else atol
        checks.append(Check("reference", *deviation(name, got, expected, *limits)))
    return checks
