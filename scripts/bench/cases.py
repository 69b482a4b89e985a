"""What is measured, what matters most first, and what every contender is given."""

from dataclasses import dataclass

import numpy as np

from segnet_scratch.segnet import SegNet

CLASSES, VOID = 21, 255
LR, MOMENTUM, DECAY = 1e-3, 0.9, 5e-4
PRECISIONS = ("bf16", "tf32", "float32")

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """One task on batches of one shape, in one precision of the convolutions."""

    task: str  # "training" or "inference"
    batch: int
    size: tuple[int, int]
    precision: str = "float32"
    width: float = 1.0
    on_gpu: bool = True

    def __str__(self) -> str:
        width = "" if self.width == 1 else f", width {self.width:g}"
        return f"{self.task}, {self.batch} x {self.size[0]}x{self.size[1]}, {self.precision}{width}"

    @property
    def target(self) -> float:
        """How many times as fast as PyTorch's best ours is to be."""
        if not self.on_gpu:
            return 0.4
        if self.task == "inference":
            return 1.7
        return {"bf16": 1.5, "tf32": 1.25, "float32": 2.0}[self.precision]

    def data(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Images (n, h, w, 3), float32, and labels (n, h, w), uint8, a twentieth of them void."""
        rng = np.random.default_rng([21, seed])
        shape = (self.batch, *self.size)
        labels = np.where(rng.random(shape) < 0.05, VOID, rng.integers(0, CLASSES, shape))
        return rng.standard_normal((*shape, 3), np.float32), labels.astype(np.uint8)


COMPILED_AHEAD = 5
SMALL, CAMVID = (224, 224), (360, 480)
CASES = (
    Case("training", 16, SMALL, "bf16"),
    Case("inference", 16, SMALL, "bf16"),
    Case("inference", 1, CAMVID, "bf16"),
    Case("training", 16, SMALL, "tf32"),
    Case("training", 4, SMALL, "float32"),
    # Those above are COMPILED_AHEAD; those below as time permits.
    *(Case("inference", 1, SMALL, precision) for precision in PRECISIONS),
    Case("training", 8, CAMVID, "bf16"),
    *(Case("inference", 16, SMALL, precision) for precision in PRECISIONS[1:]),
    *(Case("training", 8, CAMVID, precision) for precision in PRECISIONS[1:]),
    *(Case("inference", 8, CAMVID, precision) for precision in PRECISIONS),
)


def initial_state(seed: int, width: float) -> Arrays:
    """Weights to start from, with batch norms lifted by two deviations, so that few ReLUs are near their kink."""
    state = SegNet(CLASSES, width, "numpy", seed=seed).state_dict()
    for name, array in state.items():
        if name.endswith("bn.bias"):
            array[...] = 2
    return state
