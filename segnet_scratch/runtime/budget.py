"""Checks what compiled kernels take of a GPU against what budget.toml accepts: no spills, no stack, but for exceptions
that are named there with their bytes.

A spill is the first sign of a kernel that outgrew its registers: it stays correct, and each use of a spilled value
becomes a trip to memory. No test of results would notice.
"""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from segnet_scratch.errors import ConfigError
from segnet_scratch.runtime.resources import Compilation

SHIPPED = Path(__file__).with_name("budget.toml")


@dataclass(frozen=True)
class Exemption:
    """A spill or stack that is accepted, for one kernel, element type and architecture."""

    kernel: str
    element: str
    architecture: str
    spill: int  # bytes, stores and loads together
    stack: int  # bytes
    reason: str


@dataclass(frozen=True)
class Budget:
    """What compiled kernels may take."""

    nvrtc: str  # "13.5": the version with which the exemptions were measured
    exemptions: tuple[Exemption, ...] = ()

    def check(self, compilations: Sequence[Compilation]) -> list[str]:
        """A line for everything that is not accepted; it names kernel, element type, architecture and bytes."""
        problems = [
            f"{c.file}, {c.element}, {c.architecture}: the compiler warns: {remark}"
            for c in compilations
            for remark in c.remarks
        ]
        exemptions = {(e.kernel, e.element, e.architecture): e for e in self.exemptions}
        for usage in (usage for c in compilations for usage in c.usages):
            what = f"{usage.kernel}, {usage.element}, {usage.architecture}"
            exemption = exemptions.pop((usage.kernel, usage.element, usage.architecture), None)
            spill, stack = (exemption.spill, exemption.stack) if exemption else (0, 0)
            if usage.spill_stores + usage.spill_loads > spill:
                problems.append(
                    f"{what}: {usage.spill_stores} bytes of spill stores and {usage.spill_loads} of spill loads at "
                    f"{usage.registers} registers, {spill} bytes accepted; let a thread hold fewer values, or accept "
                    f"it in {SHIPPED.name}"
                )
            elif usage.stack > stack:
                problems.append(
                    f"{what}: {usage.stack} bytes of stack, {stack} accepted: an array indexed by a variable, or a "
                    f"call that is not inlined; unroll or inline it, or accept it in {SHIPPED.name}"
                )
            elif exemption and usage.spill_stores + usage.spill_loads + usage.stack == 0:
                problems.append(f"{what}: needs its exemption no longer; delete it from {SHIPPED.name}")
        compiled = {c.architecture for c in compilations}
        problems += [
            f"{', '.join(what)}: {SHIPPED.name} exempts it, but there is no such kernel or element type"
            for what in exemptions
            if what[2] in compiled
        ]
        return problems


def read_budget(path: Path = SHIPPED) -> Budget:
    """The budget of a TOML file. ConfigError names what is wrong with it."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        return Budget(table.pop("nvrtc"), tuple(_exemption(path, entry) for entry in table.pop("exempt", ())))
    except (OSError, tomllib.TOMLDecodeError, KeyError) as error:
        raise ConfigError(f"cannot read the budget of the kernels, {path}: {error!r}") from error


def _exemption(path: Path, entry: dict[str, Any]) -> Exemption:
    expected = {field.name: field.type for field in fields(Exemption)}
    if {name: type(value) for name, value in entry.items()} != expected:
        raise ConfigError(
            f"{path.name}: the exemption {entry} is not understood; expected exactly the keys {', '.join(expected)}, "
            "spill and stack in bytes"
        )
    return Exemption(**entry)
