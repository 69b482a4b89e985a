"""The folder of a run: its files, whose settings they are, and that one process at a time trains there."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from segnet_scratch.config import AUTO, Config, check_resume, init_setting, load_config, toml_value
from segnet_scratch.errors import TrainingError
from segnet_scratch.files import locked, reason


class RunFolder:
    """The files of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.toml"  # the settings, with comments
        self.metrics = path / "metrics.jsonl"  # one row per step and per validation
        self.last = path / "last.safetensors"  # weights and momenta to go on from
        self.best = path / "best.safetensors"  # weights of the best validation
        self._seen = self._state()

    def _state(self) -> list[tuple[int, int]]:
        """Changes with `config`, which whoever begins or resumes the run writes anew, and with `last`."""
        found = [path.stat() for path in (self.config, self.last) if path.exists()]
        return [(file.st_ino, file.st_mtime_ns) for file in found]

    def expect_no_run(self) -> None:
        """TrainingError where a run would be overwritten. What never came to a checkpoint is no obstacle."""
        if self.last.exists() or self.best.exists():
            raise TrainingError(f"{self.path} already holds a run; continue it with --resume, or choose another --out")

    def resolve_config(
        self, files: Sequence[Path], overrides: Sequence[str], resume: bool, init: str | Path | None = None
    ) -> Config:
        """The settings of this run: those given, the later over the earlier; on resume over those it was started with.

        Raises TrainingError where a run would be overwritten and where there is none to resume, ConfigError where a
        resumed run would change. What a run left that never came to a checkpoint is no obstacle to a new one.
        """
        if init is not None:
            overrides = [*overrides, f"init={toml_value(init_setting(init))}"]
        if not resume:
            self.expect_no_run()
            return load_config(files, overrides)
        if not self.config.exists():
            raise TrainingError(f"{self.path}: there is no run to resume; leave out --resume to start one there")
        old, config = load_config(self.config), load_config(files or [self.config], overrides)
        if not self.last.exists():
            old = replace(old, init=config.init)  # nothing has been made of the weights yet
        elif files and not config.init:
            config = replace(config, init=old.init)  # a file of settings need not say it again
        chosen = {key: getattr(old, key) for key in ("engine", "precision") if getattr(config, key) == AUTO}
        config = replace(config, **chosen)
        check_resume(old, config)
        return config

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keeps other processes out of the folder; TrainingError where one is in it or no lock is to be had.

        Also where one has been there since this object was made, or last used the folder.
        """
        with ExitStack() as stack:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                alone = stack.enter_context(locked(self.path))
            except OSError as error:
                raise TrainingError(f"{error.filename or self.path}: cannot be locked: {reason(error)}") from error
            if not alone:
                fix = "wait for its end, stop it, or choose another --out"
                raise TrainingError(f"{self.path}: another process trains in this folder; {fix}")
            if self._state() != self._seen:
                fix = "start again, with --resume to go on from there"
                raise TrainingError(f"{self.path}: another run has been taken up in this folder meanwhile; {fix}")
            try:
                yield
            finally:
                self._seen = self._state()
