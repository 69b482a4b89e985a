"""The settings of a training run: one flat table, read from TOML, checked once, written back with comments.

A value comes from the default, then the configuration file, then each `--set key=value` in order; the later
one wins. The resolved settings lie in the run folder as config.toml, so that a run can be repeated and
resumed.
"""

import difflib
import math
import os
import re
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from inspect import getdoc
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, NamedTuple, get_args, get_origin

from segnet_scratch.errors import ConfigError, of_file

MINIMUM_SIZE = 32  # five 2x2 pools leave one position of a 32-pixel side
DEFAULT_EPOCHS = 100
_LARGEST_INTEGER = 2**63 - 1  # TOML's integers are signed 64-bit

# Each of the two says how long to train, so setting one takes the other back.
_LENGTH = ("epochs", "steps")
# These change neither the weights nor the order of the samples, so a resumed run may differ in them.
_SAFE_ON_RESUME = {"checkpoint_every", "validate_every", "validate_epochs", "patience", "workers", "cache"}
# Nor does this, but at samples that end a run which does not leave them out.
_SAFE_ON_RESUME |= {"bad_samples"}

MEDIAN_FREQUENCY = "median-frequency"
NO_VALIDATION = "none"
AUTO = "auto"  # engine and precision that suit network and device; a run keeps what it began with
ENGINES = (AUTO, "layers", "fused")
PRECISIONS = (AUTO, "float32", "tf32", "bf16")
# Weights that `init` knows by name: torchvision's files, named by the first digits of their SHA-256, and their bytes.
PRETRAINED = {"vgg16": ("vgg16-397923af.pth", 553_433_881), "vgg16-bn": ("vgg16_bn-6c64b313.pth", 553_507_836)}


class _Rule(NamedTuple):
    """The values that a setting takes, of those of its type: in words, and as a test."""

    expected: str
    accepts: Callable[[Any], bool] = lambda value: True


def _one_of(*choices: str) -> _Rule:
    return _Rule(" or ".join(f'"{choice}"' for choice in choices), choices.__contains__)


def _at_least(minimum: int) -> _Rule:
    return _Rule(f"an integer of at least {minimum}", lambda n: n >= minimum)


_Switch = Annotated[bool, _Rule("true or false")]
_Count = Annotated[int, _at_least(1)]
_Natural = Annotated[int, _at_least(0)]
_Length = Annotated[int | None, _at_least(1)]
_Above0 = Annotated[float, _Rule("a finite number above 0", lambda x: x > 0)]
_NotNegative = Annotated[float, _Rule("a finite number of at least 0", lambda x: x >= 0)]
_Below1 = Annotated[float, _Rule("a finite number in [0, 1)", lambda x: 0 <= x < 1)]
_Between = Annotated[float, _Rule("a finite number in (0, 1)", lambda x: 0 < x < 1)]
_Share = Annotated[float, _Rule("a finite number in [0, 1]", lambda x: 0 <= x <= 1)]
_Turn = Annotated[float, _Rule("a finite number in [0, 0.5]", lambda x: 0 <= x <= 0.5)]
_File = Annotated[str, _Rule("the path of a file, in printable Unicode", str.isprintable)]
_Range = _Rule("[low, high], two finite numbers with 0 < low <= high", lambda pair: 0 < pair[0] <= pair[1])
_LIST = _Rule(
    "the name of a list in ImageSets/Segmentation",
    lambda name: name.isprintable() and name and not set(name) & set("/\\: "),
)
_IMAGE_SIZE = _Rule(
    f"an integer or [height, width], each at least {MINIMUM_SIZE}",
    lambda size: min(size if isinstance(size, tuple) else (size,)) >= MINIMUM_SIZE,
)
_SHORT_SIDE = _Rule(
    f"[] or [low, high], two integers with {MINIMUM_SIZE} <= low <= high",
    lambda sides: not sides or (len(sides) == 2 and MINIMUM_SIZE <= sides[0] <= sides[1]),
)
# A number of steps has no fraction, and shares would be compared with steps if both stood in one list.
_LR_STEPS = _Rule(
    "a rising list, either of shares of the training below 1 or of whole steps",
    lambda steps: (
        list(steps) == sorted({at for at in steps if at > 0})
        and (all(at < 1 for at in steps) or all(at == int(at) for at in steps))
    ),
)
_CLASS_WEIGHTS = _Rule(
    f'a list of finite numbers of at least 0, not all of them 0, or "{MEDIAN_FREQUENCY}"',
    lambda w: w == MEDIAN_FREQUENCY if isinstance(w, str) else min(w, default=0) >= 0 and (not w or any(w)),
)


