"""Every kernel compiles: for the host device in each build that the other parts need, and for every GPU without one."""

from collections.abc import Iterator, Sequence
from itertools import product
from time import monotonic
from typing import Any

from segnet_scratch.lab.doctor.findings import Diagnosis
from segnet_scratch.lab.doctor.kernels import examine_kernels
from segnet_scratch.lab.proof.launches import device_has
from segnet_scratch.lab.proof.parts.base import Part, Rows, reason_against
from segnet_scratch.lab.proof.parts.same_bits import Sanitizers, Variables
from segnet_scratch.lab.proof.table import ROWS
from segnet_scratch.lab.proof.work import Effort, Tally, Work
from segnet_scratch.runtime.compilation import on_all_cores
from segnet_scratch.runtime.devices import Device
from segnet_scratch.runtime.host import VARIABLES, build, find_compiler
from segnet_scratch.runtime.launch import ElementTypes, Kernel, shipped_kernels
from segnet_scratch.runtime.source import shipped_sources
from segnet_scratch.runtime.workers import worker_count

# What is built of each source and element type: options of runtime.host.build.
BUILDS: dict[str, dict[str, Any]] = {"plain": {}, "sanitized": {"sanitize": True}} | {
    variables: {"variables": variables} for variables in VARIABLES
}


class HostBuilds(Part):
    """Before the other parts, so that no two processes compile the same."""

    name = "host builds"
    proves = "every kernel compiles for the CPU, plain, sanitized, with set variables"
    devices = ("host", "cuda")  # a GPU is compared with the host device

    def works(self, device: str, effort: Effort, seed: int, rows: Rows = ROWS) -> Iterator[Work]:
        unavailable = {"plain": reason_against(find_compiler), "sanitized": Sanitizers().unavailable()}
        unavailable |= dict.fromkeys(VARIABLES, Variables().unavailable())
        kinds = [kind for kind in BUILDS if not unavailable[kind] and (kind == "plain" or device == "host")]
        for kind, source in product(kinds, shipped_sources()):
            # float64 is for gradients; sanitizers and variables see each source in its other types.
            for element in (e for e in source.elements if kind == "plain" or e != "float64"):
                target = f"{source.path.name}, {element}, {kind}"
                yield Work(self.name, "host", target, seed=seed, effort=effort)

    def problems(self, work: Work, device: Device, tally: Tally) -> Iterator[str]:
        file, element, kind = work.target.split(", ")
        source = next(source for source in shipped_sources() if source.path.name == file)
        if reason := reason_against(lambda: build(source, ElementTypes.named(element), **BUILDS[kind])):
            yield reason
        tally.counts["libraries"] += 1


class CudaBuilds(Part):
    """On all cores, before anything waits for a kernel."""

    name = "cuda builds"
    proves = "every kernel compiles for this GPU"
    devices = ("cuda",)
    long = True

    def targets(self, rows: Rows) -> Sequence[str]:
        return ["every kernel"]

    def problems(self, work: Work, device: Device, tally: Tally) -> Iterator[str]:
        def build(what: tuple[Kernel, ElementTypes]) -> str:
            return reason_against(lambda: device.compile(*what))

        found = {
            (kernel.source.path.name, element): (kernel, ElementTypes.named(element))
            for kernel in shipped_kernels().values()
            for element in kernel.source.elements
            if device_has(device, kernel.name)
        }
        began, reasons = monotonic(), on_all_cores(build, list(found.values()))
        tally.counts["modules"] = len(found)
        tally.notes.append(f"{monotonic() - began:.0f} s on {worker_count()} cores")
        for target, reason in zip(found, reasons, strict=True):
            if reason:
                yield f"{', '.join(target)}: {reason}"


class GpuBuilds(Part):
    """What `segnet doctor --kernels` does: every kernel, element type and architecture, held against the budget."""

    name = "gpu builds"
    proves = "every kernel compiles for sm_75 to sm_120 within the budget of registers and stack"
    devices = ("any",)
    long = True

    def problems(self, work: Work, device: Device, tally: Tally) -> Iterator[str]:
        report = examine_kernels()
        if isinstance(report, Diagnosis):
            (finding,) = report.findings
            tally.skipped = f"{finding.text}; {finding.fix}"
            return
        architectures = {usage.architecture for usage in report.usages}
        tally.counts.update({"compiled kernels": len(report.usages), "architectures": len(architectures)})
        if report.left_out:
            tally.skipped = f"{', '.join(report.left_out)}: NVRTC {report.nvrtc} does not know them"
        yield from (f"NVRTC {report.nvrtc}: {problem}" for problem in report.problems)
