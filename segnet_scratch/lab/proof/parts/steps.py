"""Training steps: again, and as they are made on a GPU: on other devices, as graphs, by the fused engine, with uploads.

Where there is no GPU the same runs at smaller sizes, so that the proof itself can be tried.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from segnet_scratch.config import Config
from segnet_scratch.inference_step import InferenceStep
from segnet_scratch.lab.proof.parts.base import Part, Rows, reason_against
from segnet_scratch.lab.proof.work import Tally, Work
from segnet_scratch.parallel.communicator import ALONE, Communicator, Value
from segnet_scratch.parallel.mpi import NcclCollectives, new_identity
from segnet_scratch.runtime.devices import Device, get_device, nccl_library
from segnet_scratch.runtime.host import find_compiler
from segnet_scratch.segnet import SegNet, SegNetBasic
from segnet_scratch.step import TrainingStep, resolve

CLASSES, LR = 21, 1e-3
OTHER_DEVICES_LIMIT = 1e-9
# SegNet-Basic, since SegNet in float32 parts from itself (docs/explanation/numerics.md).
ENGINE_LIMITS = {"float32": 1e-4, "tf32": 2e-2, "bf16": 5e-2}
LOGITS_LIMIT = 1e-4


class Steps:
    """A network, its training step, and batches of noise that depend on nothing but their number."""

    def __init__(self, model: SegNet, batch: int, size: tuple[int, int], **options: Any) -> None:
        self.model, self.device, self.shape = model, model.device, (batch, *size)
        self.step = TrainingStep(model, settings=Config(seed=7), **options)

    def data(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels of step `number`."""
        rng = np.random.default_rng([3, number])
        images = rng.standard_normal((*self.shape, 3), np.float32).astype(self.model.dtype, copy=False)
        return images, rng.integers(0, self.model.classes, self.shape, np.uint8)

    def loss(self) -> float:
        """Of the last step; waits for it."""
        return self.step.read().get()[0]

    def losses(self, count: int) -> np.ndarray:
        """Of so many steps from the first on."""
        return np.array([self.make(number, self.step.run)[0] for number in range(count)])

    def learned(self, count: int) -> tuple[list[float], str]:
        """(losses, hash of everything that has been learned) after so many steps."""
        return self.losses(count).tolist(), hash_of(self.model.state_dict() | self.step.optimiser.state_dict())

    def make(self, number: int, step: Callable[[], object]) -> tuple[float, float]:
        """(loss, seconds) of step `number`, made in this way."""
        self.step.write(*self.data(number), LR, number)
        seconds = _seconds(self.device, step)
        return self.loss(), seconds


