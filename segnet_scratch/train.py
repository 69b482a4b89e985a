"""Training, read top-down: batch -> model -> loss -> backward -> update, with validation, checkpoints and resume."""

import hashlib
import logging
import math
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from segnet_scratch import weights
from segnet_scratch.config import MEDIAN_FREQUENCY, NO_VALIDATION, Config
from segnet_scratch.data import Batch, ColourJitter, Loader, TrainTransform, VOCDataset, class_statistics, open_dataset
from segnet_scratch.data.download.install import pretrained_file
from segnet_scratch.data.on_device import DeviceLoader
from segnet_scratch.data.suspicions import look_over
from segnet_scratch.errors import CheckpointError, ConfigError, DeviceMemoryError, TrainingError, of_file
from segnet_scratch.evaluate import Evaluation, evaluate
from segnet_scratch.files import sweep_temporaries, write_durably
from segnet_scratch.inference import Segmenter
from segnet_scratch.memory_check import check_memory
from segnet_scratch.metrics import MetricsLog
from segnet_scratch.nan_guard import first_not_finite
from segnet_scratch.ops.loss.cross_entropy import check_labels
from segnet_scratch.optim import learning_rate
from segnet_scratch.parallel import ALONE, Communicator
from segnet_scratch.parallel.communicator import shares
from segnet_scratch.run_folder import RunFolder
from segnet_scratch.runtime.compilation import compile_for, launched_by
from segnet_scratch.runtime.devices import Device, get_device
from segnet_scratch.runtime.workers import worker_count
from segnet_scratch.segnet import ARCHITECTURES, SegNet
from segnet_scratch.step import Outcome, TrainingStep, resolve

log = logging.getLogger(__name__)

AHEAD = 8  # steps that may be queued on a GPU before the loss of the first of them is read
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Listener:
    """What a training run tells whoever watches it; the command line draws its progress from this."""

    def started(self, trainer: "Trainer") -> None:
        """Everything is loaded; training begins at `trainer.step` of `trainer.total_steps`."""

    def stepped(self, trainer: "Trainer", loss: float, lr: float) -> None:
        """A step has been made."""

    def compiling(self, done: int, total: int) -> None:
        """Before the first step: `done` of the `total` kernels that training and validation need are compiled."""

    def validating(self, images: int) -> None:
        """This many more images of the validation split have been evaluated."""

    def validated(self, trainer: "Trainer", evaluation: Evaluation) -> None:
        """The validation split has been evaluated."""

    def ended(self, trainer: "Trainer") -> None:
        """The run that had `started` is over, whatever ended it."""


