"""What came of running a kernel by itself."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from segnet_scratch.lab.workbench.setup import Setup


@dataclass(frozen=True)
class Check:
    """One property of the run: did it hold, and what was seen."""

    name: str
    passed: bool
    message: str


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
        return {
            "kernel": s.kernel.name,
            "file": str(s.kernel.source.path),
            "device": self.device,
            "type": s.types.storage.name,
            "grid": s.grid,
            "block": s.block,
            "shared": s.shared,
            "scalars": s.scalars,
            "seconds": self.seconds,
            "passed": self.passed,
            "arrays": self.statistics(),
            "checks": [{"name": c.name, "passed": c.passed, "message": c.message} for c in self.checks],
        }

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