def hash_of(arrays: dict[str, np.ndarray]) -> str:
    """Of names, shapes, types and every bit."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.shape} {array.dtype}".encode() + array.tobytes())
    return digest.hexdigest()


class Training(Part):
    """Runs of a small SegNet from the same seed: forward, backward, update; a hash of all it has learned."""

    name = "training"
    long = True
    proves = "training gives the same bits again"

    def targets(self, rows: Rows) -> Sequence[str]:
        return ["SegNet"]

    def problems(self, work: Work, device: Device, tally: Tally) -> Iterator[str]:
        count, runs = work.effort.steps, range(work.effort.runs)
        models = (SegNet(5, 1 / 16, device, dropout=True, seed=work.seed) for _ in runs)
        hashes = {Steps(model, 2, (32, 32)).learned(count)[1] for model in models}
        tally.counts.update({"runs": len(runs), "steps each": count})
        if len(hashes) > 1:
            yield f"{len(hashes)} hashes in {len(runs)} runs of {count} steps at 32x32, width 1/16: {sorted(hashes)}"


class OtherDevices(Part):
    """A narrow SegNet in float64."""

    name = "devices"
    proves = "training gives the losses of the other devices"
    devices = ("cuda",)

    def problems(self, work: Work, device: Device, tally: Tally) -> Iterator[str]:
        def losses(device: Device) -> np.ndarray:
            model = SegNet(11, 1 / 8, device, seed=1, dtype=np.float64)
            return Steps(model, 2, (48, 48)).losses(20 if device.gpu else 5)

        ours = losses(device)
        tally.counts["steps"] = len(ours)
        for other in ("numpy", "host") if device.gpu and not reason_against(find_compiler) else ("numpy",):
            difference = float(np.abs(ours - losses(get_device(other))[: len(ours)]).max())
            tally.notes.append(f"{difference:.1e} from {other}")
            if not difference <= OTHER_DEVICES_LIMIT:
                yield f"losses lie {difference} from those of {other}; expected at most {OTHER_DEVICES_LIMIT}"


class Graphs(Part):
    """The same steps one by one and as a replayed graph; with dropout, whose state lies on the device."""

    name = "graphs"
    proves = "replayed training steps give the bits of steps made one by one"
    devices = ("cuda",)
    measures = True

    def problems(self, work: Work, device: Device, tally: Tally) -> Iterator[str]:
        size, width, replays = (64, 1 / 4, 20) if device.gpu else (32, 1 / 16, 2)
        models = [SegNet(CLASSES, width, device, dropout=True, seed=1) for _ in range(2)]
        steps = [Steps(model, 1, (size, size)) for model in models]
        ways = list(zip(steps, (steps[0].step.run_eagerly, steps[1].step.run), strict=True))
        made = np.array([[of.make(number, way) for of, way in ways] for number in range(1 + replays)])
        (eager, replayed), seconds = made[..., 0].T.tolist(), np.median(made[1:, :, 1], 0)  # the first is no replay
        tally.counts["replays"] = replays
        ms = [f"{way} {1000 * taken:.2f} ms" for way, taken in zip(("one by one", "replayed"), seconds, strict=True)]
        tally.notes.append(f"batch 1 at {size}x{size}: {', '.join(ms)}")
        if eager != replayed or not all(np.isfinite(eager)):
            yield f"losses one by one {eager}, replayed {replayed}"
        if len({hash_of(model.state_dict()) for model in models}) > 1:
            yield "the weights differ"


class Engine(Part):
    """SegNet-Basic by both engines, each precision twice; on a GPU all steps but the first come from a graph."""

    name = "engine"
    proves = "the fused engine gives the layers' losses and logits, and the same bits again"
    devices = ("cuda",)

    def problems(self, work: Work, device: Device, tally: Tally) -> Iterator[str]:
        size, width, count = ((96, 130), 1.0, 20) if device.gpu else ((16, 24), 1 / 8, 2)

        def losses(engine: str, precision: str) -> np.ndarray:
            model = SegNetBasic(CLASSES, width, device, seed=1)
            return Steps(model, 2, size, engine=engine, precision=precision).losses(count)

        layers = losses("layers", "float32")
        for precision, limit in ENGINE_LIMITS.items():
            first, second = losses("fused", precision), losses("fused", precision)
            difference = float(np.abs(first - layers).max() / np.abs(layers).max())
            tally.counts["steps"] += 2 * count
            tally.notes.append(f"{precision} losses {difference:.1e} from the layers'")
            if not difference <= limit:
                yield f"{precision}: losses lie {difference:.1e} from the layers', relative; expected at most {limit}"
            if not np.array_equal(first, second):
                yield f"{precision}: a second run has other losses"
        difference = self._logits(SegNetBasic(CLASSES, width, device, seed=1).eval(), size)
        tally.notes.append(f"logits {difference:.1e}")
        if not difference <= LOGITS_LIMIT:
            yield f"inference: logits lie {difference:.1e} from the layers', relative; expected at most {LOGITS_LIMIT}"

    def _logits(self, model: SegNet, size: tuple[int, int]) -> float:
        """The largest difference of the fused logits from the layers', relative to the largest logit."""
        images = np.random.default_rng(5).standard_normal((2, *size, 3), np.float32)
        steps = InferenceStep(model), InferenceStep(model, "fused", "float32")
        for _ in range(2):  # the second from the graph
            expected, logits = (model.device.download(step(images))[..., :CLASSES] for step in steps)
        return float(np.abs(logits - expected).max() / np.abs(expected).max())


