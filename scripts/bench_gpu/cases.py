"""What is measured, what matters most first."""

from dataclasses import dataclass

PRECISIONS = ("bf16", "tf32", "float32")


@dataclass(frozen=True)
class Case:
    """One task on batches of one shape, in one precision of the convolutions."""

    task: str  # "training" or "inference"
    batch: int
    size: tuple[int, int]
    precision: str

    def __str__(self) -> str:
        return f"{self.task}, {self.batch} x {self.size[0]}x{self.size[1]}, {self.precision}"

    @property
    def target(self) -> float:
        """How many times as fast as PyTorch's best ours is to be."""
        if self.task == "inference":
            return 1.7
        return {"bf16": 1.5, "tf32": 1.25, "float32": 2.0}[self.precision]


SMALL, CAMVID = (224, 224), (360, 480)
CASES = (
    Case("training", 16, SMALL, "bf16"),
    Case("inference", 16, SMALL, "bf16"),
    Case("inference", 1, CAMVID, "bf16"),
    Case("training", 16, SMALL, "tf32"),
    Case("training", 4, SMALL, "float32"),
    # Those above are the table of the README; those below as time permits.
    *(Case("inference", 1, SMALL, precision) for precision in PRECISIONS),
    Case("training", 8, CAMVID, "bf16"),
    *(Case("inference", 16, SMALL, precision) for precision in PRECISIONS[1:]),
    *(Case("training", 8, CAMVID, precision) for precision in PRECISIONS[1:]),
    *(Case("inference", 8, CAMVID, precision) for precision in PRECISIONS),
)
