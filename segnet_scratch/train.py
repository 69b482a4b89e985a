"""Training, read top-down: batch -> model -> loss -> backward -> update, with validation, checkpoints and resume."""

import hashlib
import logging
import math
import signal
import threading
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from types import FrameType
from typing import Any, cast

import numpy as np

from segnet_scratch import weights
from segnet_scratch.config import MEDIAN_FREQUENCY, Config, check_resume, load_config
from segnet_scratch.data import (
    VOID,
    Batch,
    ColourJitter,
    Loader,
    TrainTransform,
    VOCDataset,
    class_statistics,
    open_dataset,
)
from segnet_scratch.data.cache import CacheMode
from segnet_scratch.data.on_device import DeviceLoader
from segnet_scratch.data.suspicions import look_over
from segnet_scratch.engine.training import FusedEngine
from segnet_scratch.engine.weights import WorkingWeights
from segnet_scratch.errors import CheckpointError, ConfigError, DeviceMemoryError, TrainingError
from segnet_scratch.evaluate import Evaluation, evaluate
from segnet_scratch.files import sweep_temporaries, write_durably
from segnet_scratch.metrics import MetricsLog
from segnet_scratch.nan_guard import first_not_finite
from segnet_scratch.nn.functions import cross_entropy
from segnet_scratch.ops.loss.cross_entropy import check_labels
from segnet_scratch.optim import SGD, learning_rate
from segnet_scratch.runtime.devices import get_device
from segnet_scratch.segnet import ARCHITECTURES
from segnet_scratch.weights import initialise

log = logging.getLogger(__name__)


class Listener:
    """What a training run tells whoever watches it; the command line draws its progress from this."""

    def started(self, trainer: "Trainer") -> None:
        """Everything is loaded; training begins at `trainer.step` of `trainer.total_steps`."""

    def stepped(self, trainer: "Trainer", loss: float, lr: float) -> None:
        """A step has been made."""

    def validating(self, images: int) -> None:
        """So many more images of the validation split have been evaluated."""

    def validated(self, trainer: "Trainer", evaluation: Evaluation) -> None:
        """The validation split has been evaluated."""


@dataclass(frozen=True)
class RunFolder:
    """The files of a run."""

    path: Path

    @property
    def config(self) -> Path:
        """The settings, with comments."""
        return self.path / "config.toml"

    @property
    def metrics(self) -> Path:
        """One row a step and a row a validation."""
        return self.path / "metrics.jsonl"

    @property
    def last(self) -> Path:
        """Weights and momenta to go on from."""
        return self.path / "last.safetensors"

    @property
    def best(self) -> Path:
        """Weights of the best validation."""
        return self.path / "best.safetensors"

    def resolve_config(self, file: Path | None, overrides: list[str], resume: bool) -> Config:
        """The settings of this run: those given, on resume over those it was started with.

        Raises TrainingError where a run would be overwritten, ConfigError where a resumed run would change.
        """
        if not resume:
            if self.config.exists() or self.last.exists() or self.metrics.exists():
                raise TrainingError(
                    f"{self.path} already holds a run; continue it with --resume, or choose another --out"
                )
            return load_config(file, overrides)
        if not self.config.exists():
            return load_config(file, overrides)
        config = load_config(file or self.config, overrides)
        check_resume(load_config(self.config), config)
        return config


