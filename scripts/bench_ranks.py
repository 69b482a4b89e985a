"""Training by several ranks of the numpy device against one process with as many threads, on the cores of this machine.

    python scripts/bench_ranks.py [--ranks 2] [--size 224] [--batch 2] [--width 0.5] [--rounds 3]

Both make the same steps of the same global batch. They take turns, round by round, and the best round of each counts;
the ratio above 1 says that ranks are faster.
"""

import argparse
import json
import os
import subprocess
import sys
from time import perf_counter

import numpy as np

from segnet_scratch.parallel import world
from segnet_scratch.parallel.communicator import shares
from segnet_scratch.parallel.launch import mpirun
from segnet_scratch.segnet import SegNet
from segnet_scratch.step import TrainingStep

STEPS = 3


def rank(options: argparse.Namespace) -> None:
    """Seconds of each of STEPS steps, after one that is not counted; printed by the first rank."""
    ranks, rng = world(), np.random.default_rng(0)
    own = int(shares(options.batch, ranks.size)[ranks.rank])
    step = TrainingStep(SegNet(21, options.width, "numpy"), ranks=ranks)
    images = rng.standard_normal((own, options.size, options.size, 3)).astype(np.float32)
    labels = rng.integers(0, 21, images.shape[:3]).astype(np.uint8)
    seconds = []
    for number in range(STEPS + 1):
        ranks.all_gather(None)
        began = perf_counter()
        step(images, labels, 1e-3, number)
        ranks.all_gather(None)
        seconds.append(perf_counter() - began)
    if ranks.leads:
        print(json.dumps(min(seconds[1:])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("ranks", 2), ("size", 224), ("batch", 2), ("width", 0.5), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        rank(options)
        return
    command = [sys.executable, __file__, "--rank", *sys.argv[1:]]
    environment = os.environ | {"SEGNET_THREADS": str(options.ranks)}

    def best(start: list[str], threads: int) -> float:
        environment["SEGNET_THREADS"] = str(threads)
        return float(json.loads(subprocess.run([*start, *command], env=environment, check=True, stdout=-1).stdout))

    launcher = [mpirun() or "mpirun", "-n", str(options.ranks)]
    rounds = [(best([], options.ranks), best(launcher, 1)) for _ in range(options.rounds)]
    one, several = (min(times) for times in zip(*rounds, strict=True))
    print(f"SegNet, width {options.width:g}, {options.batch} images of {options.size}x{options.size}, numpy device")
    print(f"1 process, {options.ranks} threads: {one:.3f} s a step, {options.batch / one:.2f} images/s")
    print(f"{options.ranks} ranks, 1 thread each: {several:.3f} s a step, {options.batch / several:.2f} images/s")
    print(f"ratio {one / several:.2f}")


if __name__ == "__main__":
    main()
