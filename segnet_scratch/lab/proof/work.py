"""A piece of a proof, what it came to, and how large proofs are: plain data that travel between processes as JSON."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from segnet_scratch.errors import SegnetError


def _figure(quick: int, full: int) -> Any:
    return field(default=quick, metadata={"full": full})


@dataclass(frozen=True)
class Effort:
    """How many of everything, quick and full. Shapes of ops are random ones, beside the fixed cases of each row."""

    shapes: int = _figure(8, 500)  # of each op, float32, against the reference
    doubles: int = _figure(2, 100)  # the same in float64
    integers: int = _figure(5, 100)  # shapes of each op that is exact for integers
    gradients: int = _figure(0, 50)  # shapes of each op; 0: as many as suit it
    kinds: int = _figure(2, 7)  # of whole networks
    networks: int = _figure(1, 3)  # seeds of each of them
    directions: int = _figure(1, 5)  # along which the gradient of each of its parameters is taken
    ordered: int = _figure(2, 50)  # shapes of each op, in every order of threads
    shuffles: int = _figure(2, 6)  # orders beside ascending and descending
    variables: int = _figure(2, 100)  # shapes of each op, in builds with unlike automatic variables
    sanitized: int = _figure(2, 100)  # shapes of each op under the sanitizers
    hostile: int = _figure(25, 200)  # inputs of each op that takes hostile ones
    repeats: int = _figure(10, 250)  # of each op
    steps: int = _figure(3, 50)  # of training
    runs: int = _figure(2, 3)  # of these steps


QUICK = Effort()
FULL = Effort(**{figure.name: figure.metadata["full"] for figure in fields(Effort)})


RANDOM = 2  # the first round of random cases: may be left out where time is over


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
    round: int = 0  # 0: the first of everything; 1: the other fixed cases; from RANDOM on: random ones
    limit: float = 1200.0  # seconds: a kernel that never ends does not hold up the rest for ever
    alone: bool = False  # nothing else may run on the GPU

    @property
    def kind(self) -> str:
        """Of its cases."""
        return "fixed" if self.round < RANDOM else "random"

    @property
    def cases(self) -> str:
        """Names them, so that they can be run again."""
        return f"cases {self.first} to {self.first + self.count - 1}, seed {self.seed}"

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """From what `asdict` gave in another process."""
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
    ended: str = ""  # how it took its process along: "hung", "crashed"
    notes: list[str] = field(default_factory=list)  # what was measured
    seconds: float = 0.0

    def fail(self, work: Work, case: object, message: object) -> None:
        """Notes a failure."""
        self.failures.append(Failure(work.part, work.device, work.target, str(case), str(message)))

    @contextmanager
    def attempt(self, work: Work, case: object) -> Iterator[None]:
        """An error of the project's own inside is a failure of this case; a kernel's fault names block and thread."""
        try:
            yield
        except SegnetError as error:
            self.fail(work, case, f"{type(error).__name__}: {error}")

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
        return {**vars(self), "failures": [asdict(failure) for failure in self.failures]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """What `to_json` gave."""
        counters = {name: Counter(data[name]) for name in ("counts", "kernels")}
        return cls(**{**data, **counters, "failures": [Failure(**failure) for failure in data["failures"]]})