class Uploads(Part):
    """Batches uploaded before each step, prefetched beside the step before, and lying on the device already."""

    name = "uploads"
    proves = "batches that are uploaded beside compute give the same losses"
    devices = ("cuda",)
    measures = True

    def problems(self, work: Work, device: Device, tally: Tally) -> Iterator[str]:
        batch, size, count, rounds = (32, 224, 20, 4) if device.gpu else (1, 32, 2, 2)
        names = ("uploaded", "prefetched", "resident")
        models = [SegNet(CLASSES, 1 / 16, device, seed=1) for _ in names]
        steps = {name: Steps(model, batch, (size, size)) for name, model in zip(names, models, strict=True)}
        data = [steps["uploaded"].data(number) for number in range(count)]
        resident = [device.upload(array) for array in data[0]]
        sources: dict[str, Callable[[], Iterator[Any]]] = {
            "uploaded": lambda: ([device.upload(array) for array in item] for item in data),
            "prefetched": lambda: (arrays for _, arrays in device.prefetch(iter(data), lambda item: item)),
            "resident": lambda: (resident for _ in data),
        }
        losses: dict[str, list[float]] = {name: [] for name in steps}
        seconds: dict[str, list[float]] = {name: [] for name in steps}

        def train(name: str) -> None:
            for images, labels in sources[name]():
                steps[name].step(images, labels, LR)
                losses[name].append(steps[name].loss())

        for _, name in product(range(rounds), sources):
            seconds[name].append(_seconds(device, partial(train, name)) / count)
        tally.counts["steps"] = rounds * count
        megabytes = sum(array.nbytes for array in data[0]) / 1e6
        # The first round loads kernels.
        ms = [f"{name} {1000 * median(values[1:]):.2f} ms" for name, values in seconds.items()]
        tally.notes.append(f"{megabytes:.1f} MB a step: {', '.join(ms)}")
        if losses["uploaded"] != losses["prefetched"] or not all(np.isfinite(losses["uploaded"])):
            yield f"losses uploaded {losses['uploaded']}, prefetched {losses['prefetched']}"


class Timing(Part):
    """Nothing to pass: scripts/bench_vs_torch.py compares with PyTorch."""

    name = "timing"
    proves = "how long a training step takes"
    devices = ("cuda",)
    measures = True

    def problems(self, work: Work, device: Device, tally: Tally) -> Iterator[str]:
        batch, size, width, count = (4, 224, 1.0, 20) if device.gpu else (1, 32, 1 / 8, 2)
        ways = ("layers", "float32"), resolve(SegNet(CLASSES, width, device), "auto", "auto")
        for engine, precision in dict.fromkeys(ways):
            model = SegNet(CLASSES, width, device, seed=1)
            steps = Steps(model, batch, (size, size), engine=engine, precision=precision)
            steps.losses(3)
            ms = 1000 * median(_seconds(device, steps.step.run) for _ in range(count))
            tally.counts["steps"] += count
            tally.notes.append(f"{engine} in {precision}, batch {batch} at {size}x{size}: {ms:.1f} ms")
        yield from ()


class _WithNobody(Communicator):
    """Rank 0 of two, of which the other has nothing but void: NCCL is given this one alone."""

    size = 2

    def __init__(self) -> None:
        self.collectives = NcclCollectives(new_identity(), 0, 1)

    def all_gather(self, value: Value) -> list[Value]:
        return [value, type(value)()]


class Nccl(Part):
    """Gradients through NCCL in buckets beside backward, in steps of both engines and in their graphs."""

    name = "nccl"
    proves = "sums by NCCL, with one rank, leave a training step's bits; in a graph, too"
    devices = ("cuda",)

    def unavailable(self) -> str:
        return reason_against(nccl_library)

    def problems(self, work: Work, device: Device, tally: Tally) -> Iterator[str]:
        ranks = _WithNobody()
        values = np.arange(6.0, dtype=np.float32).reshape(2, 3)
        gathered = device.download(ranks.collectives.all_gather(device, device.upload(values)))
        if gathered.shape != (1, 2, 3) or not np.array_equal(gathered[0], values):
            yield f"gathered from one rank: {gathered}"

        for engine in ("layers", "fused"):
            models = {of: SegNetBasic(CLASSES, 1 / 8, device, seed=1) for of in (ALONE, ranks)}
            steps = (Steps(model, 1, (32, 32), engine=engine, ranks=of) for of, model in models.items())
            plain, through = (of_rank.learned(3) for of_rank in steps)
            tally.counts["steps"] += len(plain[0])
            if plain != through:
                yield f"{engine}: losses and weights {plain}, through NCCL {through}"


def _seconds(device: Device, work: Callable[[], object]) -> float:
    device.synchronise()
    began = perf_counter()
    work()
    device.synchronise()
    return perf_counter() - began
