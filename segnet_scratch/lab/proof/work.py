"""A piece of a proof, what it came to, and how large proofs are: plain data that travel between processes as JSON."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from segnet_scratch.errors import SegnetError


@dataclass(frozen=True)
class Effort:
    """How many of everything; quick unless given. Shapes of ops are random ones, beside the fixed cases of each row."""

    shapes: int = 8  # of each op, float32, against the reference
    doubles: int = 2  # the same in float64
    integers: int = 5  # shapes of each op that is exact for integers
    gradients: int = 0  # shapes of each op; 0: as many as suit it
    kinds: int = 2  # of whole networks
    networks: int = 1  # seeds of each of them
    directions: int = 1  # along which the gradient of each of its parameters is taken
    ordered: int = 2  # shapes of each op, in every order of threads
    shuffles: int = 2  # orders beside ascending and descending
    variables: int = 2  # shapes of each op, in builds with unlike automatic variables
    sanitized: int = 2  # shapes of each op under the sanitizers
    hostile: int = 25  # inputs of each op that takes hostile ones
    repeats: int = 10  # of each op
    steps: int = 3  # of training
    runs: int = 2  # of these steps


QUICK = Effort()
FULL = Effort(
    shapes=500,
    doubles=100,
    integers=100,
    gradients=50,
    kinds=7,
    networks=3,
    directions=5,
    ordered=50,
    shuffles=6,
    variables=100,
    sanitized=100,
    hostile=200,
    repeats=250,
    steps=50,
    runs=3,
)


@dataclass(frozen=True)
class Work:
    """What one process does at a time: some cases of one target (a row, an op, a file) for one part of the proof."""

    part: str
    device: str
    target: str
    first: int = 0
    count: int = 1
    seed: int = 0
    effort: Effort = QUICK
    order: str = "ascending"
    sanitize: bool = False
    extra: bool = False  # beyond the fixed cases: may be left out where time is over
    cost: float = 0.0  # as compared with others of its part: on a GPU the cheap ones come first
    limit: float = 1200.0  # seconds: a kernel that never ends does not hold up the rest for ever
    folder: str = ""  # where results to compare with are put ahead of the GPU
    ahead: bool = False  # make those, and no more

    @property
    def cases(self) -> str:
        """Names them, so that they can be run again."""
        return f"cases {self.first} to {self.first + self.count - 1}, seed {self.seed}"

    def to_json(self) -> dict[str, Any]:
        """For the other process."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """What `to_json` gave."""
        return cls(**{**data, "effort": Effort(**data["effort"])})


@dataclass(frozen=True)
class Failure:
    """Something that does not hold, and as much as is known of where."""

    part: str
    device: str
    target: str
    case: str
    message: str  # its further lines name kernel, block, thread and line of the source, where they are known

    def __str__(self) -> str:
        return f"{self.part}, {self.target} on {self.device}, {self.case}: {self.message}"


@dataclass
class Tally:
    """What ran, and what failed."""

    counts: Counter[str] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)  # cases that launched each kernel
    failures: list[Failure] = field(default_factory=list)
    worst: float = 0.0  # error of a gradient
    skipped: str = ""  # why nothing ran, or not all of it
    notes: list[str] = field(default_factory=list)  # what was measured
    seconds: float = 0.0

    def fail(self, work: Work, target: str, case: object, message: object) -> None:
        """Notes a failure."""
        self.failures.append(Failure(work.part, work.device, target, str(case), str(message)))

    @contextmanager
    def attempt(self, work: Work, target: str, case: object) -> Iterator[None]:
        """An error of the project's own inside is a failure of this case; a kernel's fault names block and thread."""
        try:
            yield
        except SegnetError as error:
            self.fail(work, target, case, f"{type(error).__name__}: {error}")

    def add(self, other: "Tally") -> None:
        """Takes in what another piece of work came to."""
        self.counts += other.counts
        self.kernels += other.kernels
        self.failures += other.failures
        self.worst = max(self.worst, other.worst)
        self.skipped = self.skipped or other.skipped
        self.notes += other.notes
        self.seconds += other.seconds

    def to_json(self) -> dict[str, Any]:
        """For the other process, and for reports."""
        # Not asdict of the whole: that would count the items of a Counter, not copy it.
        counters = {"counts": dict(self.counts), "kernels": dict(self.kernels)}
        failures = [asdict(failure) for failure in self.failures]
        return {**vars(self), **counters, "failures": failures}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """What `to_json` gave."""
        data = {**data, "failures": [Failure(**failure) for failure in data["failures"]]}
        return cls(**{**data, "counts": Counter(data["counts"]), "kernels": Counter(data["kernels"])})
