"""The demo by the command line: sample data, training, evaluation."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

from gpu_check.part import Outcome, Work

RECIPE = Path(__file__).resolve().parents[2] / "segnet_scratch" / "recipes" / "demo.toml"
MIOU = 0.6


def demo(work: Work) -> Outcome:
    """Passes where the sample's validation images get mIoU 0.6. On the host device it would take many minutes."""
    if not work.on_gpu:
        return Outcome(None, "not run: it takes a GPU")
    with tempfile.TemporaryDirectory() as folder:
        data, run, scores = f"{folder}/data", f"{folder}/run", Path(folder) / "eval.json"
        began = perf_counter()
        for arguments in (
            ["data", "sample", data],
            ["train", "--data", data, "--out", run, "--config", str(RECIPE), "--device", "cuda"],
            ["eval", f"{run}/best.safetensors", "--data", data, "--device", "cuda", "--json", str(scores)],
        ):
            command = [sys.executable, "-m", "segnet_scratch", *arguments]
            done = subprocess.run(command, capture_output=True, text=True, timeout=4 * work.seconds)
            if done.returncode:
                return Outcome(False, f"segnet {arguments[0]} failed", done.stderr.splitlines()[-20:])
        seconds, miou = perf_counter() - began, json.loads(scores.read_text())["miou"]
    return Outcome(miou >= MIOU, f"mIoU {miou:.3f} in {seconds:.0f} s", details={"miou": miou})
