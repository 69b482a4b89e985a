"""AddressSanitizer and UndefinedBehaviorSanitizer have nothing to report.

This runs in a process that has the sanitizer's library preloaded (see lab/proof/processes.py). The first report ends
that process; whoever started it reads what it wrote to stderr.
"""

from segnet_scratch.lab.proof.compare import run_guarded
from segnet_scratch.lab.proof.parts.base import CaseRun, RowPart, reason_against
from segnet_scratch.lab.proof.work import Effort
from segnet_scratch.runtime.devices import HostDevice
from segnet_scratch.runtime.host import sanitizer_runtime


class Sanitizers(RowPart):
    """Guard zones are out of bounds here, so that a read of them is reported as well."""

    name = "sanitizers"
    proves = "no report by AddressSanitizer and UBSan, same bits as without"
    devices = ("host",)
    sanitized = True

    def unavailable(self) -> str:
        return reason_against(sanitizer_runtime)

    def random(self, effort: Effort) -> int:
        return effort.sanitized

    def prove_case(self, run: CaseRun) -> None:
        device = run.device
        assert isinstance(device, HostDevice)
        op, inputs = run.op_and_inputs()
        sanitized = run_guarded(op, inputs, device)
        array = sanitized.unlike(run_guarded(op, inputs, device.with_options(sanitize=False)))
        if array is not None:
            run.fail("sanitized build", f"{array}: other bits than in the usual build")
