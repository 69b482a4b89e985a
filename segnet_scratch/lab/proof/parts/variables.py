"""No variable is read before it has a value: two builds, whose automatic variables hold zeros or a pattern at first."""

import numpy as np

from segnet_scratch.lab.proof.compare import Problem, run_guarded
from segnet_scratch.lab.proof.parts.base import CaseRun, RowPart, blame, reason_against
from segnet_scratch.lab.proof.work import Effort
from segnet_scratch.runtime.devices import HostDevice
from segnet_scratch.runtime.host import VARIABLES, variable_flags


class Variables(RowPart):
    """Both builds, and the usual one, must give the same bits."""

    name = "variables"
    proves = "same bits whatever automatic variables hold before they get a value"
    devices = ("host",)

    def unavailable(self) -> str:
        return reason_against(lambda: variable_flags(VARIABLES[0]))

    def random(self, effort: Effort) -> int:
        return effort.variables

    def prove_case(self, run: CaseRun) -> None:
        device = run.device
        assert isinstance(device, HostDevice)
        op, inputs = run.op_and_inputs()
        usual = run_guarded(op, inputs, device)
        for variables in VARIABLES:
            other = run_guarded(op, inputs, device.with_options(variables=variables))
            run.tally.counts["runs of other builds"] += 1
            array = usual.unlike(other)
            if array is not None:
                where = _first_difference(usual.outputs[array], other.outputs[array])
                problem = Problem(
                    array, f"{array}{list(where)} depends on a variable that is read before it is set", where
                )
                culprit = "" if run.tally.failures else blame(op, inputs, device, problem)
                run.fail(f"automatic variables: {variables}", f"{problem}{culprit}")


def _first_difference(a: np.ndarray, b: np.ndarray) -> tuple[int, ...]:
    unlike = (a.reshape(-1, 1).view(np.uint8) != b.reshape(-1, 1).view(np.uint8)).any(axis=1)
    return tuple(int(i) for i in np.unravel_index(int(unlike.argmax()), a.shape))
