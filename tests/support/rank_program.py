"""What each rank of a test runs: trainings one after the other, some of them with a fault at a step of one rank.

    mpirun -n 2 python rank_program.py jobs.json    [{"data": ..., "out": ..., "settings": {...}, "faults": {...}}, ...]

A fault is {"kill": [rank, step]}, "terminate", "full" (disk), "nan", "raise" before the step, "break" in it.
"""

import json
import os
import resource
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from segnet_scratch.config import Config
from segnet_scratch.errors import SegnetError
from segnet_scratch.parallel import PeerError, world
from segnet_scratch.train import Trainer

TINY = {"model": "segnet-basic", "width": 1 / 16, "size": 32, "lr": 0.02, "workers": 0, "sync_bn": True}


class FaultyTrainer(Trainer):
    """Something goes wrong before, or in, a step."""

    def __init__(self, faults, *arguments, **options):
        self.faults = faults
        super().__init__(*arguments, **options)

    def _begin_step(self, batch):
        due = {fault for fault, place in self.faults.items() if place == [self.ranks.rank, self._issued]}
        if "kill" in due:
            os.kill(os.getpid(), signal.SIGKILL)
        if "terminate" in due:
            os.kill(os.getpid(), signal.SIGTERM)
        if "full" in due:  # no file grows beyond what the log has
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.log.path.stat().st_size, resource.RLIM_INFINITY))
        if "raise" in due:
            raise RuntimeError("nobody thought of this")
        if "break" in due:  # while the others wait for this rank's gradients
            self.training._pass.run = None
        super()._begin_step(batch)

    def _batches(self, step):
        for number, batch in enumerate(super()._batches(step), step):
            bad = self.faults.get("nan") == [self.ranks.rank, number]
            yield replace(batch, images=np.full_like(batch.images, np.nan)) if bad else batch


def main(jobs):
    with world().guarded():
        if world().leads:
            print(*world().members, sep="\n", flush=True)
        for job in jobs:
            config = Config(**TINY | job["settings"])
            options = {"resume": job.get("resume", False), "ranks": world()}
            trainer = FaultyTrainer(job.get("faults", {}), config, job["data"], job["out"], "numpy", **options)
            finished = trainer.run()
            held = [*trainer.model.parameters(), *trainer.model.named_buffers().values()]
            assert len(set(world().all_gather(b"".join(array.data.tobytes() for array in held)))) == 1, "ranks differ"
    if world().leads:
        print("finished" if finished else f"stopped at step {trainer.step}")


if __name__ == "__main__":
    try:
        main(json.loads(Path(sys.argv[1]).read_text()))
    except PeerError:
        sys.exit(1)
    except SegnetError as error:
        sys.exit(f"error: {world().label}{error}")
