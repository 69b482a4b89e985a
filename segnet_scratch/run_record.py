"""sessions.json in a run folder: where and how long a run was trained, for whoever reads its scores later."""

import json
import platform
import subprocess
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter

from segnet_scratch import __version__
from segnet_scratch.errors import DataError
from segnet_scratch.evaluate import Evaluation
from segnet_scratch.files import write_durably
from segnet_scratch.train import Listener, Trainer

FILE = "sessions.json"
_LIBRARIES = ("numpy", "cupy-cuda12x", "cupy-cuda13x")


@dataclass(frozen=True)
class Session:
    """One stretch of training, from a start or --resume to an end or a stop.

    data: the VOC root. started: time in UTC. first_step, last_step: steps made before it and after it. seconds: its
    duration, validations included. versions: of Python and of the libraries that compute. revision: the git commit of
    the source, with a + where files differ from it; empty where it is not a git checkout.
    """

    data: str
    device: str
    started: str
    first_step: int
    last_step: int
    batch: int
    seconds: float
    system: str
    versions: dict[str, str]
    revision: str

    @property
    def images_per_second(self) -> float:
        """Training images a second, validations included; 0 before the first step."""
        return self.batch * (self.last_step - self.first_step) / self.seconds if self.seconds else 0.0


class RunRecord(Listener):
    """Keeps the record of a session: written at its start, after each validation and at its end."""

    def started(self, trainer: Trainer) -> None:
        self._began = perf_counter()
        self._session = Session(
            data=str(trainer.train_set.root.resolve()),
            device=trainer.model.device.name,
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            first_step=trainer.step,
            last_step=trainer.step,
            batch=trainer.config.batch,
            seconds=0.0,
            system=platform.platform(),
            versions=versions(),
            revision=revision(),
        )
        # A session that began at this step or later has lost its steps: the run went on from an earlier checkpoint.
        self._earlier = [s for s in read_sessions(trainer.folder.path) if s.first_step < trainer.step]
        self._write(trainer)

    def validated(self, trainer: Trainer, evaluation: Evaluation) -> None:
        self._write(trainer)

    def ended(self, trainer: Trainer) -> None:
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        session = replace(self._session, last_step=trainer.step, seconds=round(perf_counter() - self._began, 1))
        sessions = [asdict(s) for s in (*self._earlier, session)]
        write_durably(trainer.folder.path / FILE, [json.dumps(sessions, indent=2).encode() + b"\n"])


def read_sessions(run: Path) -> list[Session]:
    """The sessions of a run folder in order; none where there is no record. DataError for a damaged one."""
    path = run / FILE
    if not path.is_file():
        return []
    try:
        entries = json.loads(path.read_bytes())
        if not isinstance(entries, list):
            raise ValueError("no list")
        return [Session(**{field.name: entry[field.name] for field in fields(Session)}) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        problem = f"expected the record of a run's sessions, got {error!r:.80}; delete the file"
        raise DataError(f"{path}: {problem}") from error


def versions() -> dict[str, str]:
    """Versions of this project, of Python, and of the libraries that compute."""
    found = {"segnet_scratch": __version__, "python": platform.python_version()}
    for library in _LIBRARIES:
        with suppress(PackageNotFoundError):
            found[library] = version(library)
    return found


def revision() -> str:
    """The git commit of the source tree, with a + where tracked files differ from it; empty outside of a checkout."""
    tree = Path(__file__).resolve().parent.parent
    if not (tree / ".git").exists() or not (tree / "pyproject.toml").is_file():  # not a checkout that merely holds us
        return ""
    try:
        commit = _git(tree, "rev-parse", "HEAD")
        return commit + ("+" if _git(tree, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(tree: Path, *arguments: str) -> str:
    command = ["git", "-C", str(tree), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
