"""The fused engine: the losses of the layers in float32, near ones in bfloat16, the same bits again, inference."""

import numpy as np

from gpu_check.part import Outcome, Work, judged
from segnet_scratch.engine.inference import FusedInference
from segnet_scratch.nn.autograd import no_grad
from segnet_scratch.segnet import SegNetBasic
from segnet_scratch.step import TrainingStep

CLASSES, BATCH, STEPS = 21, 2, 20
# SegNet-Basic, since SegNet in float32 parts from itself (docs/numerics.md).
LIMITS = {"float32": 1e-4, "tf32": 2e-2, "bf16": 5e-2}
LOGITS_LIMIT = 1e-4


def fused_engine(work: Work) -> Outcome:
    """Twenty steps, all but the first replayed from a graph on a GPU, beside the layers; each precision twice."""
    size, width = ((96, 130), 1.0) if work.on_gpu else ((32, 48), 1 / 8)
    steps = STEPS if work.on_gpu else 3
    layers, problems, found = _losses(work, size, width, steps, "layers", "float32"), [], []
    for precision, limit in LIMITS.items():
        first, second = (_losses(work, size, width, steps, "fused", precision) for _ in range(2))
        difference = float(np.abs(first - layers).max() / np.abs(layers).max())
        found.append(f"{precision} {difference:.1e}")
        if not difference <= limit:
            problems.append(f"{precision}: losses lie {difference:.1e} from those of the layers, more than {limit}")
        if not np.array_equal(first, second):
            problems.append(f"{precision}: a second run has other losses")
    logits = _logits(work, size, width)
    if not logits <= LOGITS_LIMIT:
        problems.append(f"inference: logits lie {logits:.1e} from those of the layers, more than {LOGITS_LIMIT}")
    text = f"losses of {steps} steps from the layers', relative: {', '.join(found)}; logits {logits:.1e}"
    return judged(text, problems)


def _batch(number: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([5, number])
    images = rng.standard_normal((BATCH, *size, 3), np.float32)
    return images, rng.integers(0, CLASSES, (BATCH, *size), np.uint8)


def _losses(work: Work, size: tuple[int, int], width: float, steps: int, engine: str, precision: str) -> np.ndarray:
    step, losses = TrainingStep(SegNetBasic(CLASSES, width, work.device, seed=1), engine, precision), []
    for number in range(steps):
        step(*_batch(number, size), 1e-2)
        losses.append(step.read().get()[0])
    return np.array(losses)


def _logits(work: Work, size: tuple[int, int], width: float) -> float:
    """The largest difference of the fused logits from the layers', relative to the largest logit."""
    device = work.device
    model = SegNetBasic(CLASSES, width, device, seed=1).eval()
    images = _batch(0, size)[0]
    with no_grad():
        expected = model(images).numpy()
    engine = FusedInference(model, BATCH, size, "tf32x3")
    for _ in range(2):  # the second from the graph
        logits = device.download(engine(device.upload(images)))[..., :CLASSES]
    return float(np.abs(logits - expected).max() / np.abs(expected).max())
