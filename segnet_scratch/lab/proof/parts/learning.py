"""That it learns: four images by heart, and the sample data by the command line."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from segnet_scratch import recipes
from segnet_scratch.config import Config
from segnet_scratch.data import EvalTransform, VOCDataset, write_sample
from segnet_scratch.inference_step import InferenceStep
from segnet_scratch.lab.proof.parts.base import Part
from segnet_scratch.lab.proof.work import Tally, Work
from segnet_scratch.metrics import Scores, confusion_matrix, scores
from segnet_scratch.optim import learning_rate
from segnet_scratch.runtime.devices import Device
from segnet_scratch.segnet import SegNet
from segnet_scratch.step import TrainingStep

PIXELS, MIOU, MOST_STEPS = 0.99, 0.95, 400
DEMO_MIOU = 0.6


class Learning(Part):
    """Overfits four images; scored in evaluation mode. $SEGNET_TEST_DATA has real ones."""

    name = "learning"
    proves = f"four images are learnt by heart: {PIXELS:.0%} of pixels, mIoU {MIOU}"
    devices = ("cuda",)
    long = True

    def problems(self, work: Work, device: Device, tally: Tally) -> Iterator[str]:
        with tempfile.TemporaryDirectory() as folder:
            voc = Path(os.environ.get("SEGNET_TEST_DATA", folder)) / "data" / "VOCdevkit" / "VOC2012"
            kind = "real" if voc.is_dir() else "synthetic"
            data = VOCDataset(voc if voc.is_dir() else write_sample(Path(folder) / "sample", 4, 1), "train")
            transform, rng = EvalTransform((96, 96)), np.random.default_rng(0)
            pairs = [transform(*data.sample(index)[:2], rng) for index in range(4)]
        images, labels = (np.stack(arrays) for arrays in zip(*pairs, strict=True))
        model = SegNet(data.classes, 1 / 4, device, seed=1)
        settings = Config(decay=0.0, loss_normalisation="valid", lr=0.1, schedule="poly")
        training, learnt, text = TrainingStep(model, settings=settings), False, ""
        x, y = device.upload(images), device.upload(labels)
        while not learnt and tally.counts["steps"] < MOST_STEPS:
            training(x, y, learning_rate(tally.counts["steps"], MOST_STEPS, settings))
            tally.counts["steps"] += 1
            if tally.counts["steps"] % 25 == 0:
                found = scores_of(model, x, labels)
                learnt = found.global_accuracy >= PIXELS and found.miou >= MIOU
                text = f"4 {kind} images: {found.global_accuracy:.2%} of pixels, mIoU {found.miou:.3f}"
        tally.notes.append(text)
        if not learnt:
            yield f"{text} after {MOST_STEPS} steps; expected {PIXELS:.0%} and {MIOU}"


def scores_of(model: SegNet, images: object, labels: np.ndarray) -> Scores:
    """Of images that are on the device."""
    predicted = model.device.download(InferenceStep(model)(images)).argmax(-1)
    return scores(confusion_matrix(labels, predicted, model.classes))


class Demo(Part):
    """Sample data, training, evaluation, each a command of its own."""

    name = "demo"
    proves = f"segnet data sample, train and eval come to a mIoU of {DEMO_MIOU}"
    devices = ("cuda",)
    long = True

    def problems(self, work: Work, device: Device, tally: Tally) -> Iterator[str]:
        with tempfile.TemporaryDirectory() as folder:
            data, run, result = f"{folder}/data", f"{folder}/run", Path(folder) / "eval.json"
            recipe = str(Path(recipes.__file__).with_name("demo.toml"))
            for arguments in (
                ["data", "sample", data],
                ["train", "--data", data, "--out", run, "--config", recipe, "--device", device.name],
                ["eval", f"{run}/best.safetensors", "--data", data, "--device", device.name, "--json", str(result)],
            ):
                command = [sys.executable, "-m", "segnet_scratch", *arguments]
                done = subprocess.run(command, capture_output=True, text=True)
                tally.counts["commands"] += 1
                if done.returncode:
                    yield f"segnet {arguments[0]}: exit code {done.returncode}: {done.stderr.strip()[-2000:]}"
                    return
            miou = json.loads(result.read_text())["miou"]
        tally.notes.append(f"mIoU {miou:.3f}")
        if not miou >= DEMO_MIOU:
            yield f"mIoU {miou:.3f}; expected {DEMO_MIOU}"
