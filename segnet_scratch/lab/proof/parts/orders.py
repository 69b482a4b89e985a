"""The same bits in every order of threads and blocks: a kernel whose result depends on it has a race."""

from segnet_scratch.lab.proof.compare import run_guarded
from segnet_scratch.lab.proof.parts.base import CaseRun, RowPart, blame
from segnet_scratch.lab.proof.work import Effort
from segnet_scratch.runtime.devices import HostDevice


class Orders(RowPart):
    """Ascending, descending and shuffled, on one and two workers; a barrier that not all threads reach is an error."""

    name = "orders"
    proves = "same bits in every order of threads and blocks; every barrier reached by all threads"
    devices = ("host",)

    def random(self, effort: Effort) -> int:
        return effort.ordered

    def prove_case(self, run: CaseRun) -> None:
        device = run.device
        assert isinstance(device, HostDevice)
        op, inputs = run.op_and_inputs()
        first = run_guarded(op, inputs, device)
        shuffles = [("shuffled", seed, 1 + seed % 2) for seed in range(1, run.work.effort.shuffles + 1)]
        # The first order again, by two workers: which of them is first changes from run to run.
        for order, seed, workers in [("ascending", 0, 2), ("descending", 0, 1), *shuffles]:
            name = f"{order} order{f' (seed {seed})' if seed else ''}, {workers} worker{'s' if workers > 1 else ''}"
            run.tally.counts["runs in other orders"] += 1
            with run.attempt(name):
                other = run_guarded(op, inputs, device.with_options(order=order, seed=seed, workers=workers))
                array = first.unlike(other)
                if array is not None:
                    culprit = "" if run.tally.failures else blame(op, inputs, device, None, run.work.effort.shuffles)
                    run.fail(name, f"{array}: other bits than in ascending order of threads and blocks{culprit}")
