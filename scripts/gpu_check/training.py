"""Training: the losses of other devices, the same bits each time, and that it learns."""

import os
import tempfile
from pathlib import Path

import numpy as np

from gpu_check.part import Outcome, Work, judged
from gpu_check.steps import Steps
from segnet_scratch import SegNet, get_device
from segnet_scratch.data import EvalTransform, VOCDataset, write_sample
from segnet_scratch.metrics import Scores, scores
from segnet_scratch.nn.autograd import no_grad
from segnet_scratch.optim import learning_rate
from segnet_scratch.step import TrainingStep

TINY_STEPS, TINY_LIMIT = 20, 1e-9
REPEATED_STEPS, RUNS = 50, 3
PIXELS, MIOU, MOST_STEPS = 0.99, 0.95, 400


def losses_of_other_devices(work: Work) -> Outcome:
    """Twenty steps of a narrow SegNet in float64 on this device, on numpy and on host."""

    def losses(device: str) -> np.ndarray:
        return np.array(Steps(get_device(device), 2, 48, 1 / 8, 11, dtype=np.float64).losses(TINY_STEPS))

    ours = losses(work.device.name)
    others = ("numpy", "host") if work.on_gpu else ("numpy",)
    differences = {name: float(np.abs(ours - losses(name)).max()) for name in others}
    problems = [f"{name}: losses differ by {d}" for name, d in differences.items() if not d <= TINY_LIMIT]
    text = ", ".join(f"{d:.1e} from {name}" for name, d in differences.items())
    return judged(f"losses of {TINY_STEPS} steps: {text}", problems)


def same_run_again(work: Work) -> Outcome:
    """Fifty steps with dropout in float32, three times: equal losses, equal weights."""
    results = []
    steps = REPEATED_STEPS if work.on_gpu else 3
    for _ in range(RUNS):
        run = Steps(work.device, 4, 96, 1 / 4 if work.on_gpu else 1 / 16, dropout=True)
        results.append((run.losses(steps), run.digest()))
    problems = [f"run {i + 1} differs from the first" for i in range(RUNS) if results[i] != results[0]]
    if not all(np.isfinite(results[0][0])):
        problems.append("a loss is not finite")
    return judged(f"{RUNS} runs of {steps} steps, weights {results[0][1]}", problems)


def learning(work: Work) -> Outcome:
    """Overfits four images in evaluation mode: 99 % of pixels, mIoU 0.95. $SEGNET_TEST_DATA has real ones."""
    device = work.device
    with tempfile.TemporaryDirectory() as folder:
        voc = Path(os.environ.get("SEGNET_TEST_DATA", folder)) / "data" / "VOCdevkit" / "VOC2012"
        real = voc.is_dir()
        data = VOCDataset(voc if real else write_sample(Path(folder) / "sample", 4, 1), "train")
        transform, rng = EvalTransform((96, 96)), np.random.default_rng(0)
        pairs = [transform(*data.sample(index)[:2], rng) for index in range(4)]
    images, labels = (np.stack(arrays) for arrays in zip(*pairs, strict=True))
    model = SegNet(data.classes, 1 / 4, device, seed=1)
    training, step, reached = TrainingStep(model, decay=0.0, normalisation="valid"), 0, None
    x, y = device.upload(images), device.upload(labels)
    while step < MOST_STEPS and not (step and work.over):
        training(x, y, learning_rate(step, MOST_STEPS, 0.1, "poly"))
        step += 1
        if step % 25 == 0 or work.over:
            reached = _scores(model, x, labels)
            if reached.global_accuracy >= PIXELS and reached.miou >= MIOU:
                break
    assert reached is not None
    what = f"{'real' if real else 'synthetic'} images at 96x96, {step} steps"
    text = f"4 {what}: {reached.global_accuracy:.2%} of pixels, mIoU {reached.miou:.3f}"
    if reached.global_accuracy >= PIXELS and reached.miou >= MIOU:
        return Outcome(True, text)
    return Outcome(False if work.on_gpu else None, f"{text}; wanted {PIXELS:.0%} and {MIOU}")


def _scores(model: SegNet, images: object, labels: np.ndarray) -> Scores:
    model.eval()
    with no_grad():
        predicted = model(images).numpy().argmax(-1)
    k, valid = model.classes, labels < model.classes
    pairs = k * labels[valid].astype(np.int64) + predicted[valid]
    return scores(np.bincount(pairs, minlength=k * k).reshape(k, k))
