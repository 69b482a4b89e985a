"""`segnet doctor --kernels`: every kernel compiled for every GPU, and what it takes of one, as a table."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from segnet_scratch.errors import CompileError
from segnet_scratch.lab.doctor.findings import Diagnosis, Finding, install_extra
from segnet_scratch.runtime.budget import read_budget
from segnet_scratch.runtime.nvrtc import nvrtc_version, supported_architectures
from segnet_scratch.runtime.occupancy import ARCHITECTURES, max_threads
from segnet_scratch.runtime.resources import Compilation, Usage, compile_all


@dataclass(frozen=True)
class KernelReport:
    """What all kernels take of all GPUs, and what the budget says to it."""

    nvrtc: str
    budget_nvrtc: str  # the version that the budget is for
    compilations: Sequence[Compilation]
    problems: list[str]
    left_out: list[str]  # architectures that this NVRTC does not know

    @property
    def passed(self) -> bool:
        """Is everything within the budget?"""
        return not self.problems

    @property
    def usages(self) -> list[Usage]:
        """By kernel, element type and architecture."""
        order = {architecture: position for position, architecture in enumerate(ARCHITECTURES)}
        every = [usage for compilation in self.compilations for usage in compilation.usages]
        return sorted(every, key=lambda usage: (usage.kernel, usage.element, order[usage.architecture]))

    def lines(self) -> list[tuple[str, str]]:
        """A line for each kernel and element type, then the problems, as (line, style)."""
        usages = self.usages
        architectures = list(dict.fromkeys(usage.architecture for usage in usages))
        columns = "".join(f"{architecture:>8}" for architecture in architectures)
        lines = [(f"{'registers':34}{'':8}{columns}{'shared':>8}{'threads':>8}", "bold")]
        for (kernel, element), group in groupby(usages, key=lambda usage: (usage.kernel, usage.element)):
            row = list(group)
            marks = ["!" if usage.spill_stores + usage.spill_loads + usage.stack else "" for usage in row]
            cells = "".join(f"{f'{usage.registers}{mark}':>8}" for usage, mark in zip(row, marks, strict=True))
            shared, threads = max(usage.shared for usage in row), min(max_threads(usage.registers) for usage in row)
            lines.append((f"{kernel:34}{element:8}{cells}{shared:8}{threads:8}", "bold red" if any(marks) else ""))
        legend = "shared: static bytes for each block; threads: the largest block that the registers allow"
        lines.append((f"{legend}; !: spills, or has a stack", "dim"))
        lines += [(f"{a} is left out: NVRTC {self.nvrtc} does not know it", "yellow") for a in self.left_out]
        lines += [(problem, "bold red") for problem in self.problems]
        if self.problems and self.nvrtc != self.budget_nvrtc:
            lines.append((f"this is NVRTC {self.nvrtc}; the budget is for {self.budget_nvrtc}", "yellow"))
        if not self.problems:
            count = f"{len(usages)} compiled kernels within the budget: no spills, no stack, no warnings"
            lines.append((f"{count} but for those it names (NVRTC {self.nvrtc})", "green"))
        return lines

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        kernels = [{**asdict(usage), "max_threads": max_threads(usage.registers)} for usage in self.usages]
        report = {"passed": self.passed, "nvrtc": self.nvrtc, "problems": self.problems, "left_out": self.left_out}
        return {**report, "kernels": kernels}


def examine_kernels(progress: Callable[[int, int], None] = lambda done, total: None) -> KernelReport | Diagnosis:
    """Compiles all kernels for all architectures, about two minutes on two cores unless the cache has them.

    `progress` is told how many compilations are done of how many. Where NVRTC is missing the result is a Diagnosis
    that says how to get it. CompileError for a kernel that does not compile.
    """
    try:
        nvrtc = "{}.{}".format(*nvrtc_version())
        known = supported_architectures()
    except CompileError as error:
        return Diagnosis([Finding("NVRTC", "missing", str(error), install_extra("nvrtc"))])
    budget = read_budget()
    compilations = compile_all(architectures=[a for a in ARCHITECTURES if a in known], progress=progress)
    left_out = [a for a in ARCHITECTURES if a not in known]
    return KernelReport(nvrtc, budget.nvrtc, compilations, budget.check(compilations), left_out)