def _of_type(kind: Any, value: Any) -> Any:
    """A value as its annotation has it; ValueError where it is of another type, or no number that TOML can hold."""
    for option in get_args(kind) if isinstance(kind, UnionType) else (kind,):
        if get_origin(option) is tuple:
            element, end = get_args(option)[0], get_args(option)[-1]
            if isinstance(value, list | tuple) and (end is Ellipsis or len(value) == len(get_args(option))):
                return tuple(_of_type(element, item) for item in value)
        elif isinstance(value, bool) and option is not bool:
            continue  # a subclass of int: `batch = true` does not mean a batch of 1
        elif option is float and isinstance(value, int | float) and math.isfinite(value):
            return float(value)
        elif option is not float and isinstance(value, option) and (option is not int or value <= _LARGEST_INTEGER):
            return value
    raise ValueError


@dataclass(frozen=True)
class Config:
    """Settings of one training run, checked and normalised: an object that exists is a valid one.

    Integers are taken where a number is meant, lists become tuples, and a square [n, n] becomes n. With
    neither `epochs` nor `steps` given, `epochs` is 100; exactly one of the two is None.

    Raises ConfigError for a value of the wrong type or out of range, and for both `epochs` and `steps` given.

    What each one means; --help, the comments of config.toml and the report quote it from here:

    model: network: the VGG16 form or the small SegNet-Basic
    decoder: how the decoder enlarges its maps: by pooling indices, or without them (bilinear, or learned:
        deconv)
    pooling: pools of maps with an odd side: ceil has a window for the last row, as the authors, floor none, as
        PyTorch
    width: multiplier for the channels of each layer
    dropout: dropout 0.5 in the deepest stages (Bayesian SegNet)
    dtype: element type of the network; float64 is for comparing devices, at half the speed
    engine: what computes a training step: layers, one op after the other; or fused, few large kernels on one
        arena (needs channels in multiples of 8, decoder indices, no dropout; on a GPU sm_80); auto: fused on a
        GPU where it can, else layers
    precision: how convolutions multiply: as exactly as float32, or by tensor cores in tf32 or, with the fused
        engine, bfloat16; auto: bf16 with the fused engine on a GPU, else float32
    size: training image size in pixels: one integer for a square, or [height, width]
    batch: images per step, of all ranks together
    accumulate: parts in which a batch goes through the network, their gradients added up: less memory, the same
        step but for batch norm, which sees one part at a time
    sync_bn: with several ranks: batch norm over the batch of all of them, as of one process; else each over its
        own share
    gradient_sum: with several ranks: how gradients go between them; bf16 is half the bytes and rounds them to 8
        bits
    epochs: length of training in passes over the training set (100 if steps is not given)
    steps: length of training in steps, instead of epochs (the later one given wins)
    lr: learning rate
    momentum: momentum of SGD
    decay: weight decay
    bias_lr: multiplier for the learning rate of biases (the authors use 2)
    encoder_lr: multiplier for the learning rate of the encoder; 0 freezes it
    schedule: learning rate over time: constant, times lr_gamma at each of lr_steps, or falling as (1 -
        t)^poly_power
    lr_steps: where the "step" schedule lowers the learning rate: steps, or below 1 shares of the training, as
        [0.6, 0.9]
    lr_gamma: factor of the "step" schedule at each of lr_steps
    poly_power: exponent of the "poly" schedule
    warmup: steps over which the learning rate rises to lr at the start
    clip_norm: largest Euclidean norm of all gradients together, longer ones are scaled down to it; 0: no limit
    loss_normalisation: divide the loss by the sum of the weights (as PyTorch) or by the valid pixels (as the
        authors)
    class_weights: loss weight of each class, one number per class; empty: all 1; "median-frequency": from the
        training masks, rare classes weigh more
    label_smoothing: share of each label that is spread over all classes
    scale: range of the random scale of a training image, [low, high]
    short_side: in place of scale: range of the random length in pixels of an image's shorter side, [low, high],
        its aspect kept; size is then cut out of it
    flip: mirror half of the training images at random
    brightness: largest random change of brightness, as a share: 0.2 is 80 % to 120 %
    contrast: largest random change of contrast, as a share
    saturation: largest random change of colour saturation, as a share
    hue: largest random turn of the hue, as a share of the colour circle
    init: weights to start from (--init): a file of VGG16's under torchvision's names, "vgg16" or "vgg16-bn" to
        download it, or a checkpoint; empty: at random
    train_split: list of the images to train on
    val_split: list of the images to validate on; "none": do not validate
    bad_samples: what a training image that cannot be read does: stop the run, or be left out
    seed: seed of the initial weights, the order of samples, transforms and dropout
    workers: threads that prepare samples, at most one a core; 0: the training thread itself
    cache: where decoded samples are kept for the next epoch: nowhere, in memory, on disk for later runs, too,
        or on the device, which then makes the batches itself
    checkpoint_every: steps between checkpoints; 0: only after each validation and at the end
    validate_every: steps between validations; 0: every validate_epochs epochs
    validate_epochs: epochs between validations, where validate_every is 0
    patience: validations without a better mIoU after which training ends early; 0: never
    """

    model: Annotated[str, _one_of("segnet", "segnet-basic")] = "segnet"
    decoder: Annotated[str, _one_of("indices", "bilinear", "deconv")] = "indices"
    pooling: Annotated[str, _one_of("ceil", "floor")] = "ceil"
    width: _Above0 = 1.0
    dropout: _Switch = False
    dtype: Annotated[str, _one_of("float32", "float64")] = "float32"
    engine: Annotated[str, _one_of(*ENGINES)] = AUTO
    precision: Annotated[str, _one_of(*PRECISIONS)] = AUTO
    size: Annotated[int | tuple[int, int], _IMAGE_SIZE] = 224
    batch: _Count = 4
    accumulate: _Count = 1
    sync_bn: _Switch = False
    gradient_sum: Annotated[str, _one_of("float32", "bf16")] = "float32"
    epochs: _Length = None
    steps: _Length = None
    lr: _Above0 = 1e-3
    momentum: _Below1 = 0.9
    decay: _NotNegative = 5e-4
    bias_lr: _NotNegative = 1.0
    encoder_lr: _NotNegative = 1.0
    schedule: Annotated[str, _one_of("constant", "step", "poly")] = "constant"
    lr_steps: Annotated[tuple[float, ...], _LR_STEPS] = ()
    lr_gamma: _Between = 0.1
    poly_power: _Above0 = 0.9
    warmup: _Natural = 0
    clip_norm: _NotNegative = 0.0
    loss_normalisation: Annotated[str, _one_of("weights", "valid")] = "weights"
    class_weights: Annotated[str | tuple[float, ...], _CLASS_WEIGHTS] = ()
    label_smoothing: _Below1 = 0.0
    scale: Annotated[tuple[float, float], _Range] = (1.0, 1.25)
    short_side: Annotated[tuple[int, ...], _SHORT_SIDE] = ()
    flip: _Switch = True
    brightness: _Share = 0.0
    contrast: _Share = 0.0
    saturation: _Share = 0.0
    hue: _Turn = 0.0
    init: _File = ""
    train_split: Annotated[str, _LIST] = "train"
    val_split: Annotated[str, _LIST] = "val"
    bad_samples: Annotated[str, _one_of("stop", "skip")] = "stop"
    seed: _Natural = 0
    workers: _Natural = 8
    cache: Annotated[str, _one_of("none", "memory", "disk", "device")] = "none"
    checkpoint_every: _Natural = 500
    validate_every: _Natural = 0
    validate_epochs: _Count = 1
    patience: _Natural = 0

    def __post_init__(self) -> None:
        for setting in fields(self):
            (kind, rule), value = get_args(setting.type), getattr(self, setting.name)
            try:
                converted = _of_type(kind, value)
                if converted is not None and not rule.accepts(converted):
                    raise ValueError
            except (ValueError, OverflowError):  # OverflowError: an integer too large for a float
                example = toml_value(DEFAULT_EPOCHS if setting.default is None else setting.default)
                fix = f"correct it, for example {setting.name} = {example}"
                raise _unexpected(setting.name, rule.expected, repr(value), fix) from None
            object.__setattr__(self, setting.name, converted)
        # A square has one spelling, so that 224 and [224, 224] count as the same setting on resume.
        if isinstance(self.size, tuple) and self.size[0] == self.size[1]:
            object.__setattr__(self, "size", self.size[0])
        if self.epochs is None and self.steps is None:
            object.__setattr__(self, "epochs", DEFAULT_EPOCHS)
        elif self.epochs is not None and self.steps is not None:
            got = f"epochs = {self.epochs} and steps = {self.steps}"
            raise _unexpected("epochs and steps", "one of the two", got, "remove one")
        if self.schedule == "step" and not self.lr_steps:
            raise _unexpected('schedule = "step"', "lr_steps", "none", "add for example lr_steps = [0.6, 0.9]")
        if self.engine == "layers" and self.precision == "bf16":
            raise _unexpected('precision = "bf16"', "the fused engine", "layers", 'add engine = "fused"')
        if self.dtype == "float64" and self.gradient_sum == "bf16":
            raise _unexpected('gradient_sum = "bf16"', 'dtype = "float32"', "float64", "leave one out")
        if self.engine == "fused" and self.accumulate > 1:
            fix = "it needs less memory, so a whole batch may fit"
            raise _unexpected('engine = "fused"', "accumulate = 1", f"{self.accumulate} parts", fix)
        if self.patience and self.val_split == NO_VALIDATION:
            where = f'val_split = "{NO_VALIDATION}"'
            raise _unexpected(where, "patience = 0", str(self.patience), "it counts validations")
        if self.accumulate > self.batch:
            got, fix = f"{self.accumulate} parts of {self.batch} images", f"take for example accumulate = {self.batch}"
            raise _unexpected("accumulate", "at most the batch", got, fix)

    @property
    def image_size(self) -> tuple[int, int]:
        """The training image size as (height, width) in pixels."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    def to_toml(self) -> str:
        """The settings as TOML, each under a comment with its meaning; load_config reads it back equal."""
        given = [row for row in _rows(self) if row[1] != "-"]  # TOML has no null: the key is left out
        return "\n".join(f"# {meaning}\n{name} = {value}\n" for name, value, meaning in given)


def _rows(config: Config) -> list[tuple[str, str, str]]:
    """Key, value in TOML ("-" for none) and meaning of each setting, in the order of the configuration file."""
    meanings = dict(re.findall(r"^(\w+): (.+(?:\n .+)*)", getdoc(Config) or "", re.MULTILINE))
    values = {setting.name: getattr(config, setting.name) for setting in fields(config)}
    told = {name: "-" if value is None else toml_value(value) for name, value in values.items()}
    return [(name, value, " ".join(meanings.get(name, "").split())) for name, value in told.items()]


def describe() -> list[tuple[str, str, str]]:
    """One row (key, default in TOML, meaning) for each setting, in the order of the configuration file."""
    return _rows(Config())


def load_config(path: str | os.PathLike[str] | Sequence[Path] | None, overrides: Sequence[str] = ()) -> Config:
    """Settings from TOML files, or the defaults where there is none, changed by overrides in order.

    Of several files the later one wins, key by key.

    The value of an override is read as TOML (`lr=1e-2`, `size=[96,128]`, `flip=false`); a bare word is a
    string (`model=segnet-basic`).

    Raises ConfigError for a file that is missing, unreadable or no valid TOML (with the line), an unknown key
    (with the nearest known one), a value of the wrong type or out of range, and an override that is not
    `key=value`.
    """
    values: dict[str, Any] = {}
    paths = [] if path is None else [Path(path)] if isinstance(path, str | os.PathLike) else path
    for file in paths:
        found = _read_toml(file)
        with of_file(file):
            values = _over(values, found)
            Config(**found)  # by itself, so that the error can name the file
    for override in overrides:
        values = _over(values, _parse_override(override))
    return Config(**values)


def _over(values: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """The values with later ones over them; a length takes the place of the other. ConfigError for unknown keys."""
    known = [setting.name for setting in fields(Config)]
    for key in later:
        if key not in known:
            near = difflib.get_close_matches(key.lower().replace("-", "_"), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(known)}."
            raise ConfigError(f"unknown setting {key!r}; {hint}")
    replaced = _LENGTH if set(later) & set(_LENGTH) else ()
    return {key: value for key, value in values.items() if key not in replaced} | later


def difference(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """The settings that differ, as {key: (old value, new value)}; a setting that is not given is None."""
    pairs = {setting.name: (getattr(old, setting.name), getattr(new, setting.name)) for setting in fields(old)}
    return {key: (before, after) for key, (before, after) in pairs.items() if before != after}


def check_resume(old: Config, new: Config) -> None:
    """Raise ConfigError unless a run started with `old` may go on with `new` as if it had never stopped.

    Legal changes are how often to save and validate, when to give up, the number of workers and the length of
    training. Where the schedule depends on the length ("poly", "step" at shares of it), the length may not change.
    """
    bound = any(c.schedule == "poly" or (c.schedule == "step" and c.lr_steps[0] < 1) for c in (old, new))
    safe = _SAFE_ON_RESUME if bound else _SAFE_ON_RESUME.union(_LENGTH)
    if "device" in (old.cache, new.cache):  # whose batches are rounded otherwise
        safe = safe - {"cache"}
    changed = {key: values for key, values in difference(old, new).items() if key not in safe}
    if changed:
        listing = ", ".join(f"{key} (was {before!r}, now {after!r})" for key, (before, after) in changed.items())
        fix = "resume with the old values or start a new run folder"
        if set(changed) <= set(_LENGTH):
            fix = (
                f'the learning rates of the steps made would have been others, as "{new.schedule}" goes by shares of '
                "the whole length; train as long as planned, or start a new run with --init of the last checkpoint"
            )
        raise _unexpected("resume", "the settings that the run started with", f"other values of {listing}", fix)


def init_setting(init: str | Path) -> str:
    """What the setting `init` is for `--init`: a name of PRETRAINED, else the path from the root."""
    return str(init) if str(init) in PRETRAINED else os.path.realpath(init)


def toml_value(value: Any) -> str:
    """One value as TOML on one line (tomli_w gives each element of a list a line of its own)."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    import tomli_w  # only who writes settings needs it

    return tomli_w.dumps({"value": value}).removeprefix("value = ").strip()


def _unexpected(what: str, expected: str, got: str, fix: str) -> ConfigError:
    return ConfigError(f"{what}: expected {expected}, got {got}; {fix}.")


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        # utf-8-sig, because some editors put a byte order mark in front, which tomllib refuses.
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise _unexpected(f"{path}", "a TOML configuration file", str(error.strerror), "check the path") from error
    except (ValueError, RecursionError) as error:  # ValueError covers TOMLDecodeError and UnicodeDecodeError
        raise ConfigError(f"{path}: expected valid TOML, got: {error}; correct the file.") from error


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, text = (part.strip() for part in override.partition("="))
    if not equals or not key or not text:
        raise _unexpected(f"--set {override}", "key=value", repr(override), "write for example lr=0.01")
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        parsed = {"value": text} if re.fullmatch(r"[A-Za-z_][\w-]*", text) else {}
    if list(parsed) != ["value"]:
        fix = "write for example lr=0.01, size=[96,128] or flip=false"
        raise _unexpected(f"--set {override}", "a TOML value after the '='", repr(text), fix)
    return {key: parsed["value"]}