class Trainer:
    """One training run: a model, its data, its optimiser, its place in the run.

    `data` is a VOC root or a folder above it. On resume the state of `last.safetensors` is taken up, and metrics
    written after it are dropped. Of several `ranks` each makes a trainer with the same arguments; `batch` counts the
    images of all of them, so that the run is the same with another number of ranks, but for batch norm's statistics.
    The first one alone touches the run folder.
    """

    def __init__(
        self,
        config: Config,
        data: str | Path,
        out: str | Path,
        device: str = "auto",
        resume: bool = False,
        ranks: Communicator = ALONE,
    ) -> None:
        self.folder = folder = RunFolder(Path(out))
        on = get_device(device)
        self.train_set = open_dataset(data, config.train_split, config.cache)
        self.val_set = None if config.val_split == NO_VALIDATION else open_dataset(data, config.val_split, config.cache)
        self.ranks = ranks = ranks.on(on)
        if config.batch // ranks.size < config.accumulate:
            problem = f"{config.batch} images do not give each of {ranks.size} ranks {config.accumulate} parts"
            raise ConfigError(f"batch: {problem}; raise it to {ranks.size * config.accumulate}, or take fewer ranks")
        source = self.train_set, transform_of(config), config.batch
        options: dict[str, Any] = {"seed": config.seed, "drop_last": len(self.train_set) >= config.batch}
        options |= {"skip_bad": config.bad_samples == "skip", "share": (ranks.rank, ranks.size)}
        if config.cache == "device":
            self.loader: Loader = DeviceLoader(*source, on, config.dtype, **options)
        else:
            self.loader = Loader(*source, workers=min(config.workers, worker_count()), **options)
        self.total_steps = config.steps or (config.epochs or 0) * self.loader.batches_per_epoch
        self.model = network_of(config, self.train_set.classes, on)
        if synchronised := config.sync_bn and ranks.size > 1:
            self.model.synchronise_batch_norm(ranks)
        layers_only = config.accumulate > 1 or synchronised
        engine, precision = resolve(self.model, config.engine, config.precision, layers_only)
        self.config = config = replace(config, engine=engine, precision=precision)
        check_memory(self.model, config, ranks)
        self.log = MetricsLog(self.folder.metrics)
        self.step = self._saved_step = self._validations_since_best = 0  # `step` counts the steps made
        self.best_miou: float | None = None
        self.class_weights: list[float] = []  # as numbers, whatever the settings say; empty: all 1
        self._validation_due = False  # a stop request came before the validation of this step was done
        self._listeners: Sequence[Listener] = ()
        self._stop = threading.Event()
        self.initialised = self.init = "He initialisation"  # how this session and how the run began
        self._pending: deque[tuple[Outcome, float]] = deque()  # steps, with lr, whose losses have not been read
        saved = ranks.broadcast(lambda: weights.read(folder.last) if resume and folder.last.exists() else None)
        if saved is None:
            self._begin()
        else:
            self._resume(saved[2])
        self.training = TrainingStep(self.model, engine, precision, config, self.class_weights, ranks)
        if saved is not None:
            with of_file(self.folder.last):
                self.model.load_state_dict(saved[0])
                self.training.optimiser.load_state_dict(saved[1])
        if self.step > self.total_steps:
            asked = f"{self.step} steps have been made, {self.total_steps} are asked for"
            raise ConfigError(f"{self.folder.path}: {asked}; resume with at least as many")
        ranks.broadcast(lambda: self._claim_folder(resume))

    # What it begins from

    def _begin(self) -> None:
        """Begins a run: looks for mistakes in its labels, counts its class weights, initialises its weights."""
        for finding in look_over(self.train_set, self.config.workers) if self.ranks.leads else ():
            log.warning("%s: %s", finding.path, finding.detail)
        self.class_weights = self.ranks.broadcast(lambda: class_weights_of(self.config, self.train_set))
        if file := self.config.init:
            self.initialised = self.init = weights.initialise(self.model, pretrained_file(file), self.train_set.names)

    def _resume(self, metadata: dict[str, Any]) -> None:
        """Goes on where a checkpoint was written; its arrays are loaded later."""
        for what, now in (("classes", list(self.train_set.names)), ("train_split", _fingerprint(self.train_set))):
            if metadata.get(what) != now:
                problem = f"the run was started with {what} = {metadata.get(what)}, the data set has {now}"
                raise CheckpointError(f"{self.folder.last}: {problem}; resume with the same --data")
        self.step, self.best_miou = metadata["step"], metadata["miou"]
        # A run that an earlier version began has neither.
        self.class_weights = metadata.get("class_weights", self.class_weights)
        self._validations_since_best = metadata.get("validations_since_best", 0)
        self._validation_due = metadata.get("validation_due", False)  # `best` has none
        self.initialised, self.init = f"resumed from {self.folder.last}", metadata.get("init", "")
        self._saved_step = self.step

    def _claim_folder(self, resume: bool) -> None:
        with self._folder_lock():
            if not resume:
                self.folder.expect_no_run()
            sweep_temporaries(self.folder.path)
            self.log.truncate_after(self.step, self._validation_due)
            write_durably(self.folder.config, [self.config.to_toml().encode()])

    def _folder_lock(self) -> AbstractContextManager[None]:
        """Locks the folder against other processes, in the one rank that writes there."""
        return self.folder.in_use() if self.ranks.leads else nullcontext()

    # From the first step to the last

    def run(self, *listeners: Listener) -> bool:
        """Trains to the end; True when it is reached, False when a signal (Ctrl-C) ended it after saving.

        The end is the last step, or the validation at which `patience` is exhausted. An error is raised after saving.
        Each of the listeners is told everything, in their order.
        """
        self._listeners = listeners
        with ExitStack() as ends, self._folder_lock(), _stop_requests() as self._stop:
            try:
                for listener in listeners:
                    listener.started(self)
                    ends.callback(listener.ended, self)
                self._compile()
                if self._validation_due:
                    self._validate()
                while self.step < self.total_steps and not self.stopped_early:
                    self._train_epoch()
            except _Stopped:
                self.save()
                return False
            except Exception as error:
                self._rescue(error)
                raise
        return True

    def _tell(self, event: Callable[..., None], *what: Any) -> None:
        """Tells every listener of an event, a method of Listener."""
        for listener in self._listeners:
            getattr(listener, event.__name__)(*what)

    def _compile(self) -> None:
        """Compiles every kernel of this run on all cores; each at its first launch, it would take a minute."""
        if self.model.device.runs_kernels:
            with self._advice():
                kernels = launched_by(self._rehearse)
            compile_for(self.model.device, kernels, partial(self._tell, Listener.compiling))

    def _rehearse(self) -> None:
        """Launches what a step and a validation launch; called where launches are listed and nothing is computed."""
        shape = self._own(self.config.batch), *self.config.image_size
        self.training.write(np.zeros((*shape, 3), self.model.dtype), np.zeros(shape, np.uint8), 0.0)
        self.training.run_eagerly()
        if self.val_set is not None:
            batch, images = self._own(self.config.batch), self._own(len(self.val_set))
            some = range(min(batch, images) + images % batch)  # of both shapes: the last batch may be a smaller one
            for _ in self._segmenter().stream(some, lambda item: (item, np.zeros((8, 8, 3), np.uint8)), workers=0):
                pass

    def _own(self, images: int) -> int:
        """How many of these images are this rank's."""
        return int(shares(images, self.ranks.size)[self.ranks.rank])

    def _segmenter(self) -> Segmenter:
        """What validation predicts with: the network as it is now."""
        config, batch = self.config, self._own(self.config.batch)
        return Segmenter(self.model, config.image_size, None, config.engine, config.precision, batch)

    def _rescue(self, error: Exception) -> None:
        """Saves what has been trained before an error ends the run, unless it is the training that went wrong."""
        self.ranks.fail(error)  # the ranks that wait for this one get an error, and save, too
        if isinstance(error, _NotFinite):
            return
        try:
            self._read_losses(0, rescuing=True)  # the device finishes the steps that it was given
            if self.step == self._saved_step or not self.ranks.leads:
                return
            self._validation_due = self._validation_due or self._validates
            self._write_checkpoint()
        except Exception as second:
            log.warning("what was trained since step %d could not be saved: %s", self._saved_step, second)
        else:
            log.warning("saved at step %d; go on with the same command and --resume", self.step)

    @property
    def stopped_early(self) -> bool:
        """Has the validation mIoU not risen for as many validations as `patience` allows?"""
        return 0 < self.config.patience <= self._validations_since_best

    def _train_epoch(self) -> None:
        """The rest of the epoch that the next step belongs to."""
        with self._advice(), closing(self._batches(self._issued)) as batches:
            for batch in batches:
                self._begin_step(batch)
                self._read_losses(AHEAD if self._issued < self._next_stop else 0)
                if not self._pending:
                    self._after_step()
                if self.step == self.total_steps or self.stopped_early:
                    break
                if self._asked_to_stop:
                    self._read_losses(0)
                    raise _Stopped

    # Batches

    @contextmanager
    def _advice(self) -> Iterator[None]:
        """Adds to an error for lack of memory what to try."""
        try:
            yield
        except DeviceMemoryError as error:
            batch, parts, (height, width) = self.config.batch, self.config.accumulate, self.config.image_size
            smaller = f"a smaller size or width, such as --set width={self.config.width / 2:g}"
            if batch > parts:
                smaller = f"--set batch={batch // 2}"
                if self.config.engine == "layers":  # the fused engine takes a batch whole
                    smaller += f", or --set accumulate={min(2 * parts, batch)}"
            tried = f"a batch of {batch} at {height}x{width} is too large here: try {smaller}"
            raise DeviceMemoryError(f"{error}; {tried}", error.asked, error.free) from error

    def _batches(self, step: int) -> Generator[Batch, None, None]:
        """The batches of an epoch, on the device, from that of a step on."""
        epoch, position = divmod(step, self.loader.batches_per_epoch)
        return self._on_device(self.loader.epoch(epoch, start_batch=position))

    def _on_device(self, batches: Generator[Batch, None, None]) -> Generator[Batch, None, None]:
        """The batches with their arrays on the device; a GPU gets each one while it works on the one before."""
        model, counted = self.model, self.config.accumulate > 1 or self.ranks.size > 1
        if isinstance(self.loader, DeviceLoader):  # its batches are there already
            with closing(batches):
                yield from batches
            return

        def arrays(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
            return batch.images.astype(model.dtype, copy=False), check_labels(batch.labels, model.classes)

        with closing(batches), closing(model.device.prefetch(batches, arrays)) as uploaded:
            for batch, (images, labels) in uploaded:
                # A step in parts, or of several ranks, counts the labels of each, where they still are.
                yield replace(batch, images=images, labels=batch.labels if counted else labels)

    # Steps, and their losses

    @property
    def _asked_to_stop(self) -> bool:
        """Has one of the ranks been asked to?"""
        return self.ranks.any(self._stop.is_set())

    @property
    def _issued(self) -> int:
        """Steps that the device has been given."""
        return self.step + len(self._pending)

    def _begin_step(self, batch: Batch) -> None:
        """Queues a step on the device, and waits for nothing."""
        number, lr = self._issued, learning_rate(self._issued, self.total_steps, self.config)
        self.training(batch.images, batch.labels, lr, number)
        self._pending.append((self.training.read(), lr))

    def _read_losses(self, ahead: int, rescuing: bool = False) -> None:
        """Reads the losses and norms that have arrived, in order; waits until at most `ahead` steps are pending.

        TrainingError where one is not finite: that step, and all after it, have changed nothing on the device. With
        `rescuing`, a row of metrics.jsonl that cannot be written is given up.
        """
        in_step = self.ranks.size > 1 and self.model.device.gpu is not None  # ranks read the same steps at once
        while self._pending and (len(self._pending) > ahead or (not in_step and self._pending[0][0].ready)):
            outcome, lr = self._pending[0]
            loss, norm = outcome.get()
            # One element of a gradient that is not finite makes the norm so.
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise _NotFinite(self._not_finite(loss, norm))
            try:
                self._note({"step": self.step + 1, "loss": loss, "lr": lr})
            except TrainingError as error:
                if not rescuing:
                    raise
                log.warning("step %d has no row: %s", self.step + 1, error)
            self._pending.popleft()
            self.step += 1
            if not rescuing:
                self._tell(Listener.stepped, self, loss, lr)

    def _note(self, row: dict[str, Any]) -> None:
        if self.ranks.leads:
            self.log.append(row)

    def _not_finite(self, loss: float, norm: float) -> str:
        """What is wrong with the first pending step: its gradients are computed once more, by itself."""
        last = self.folder.last
        kept = f"{last} holds the last saved state" if last.exists() else "there is no checkpoint"
        gradients = f"the norm of the gradients is {norm}: " if math.isfinite(loss) else ""
        with closing(self._batches(self.step)) as batches:
            batch = next(batches)
            self.model.synchronise_batch_norm(ALONE)  # which would carry it from rank to rank
            try:
                self.training.gradients(batch.images, batch.labels, self.step)
                origin = first_not_finite(self.model, batch.images) or ""
            except DeviceMemoryError:  # the layers need more than the fused engine, whose arrays are still there
                origin = "not looked for, as memory does not suffice"
        found = self.ranks.all_gather((origin, self.ranks.label, batch.ids))
        origin, where, ids = next((one for one in found if one[0]), ("loss", *found[0][1:]))
        more = ", ..." if len(ids) > 4 else ""
        return (
            f"{gradients}the loss is {loss} at step {self.step + 1} ({where}images {', '.join(ids[:4])}{more}); NaN or "
            f"infinity first in: {origin}; {kept}; train with a smaller lr than {self.config.lr}, or with warmup"
        )

    # Validation

    @property
    def _validation_interval(self) -> int:
        """Steps from one validation to the next."""
        return self.config.validate_every or self.config.validate_epochs * self.loader.batches_per_epoch

    @property
    def _validates(self) -> bool:
        """Is a validation to follow the last step?"""
        return self.step == self.total_steps or self.step % self._validation_interval == 0

    @property
    def _next_stop(self) -> int:
        """The next step after which the losses are needed: a validation, a checkpoint, or the end."""
        intervals = self._validation_interval, self.config.checkpoint_every or self.total_steps
        return min(self.total_steps, *((self.step // every + 1) * every for every in intervals))

    def _after_step(self) -> None:
        if self._validates:
            self._validate()
        elif self.config.checkpoint_every and self.step % self.config.checkpoint_every == 0:
            self.save()

    def _validate(self) -> None:
        """Evaluates the validation split, if any, and saves; one that is interrupted is due again on resume."""
        before = self.best_miou, self._validations_since_best
        self._validation_due = True
        try:
            if self.val_set is not None:
                self._average_statistics()
                options = self.config.workers, self._validating, self.config.bad_samples == "skip", self.ranks
                self._judge(evaluate(self._segmenter(), self.val_set, None, *options))
        except BaseException:
            self.best_miou, self._validations_since_best = before
            raise
        self._validation_due = False
        self.save()

    def _validating(self, images: int) -> None:
        self._tell(Listener.validating, images)
        if self._asked_to_stop:  # a validation can take minutes, and whoever asked to stop may not wait that long
            raise _Stopped

    def _judge(self, evaluation: Evaluation) -> None:
        """Logs a validation, and saves the weights as `best` where they are."""
        miou = evaluation.scores.miou
        self._note({"step": self.step, "val_loss": evaluation.loss, "miou": miou})
        self._validations_since_best += 1
        if miou > (-1.0 if self.best_miou is None else self.best_miou):  # NaN, where all is void, is never the best
            self._validations_since_best = 0
            self.best_miou = miou
            if self.ranks.leads:
                weights.save(self.folder.best, self.model, self._metadata())
        self._tell(Listener.validated, self, evaluation)

    # Checkpoints

    def _average_statistics(self) -> None:
        """Gives all ranks the mean of their running statistics of batch norm.

        The same as running statistics of each step's mean over the ranks: they are linear in a batch's statistics.
        """
        if self.ranks.size == 1 or self.config.sync_bn:
            return
        device, buffers = self.model.device, [buffer.data for buffer in self.model.named_buffers().values()]
        self.ranks.collectives.all_reduce(device, buffers)
        for buffer in buffers:
            device.write(buffer, device.download(buffer) / self.ranks.size)
        self.training.optimiser.refresh()

    def save(self) -> None:
        """Writes `last.safetensors`: everything that the next step depends on; all ranks agree on the step first."""
        self._average_statistics()
        steps = self.ranks.all_gather(self.step)
        if len(set(steps)) > 1:
            raise TrainingError(f"{self.folder.last}: the ranks have made {steps} steps, expected as many each")
        if self.ranks.leads:
            self._write_checkpoint()

    def _write_checkpoint(self) -> None:
        metadata = self._metadata() | {"validation_due": self._validation_due}
        weights.save(self.folder.last, self.model, metadata, self.training.optimiser.state_dict())
        self._saved_step = self.step

    def _metadata(self) -> dict[str, Any]:
        data, size = self.train_set, list(self.config.image_size)
        place = {"step": self.step, "miou": self.best_miou, "validations_since_best": self._validations_since_best}
        began = {"init": self.init, "train_split": _fingerprint(data), "class_weights": self.class_weights}
        shown = {"classes": list(data.names), "colours": data.palette[: data.classes].tolist(), "size": size}
        return place | began | shown


# What the settings ask for


def network_of(config: Config, classes: int, device: Device) -> SegNet:
    """The network that the settings ask for, its weights at random."""
    rung = "tf32" if config.precision == "tf32" else None
    options = {name: getattr(config, name) for name in ("dropout", "decoder", "pooling", "seed", "dtype")}
    return ARCHITECTURES[config.model](classes, config.width, device, **options, rung=rung)


def _fingerprint(dataset: VOCDataset) -> str:
    """The number and the ids of a split's images, so that a resumed run notices another split."""
    digest = hashlib.sha256("\n".join(dataset.ids).encode()).hexdigest()
    return f"{len(dataset)} images with ids of SHA-256 {digest[:12]}"


def transform_of(config: Config) -> TrainTransform:
    """The augmentation of training samples that the settings ask for."""
    jitter = ColourJitter(config.brightness, config.contrast, config.saturation, config.hue)
    side = (config.short_side[0], config.short_side[1]) if config.short_side else None
    return TrainTransform(config.image_size, config.scale, config.flip, side, jitter)


def class_weights_of(config: Config, train_set: VOCDataset) -> list[float]:
    """The weights that the settings ask for, counted in the training masks where they are asked for by name."""
    given: Sequence[Any] = config.class_weights
    if given == MEDIAN_FREQUENCY:
        given = class_statistics(train_set, config.workers).weights.tolist()
    elif given and len(given) != train_set.classes:
        problem = f"{len(given)} numbers for {train_set.classes} classes"
        raise ConfigError(f"class_weights: {problem}; give one for each class")
    return list(given)


# Ends


class _NotFinite(TrainingError):
    """A step whose loss or gradients are not finite: the one error after which nothing is to be saved."""


class _Stopped(Exception):
    """Ends the loops after a stop request; what is left is to save."""


@contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C (or SIGTERM, SIGHUP) sets, so that the step can end; another interrupts at once.

    Only Ctrl-C: a terminal that closes, and many a batch system, sends the other two more than once.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def request(number: int, frame: FrameType | None) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    with ExitStack() as former:
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # what is ignored stays so, as SIGHUP behind nohup
                former.callback(signal.signal, number, signal.signal(number, request))
        yield stop
