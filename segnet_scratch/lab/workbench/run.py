"""Runs one kernel by itself and checks it: behind `segnet run` and `segnet_scratch.lab.workbench.run_kernel`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from segnet_scratch.errors import ConfigError
from segnet_scratch.lab.workbench.checks import Check, check, check_memory, check_variables
from segnet_scratch.lab.workbench.execution import Executor
from segnet_scratch.lab.workbench.guards import FIRST, SECOND
from segnet_scratch.lab.workbench.races import find_race
from segnet_scratch.lab.workbench.reference import Reference, deviation, expected_outputs, load_reference
from segnet_scratch.lab.workbench.sanitizers import find_memory_errors
from segnet_scratch.lab.workbench.setup import Contents, Setup, Size, load_kernel, make_setup
from segnet_scratch.runtime.devices import Device, get_device
from segnet_scratch.runtime.launch import ElementTypes, Kernel

TOLERANCE = {"float32": 1e-5, "float64": 1e-12}  # both relative and absolute, unless given


@dataclass(frozen=True)
class KernelRun:
    """A run with its arrays and the verdicts on it."""

    setup: Setup
    device: str
    arrays: dict[str, np.ndarray | None]  # all of them, after the run; None for a null pointer
    seconds: float  # of the faster of two runs
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Did every check hold?"""
        return all(check.passed for check in self.checks)

    @property
    def outputs(self) -> dict[str, np.ndarray]:
        """The arrays that the kernel writes."""
        return self._present("output", "updated")

    def save(self, folder: Path) -> list[Path]:
        """Writes every array as NAME.npy."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for name, array in self._present("input", "updated", "output").items():
            paths.append(folder / f"{name}.npy")
            np.save(paths[-1], array)
        return paths

    def to_json(self) -> dict[str, Any]:
        """The result for programs to read; numbers that are not finite are null."""
        s = self.setup
        kernel = {"kernel": s.kernel.name, "file": str(s.kernel.source.path), "device": self.device}
        launch = {"type": s.types.storage.name, "grid": s.grid, "block": s.block, "shared": s.shared}
        result = {"scalars": s.scalars, "seconds": self.seconds, "passed": self.passed, "arrays": self.statistics()}
        return {**kernel, **launch, **result, "checks": [asdict(check) for check in self.checks]}

    def statistics(self) -> list[dict[str, Any]]:
        """Of each array: name, role, dtype, shape, min, max and mean of the finite values, number of NaN."""
        return [
            {"name": name, "role": self.setup.role(name), "dtype": self.setup.dtype(name).name, **_statistics(array)}
            for name, array in self.arrays.items()
        ]

    def _present(self, *roles: str) -> dict[str, np.ndarray]:
        arrays = {name: self.arrays[name] for name in self.setup.of_role(*roles)}
        return {name: array for name, array in arrays.items() if array is not None}


def _statistics(array: np.ndarray | None) -> dict[str, Any]:
    if array is None:
        return {"shape": None, "min": None, "max": None, "mean": None, "nan": 0}
    finite = array[np.isfinite(array)].astype(np.float64 if array.dtype.kind == "f" else array.dtype)
    low, high, mean = (f(finite).item() if finite.size else None for f in (np.min, np.max, np.mean))
    return {"shape": array.shape, "min": low, "max": high, "mean": mean, "nan": int(np.isnan(array).sum())}


def run_kernel(
    kernel: str | Path | Kernel,
    *,
    shapes: Mapping[str, Size] | None = None,
    arguments: Mapping[str, int | float] | None = None,
    inputs: Mapping[str, Contents] | None = None,
    device: str | Device = "host",
    grid: Size | None = None,
    block: Size | None = None,
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
    On the host device the order of threads and blocks is reversed once; `orders` also runs so many shuffled orders and
    names threads that disturb each other. `sanitize` runs the kernel with AddressSanitizer and
    UndefinedBehaviorSanitizer, and with automatic variables that hold zeros or a pattern before they get a value.

    A check that fails is in the result. Errors are raised for what cannot be run: ConfigError for wrong or missing
    settings, CompileError, and what the launch gate raises.
    """
    chosen = get_device(device)
    if chosen.name != "host" and (sanitize or orders is not None):
        raise ConfigError(f"orders and sanitizers work on the host device, not on {chosen.name}")
    if orders is not None and orders < 0:
        raise ConfigError(f"orders is {orders}; expected the number of shuffled orders, 0 or more")
    types, loaded = ElementTypes.of(np.dtype(dtype)), load_kernel(kernel)
    setup = make_setup(loaded, types, shapes or {}, arguments or {}, inputs or {}, grid, block, shared, seed)
    function = load_reference(reference) if isinstance(reference, str) else reference
    executor = Executor(setup, chosen)
    checks: list[Check] = []
    if sanitize:
        checks.append(check("sanitizers", find_memory_errors(setup), "nothing to report"))
        checks += check_variables(executor)
    first, second = executor.run(FIRST), executor.run(SECOND)
    finished = first.fault is None and second.fault is None
    expected = expected_outputs(function, setup) if function is not None and finished else {}
    checks += check_memory(executor, first, second, expected)
    for name, wanted in expected.items():
        got = first.array(name).reshape(wanted.shape)
        limits = (TOLERANCE.get(got.dtype.name, 0.0) if given is None else given for given in (rtol, atol))
        checks.append(Check("reference", *deviation(name, got, wanted, *limits)))
    if finished and chosen.name == "host":
        which, more = ("", "; --orders 6 (orders=6) looks closer") if orders is None else (f", {orders} shuffled", "")
        race = find_race(executor, first, orders)
        same = f"the same bits in ascending and descending{which} order of threads and blocks{more}"
        checks.append(check("orders", [race] * bool(race), same))
    return KernelRun(setup, chosen.name, first.arrays, min(first.seconds, second.seconds), tuple(checks))
