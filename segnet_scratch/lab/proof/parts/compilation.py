"""Every kernel compiles: for the host device in each build that the other parts need, and for every GPU without one."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

from segnet_scratch.errors import CompileError
from segnet_scratch.lab.doctor.findings import Diagnosis
from segnet_scratch.lab.doctor.kernels import examine_kernels
from segnet_scratch.lab.proof.parts.base import Part
from segnet_scratch.lab.proof.parts.sanitizers import Sanitizers
from segnet_scratch.lab.proof.parts.variables import Variables
from segnet_scratch.lab.proof.table import ROWS
from segnet_scratch.lab.proof.work import Effort, Tally, Work
from segnet_scratch.ops.cases import Row
from segnet_scratch.runtime.host import VARIABLES, build
from segnet_scratch.runtime.launch import ElementTypes
from segnet_scratch.runtime.source import Source, shipped_sources

# What is built of each source and element type.
BUILDS: dict[str, Callable[[Source, ElementTypes], Path]] = {
    "plain": build,
    "sanitized": functools.partial(build, sanitize=True),
    **{variables: functools.partial(build, variables=variables) for variables in VARIABLES},
}


class HostBuilds(Part):
    """Before the other parts, so that no two processes compile the same."""

    name = "host builds"
    proves = "every kernel compiles for the CPU, plain, sanitized, with set variables"
    devices = ("host",)

    def works(self, device: str, effort: Effort, seed: int, rows: tuple[Row, ...] = ROWS) -> Iterator[Work]:
        unavailable = {"sanitized": Sanitizers().unavailable(), **dict.fromkeys(VARIABLES, Variables().unavailable())}
        for kind in (kind for kind in BUILDS if not unavailable.get(kind)):
            for source in shipped_sources():
                # float64 is for gradients; sanitizers and variables see each source in its other types.
                for element in (e for e in source.elements if kind == "plain" or e != "float64"):
                    target = f"{source.path.name}, {element}, {kind}"
                    yield Work(self.name, device, target, seed=seed, effort=effort)

    def do(self, work: Work) -> Tally:
        tally = Tally()
        file, element, kind = work.target.split(", ")
        source = next(source for source in shipped_sources() if source.path.name == file)
        with tally.attempt(work, work.target, "compiled"):
            BUILDS[kind](source, ElementTypes.named(element))
            tally.counts["libraries"] += 1
        return tally


class GpuBuilds(Part):
    """What `segnet doctor --kernels` does: every kernel, element type and architecture, held against the budget."""

    name = "gpu builds"
    proves = "every kernel compiles for sm_75 to sm_120 within the budget of registers and stack"
    devices = ("any",)
    long = True

    def works(self, device: str, effort: Effort, seed: int, rows: tuple[Row, ...] = ROWS) -> Iterator[Work]:
        if rows is ROWS:
            yield Work(self.name, device, "every kernel", seed=seed, effort=effort)

    def do(self, work: Work) -> Tally:
        tally = Tally()
        try:
            report = examine_kernels()
        except CompileError as error:
            tally.fail(work, work.target, "compiled", error)
            return tally
        if isinstance(report, Diagnosis):
            (finding,) = report.findings
            tally.skipped = f"{finding.text}; {finding.fix}"
            return tally
        for problem in report.problems:
            tally.fail(work, work.target, f"NVRTC {report.nvrtc}", problem)
        architectures = {usage.architecture for usage in report.usages}
        tally.counts.update({"compiled kernels": len(report.usages), "architectures": len(architectures)})
        tally.skipped = (
            f"{', '.join(report.left_out)}: NVRTC {report.nvrtc} does not know them" if report.left_out else ""
        )
        return tally