class Trainer:
    """One training run: a model, its data, its optimiser, its place in the run.

    `data` is a VOC root or a folder above it; `init` a weights file for a fresh start. On resume the state of
    `last.safetensors` is taken up, and metrics written after it are dropped.
    """

    def __init__(
        self,
        config: Config,
        data: str | Path,
        out: str | Path,
        device: str = "auto",
        init: str | Path | None = None,
        resume: bool = False,
    ) -> None:
        self.config, self.folder = config, RunFolder(Path(out))
        on, mode = get_device(device), "none" if config.cache == "device" else config.cache
        self.train_set, self.val_set = (open_dataset(data, split, cast(CacheMode, mode)) for split in ("train", "val"))
        classes = self.train_set.classes
        weighted = config.class_weights and config.class_weights != MEDIAN_FREQUENCY
        if weighted and len(config.class_weights) != classes:
            raise ConfigError(
                f"class_weights: {len(config.class_weights)} numbers for {classes} classes; give one for each class"
            )
        drop_last = len(self.train_set) >= config.batch
        source = self.train_set, _transform(config), config.batch
        self.loader: Loader
        if config.cache == "device":
            self.loader = DeviceLoader(*source, on, config.dtype, config.seed, drop_last)
        else:
            self.loader = Loader(*source, seed=config.seed, drop_last=drop_last, workers=config.workers)
        self.total_steps = config.steps or (config.epochs or 0) * self.loader.batches_per_epoch
        self.model = ARCHITECTURES[config.model](
            *(classes, config.width, on),
            dropout=config.dropout,
            decoder=config.decoder,
            seed=config.seed,
            dtype=config.dtype,
            rung="tf32" if config.precision == "tf32" else None,
        )
        # Before the optimiser: the engine lays the classifier's parameters where its kernels want them.
        working = WorkingWeights.of(self.model, config.precision) if config.engine == "fused" else None
        self.optimiser = SGD(self.model, config.momentum, config.decay, config.bias_lr, config.clip_norm, working)
        self.log = MetricsLog(self.folder.metrics)
        self.step = 0  # steps made
        self.best_miou: float | None = None
        self.class_weights: list[float] = []  # as numbers, whatever the settings say; empty: all 1
        self._validations_since_best = 0
        self._validation_due = False  # a stop request came before the validation of this step was done
        self._stop = threading.Event()
        self.initialised = "He initialisation"
        resumed = resume and self.folder.last.exists()
        if resumed:
            self._load()
        else:
            for finding in look_over(self.train_set, config.workers):
                log.warning("%s: %s", finding.path, finding.detail)
            self.class_weights = _class_weights(config, self.train_set)
            if init is not None:
                self.initialised = initialise(self.model, init, self.train_set.names)
        self._loss_weights = np.array(self.class_weights, np.float32) if self.class_weights else None
        self.engine: FusedEngine | None = None
        if working is not None:
            objective = self._loss_weights, config.loss_normalisation, config.label_smoothing
            self.engine = FusedEngine(self.model, working, *objective)
        self.folder.path.mkdir(parents=True, exist_ok=True)
        sweep_temporaries(self.folder.path)
        self.log.truncate_after(self.step)
        write_durably(self.folder.config, [config.to_toml().encode()])

    def run(self, listener: Listener | None = None) -> bool:
        """Trains to the end; True when it is reached, False when a signal (Ctrl-C) ended it after saving.

        The end is the last step, or the validation at which `patience` is exhausted.
        """
        listener = listener or Listener()
        with _stop_requests() as self._stop:
            listener.started(self)
            try:
                if self._validation_due:
                    self._validate_and_save(listener)
                while self.step < self.total_steps and not self.gave_up:
                    self._train_epoch(listener)
            except _Stopped:
                self.save()
                return False
        return True

    @property
    def gave_up(self) -> bool:
        """Has the validation mIoU not risen for as many validations as `patience` allows?"""
        return 0 < self.config.patience <= self._validations_since_best

    def _train_epoch(self, listener: Listener) -> None:
        """The rest of the epoch that the next step belongs to."""
        epoch, position = divmod(self.step, self.loader.batches_per_epoch)
        batches = self._on_device(self.loader.epoch(epoch, start_batch=position))
        try:
            for batch in batches:
                self._train_step(batch, listener)
                self._after_step(listener)
                if self.step == self.total_steps or self.gave_up:
                    break
                self._heed_stop()
        except DeviceMemoryError as error:
            raise DeviceMemoryError(f"{error}; {self._smaller()}", error.asked, error.free) from error
        finally:
            batches.close()

    def _on_device(self, batches: Generator[Batch, None, None]) -> Generator[Batch, None, None]:
        """The batches with their arrays on the device; a GPU gets each one while it works on the one before."""
        model = self.model
        if isinstance(self.loader, DeviceLoader):  # its batches are there already
            with closing(batches):
                yield from batches
            return

        def arrays(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
            return batch.images.astype(model.dtype, copy=False), check_labels(batch.labels, model.classes)

        with closing(batches), closing(model.device.prefetch(batches, arrays)) as uploaded:
            for batch, (images, labels) in uploaded:
                yield replace(batch, images=images, labels=labels)

    def _smaller(self) -> str:
        """What to try where memory does not suffice."""
        batch, parts, (height, width) = self.config.batch, self.config.accumulate, self.config.image_size
        tried = f"a batch of {batch} at {height}x{width} is too large here"
        if batch > parts:
            return f"{tried}: try --set batch={batch // 2}, or --set accumulate={min(2 * parts, batch)}"
        return f"{tried}: try a smaller size or width, such as --set width={self.config.width / 2:g}"

    def _heed_stop(self) -> None:
        if self._stop.is_set():
            raise _Stopped

    def _train_step(self, batch: Batch, listener: Listener) -> None:
        config, model = self.config, self.model
        model.train()
        model.zero_grad()
        value = self._gradients(batch)
        # One element of a gradient that is not finite makes the norm so.
        norm = float(model.device.download(self.optimiser.measure())[0])
        if not math.isfinite(value):
            raise TrainingError(self._not_finite(value, batch))
        if not math.isfinite(norm):
            raise TrainingError(f"the norm of the gradients is {norm}: {self._not_finite(value, batch)}")
        lr = learning_rate(
            *(self.step, self.total_steps, config.lr, config.schedule, config.poly_power, config.warmup),
            *(config.lr_steps, config.lr_gamma),
        )
        self.optimiser.step(lr)
        self.step += 1
        self.log.append({"step": self.step, "loss": value, "lr": lr})
        listener.stepped(self, value, lr)

    def _gradients(self, batch: Batch) -> float:
        """Gives every parameter the gradient of the batch's loss, which is returned; in `accumulate` parts, one by one.

        The loss of a batch is the mean of its parts' losses, each weighed by its share of the normaliser.
        """
        config, model = self.config, self.model
        if self.engine is not None:
            return float(model.device.download(self.engine(batch.images, batch.labels))[0])
        losses = []
        for part, (images, share) in enumerate(self._parts(batch)):
            model.set_random_state(config.seed, self.step * config.accumulate + part)  # dropout masks of its own
            loss = cross_entropy(
                *(model(batch.images[images]), batch.labels[images], self._loss_weights),
                *(config.loss_normalisation, config.label_smoothing),
            )
            loss.backward(model.device.constant(np.array([share], loss.dtype)))
            losses.append((share, loss))
        return math.fsum(share * loss.item() for share, loss in losses)

    def _parts(self, batch: Batch) -> list[tuple[slice, float]]:
        """(images, share of the loss's normaliser) of each part of the batch."""
        if self.config.accumulate == 1:
            return [(slice(None), 1.0)]
        count = len(batch.ids)
        parts = min(self.config.accumulate, count)
        cuts = [slice(count * k // parts, count * (k + 1) // parts) for k in range(parts)]
        of_classes = np.ones(self.model.classes)
        if self._loss_weights is not None and self.config.loss_normalisation == "weights":
            of_classes = self._loss_weights.astype(np.float64)
        labels = self.model.device.download(batch.labels)
        weighs = [float(of_classes[part[part != VOID]].sum()) for part in (labels[cut] for cut in cuts)]
        whole = sum(weighs) or 1.0  # where all is void, loss and gradients are 0 whatever they are multiplied by
        return [(cut, weight / whole) for cut, weight in zip(cuts, weighs, strict=True)]

    def _not_finite(self, loss: float, batch: Batch) -> str:
        kept = (
            f"{self.folder.last} holds the last saved state" if self.folder.last.exists() else "there is no checkpoint"
        )
        more = ", ..." if len(batch.ids) > 4 else ""
        origin = first_not_finite(self.model, batch.images) or "loss"
        return (
            f"the loss is {loss} at step {self.step + 1} (images {', '.join(batch.ids[:4])}{more}); NaN or infinity "
            f"first in: {origin}; {kept}; "
            f"train with a smaller lr than {self.config.lr}, or with warmup"
        )

    def _after_step(self, listener: Listener) -> None:
        config = self.config
        every = config.validate_every or config.validate_epochs * self.loader.batches_per_epoch
        finished = self.step == self.total_steps
        if finished or self.step % every == 0:
            self._validation_due = True
            self._validate_and_save(listener)
        elif config.checkpoint_every and self.step % config.checkpoint_every == 0:
            self.save()

    def _validate_and_save(self, listener: Listener) -> None:
        self.validate(listener)
        self._validation_due = False
        self.save()

    def validate(self, listener: Listener) -> None:
        """Evaluates the validation split, logs it, and keeps the weights where they are the best so far."""
        config = self.config

        def advance(images: int) -> None:
            listener.validating(images)
            self._heed_stop()  # a validation can take minutes, and whoever asked to stop may not wait that long

        evaluation = evaluate(self.model, self.val_set, config.image_size, config.batch, config.workers, advance)
        miou = evaluation.scores.miou
        self.log.append({"step": self.step, "val_loss": evaluation.loss, "miou": miou})
        self._validations_since_best += 1
        if miou > (-1.0 if self.best_miou is None else self.best_miou):  # NaN, where all is void, is never the best
            self._validations_since_best = 0
            self.best_miou = miou
            weights.save(self.folder.best, self.model, self._metadata())
        listener.validated(self, evaluation)

    def save(self) -> None:
        """Writes `last.safetensors`: everything that the next step depends on."""
        metadata = self._metadata() | {"validation_due": self._validation_due}
        weights.save(self.folder.last, self.model, metadata, self.optimiser.state_dict())

    def _metadata(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "miou": self.best_miou,
            "classes": list(self.train_set.names),
            "colours": self.train_set.palette[: self.train_set.classes].tolist(),
            "size": list(self.config.image_size),
            "train_split": _fingerprint(self.train_set),
            "class_weights": self.class_weights,
            "validations_since_best": self._validations_since_best,
        }

    def _load(self) -> None:
        state, momenta, metadata = weights.read(self.folder.last)
        for what, now in (("classes", list(self.train_set.names)), ("train_split", _fingerprint(self.train_set))):
            if metadata.get(what) != now:
                raise CheckpointError(
                    f"{self.folder.last}: the run was started with {what} = {metadata.get(what)}, the data set has "
                    f"{now}; resume with the same --data"
                )
        try:
            self.model.load_state_dict(state)
            self.optimiser.load_state_dict(momenta)
        except CheckpointError as error:
            raise CheckpointError(f"{self.folder.last}: {error}") from error
        self.step, self.best_miou = metadata["step"], metadata["miou"]
        # A run that an earlier version began has neither.
        self.class_weights = metadata.get("class_weights", self.class_weights)
        self._validations_since_best = metadata.get("validations_since_best", 0)
        self._validation_due = metadata["validation_due"]
        self.initialised = f"resumed from {self.folder.last}"


class Throughput:
    """Images per second over the last steps, and the share of time spent waiting for data."""

    def __init__(self, loader: Loader, window: int = 20) -> None:
        self._loader, self._window = loader, window
        self._marks: list[tuple[float, float]] = []  # (time, seconds waited so far)
        self.tick()

    def tick(self) -> None:
        """A step has ended."""
        self._marks = [*self._marks[-self._window :], (perf_counter(), self._loader.waited)]

    @property
    def seconds_per_step(self) -> float:
        """Mean over the window; NaN before the first step."""
        steps = len(self._marks) - 1
        return (self._marks[-1][0] - self._marks[0][0]) / steps if steps else math.nan

    @property
    def waiting(self) -> float:
        """Share of the window's time that training waited for data, 0 to 1."""
        elapsed = self._marks[-1][0] - self._marks[0][0]
        return (self._marks[-1][1] - self._marks[0][1]) / elapsed if elapsed else 0.0


def _fingerprint(dataset: VOCDataset) -> str:
    """The number and the ids of a split's images, so that a resumed run notices another split."""
    digest = hashlib.sha256("\n".join(dataset.ids).encode()).hexdigest()
    return f"{len(dataset)} images with ids of SHA-256 {digest[:12]}"


def _transform(config: Config) -> TrainTransform:
    """How training samples are cut out and coloured."""
    jitter = ColourJitter(config.brightness, config.contrast, config.saturation, config.hue)
    side = (config.short_side[0], config.short_side[1]) if config.short_side else None
    return TrainTransform(config.image_size, config.scale, config.flip, side, jitter)


def _class_weights(config: Config, train_set: VOCDataset) -> list[float]:
    """The weights that the settings ask for, counted in the training masks where they are asked for by name."""
    if config.class_weights == MEDIAN_FREQUENCY:
        return [float(weight) for weight in class_statistics(train_set, config.workers).weights]
    return [float(weight) for weight in config.class_weights]


class _Stopped(Exception):
    """A stop request has been heeded; what is left is to save."""


@contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C (or SIGTERM) sets, so that the step can end; a second one interrupts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def request(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
