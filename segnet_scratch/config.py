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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, get_args, get_origin

from segnet_scratch.errors import ConfigError

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


_SWITCH = _Rule("true or false")
_ABOVE_0 = _Rule("a finite number above 0", lambda x: x > 0)
_NOT_NEGATIVE = _Rule("a finite number of at least 0", lambda x: x >= 0)
_BELOW_1 = _Rule("a finite number in [0, 1)", lambda x: 0 <= x < 1)
_SHARE = _Rule("a finite number in [0, 1]", lambda x: 0 <= x <= 1)
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


def _setting(default: Any, rule: _Rule, meaning: str) -> Any:
    return field(default=default, metadata={"rule": rule, "help": meaning})


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
    """

    model: str = _setting(
        "segnet", _one_of("segnet", "segnet-basic"), "network: the VGG16 form or the small SegNet-Basic"
    )
    decoder: str = _setting(
        "indices",
        _one_of("indices", "bilinear", "deconv"),
        "how the decoder enlarges its maps: by pooling indices, or without them (bilinear, or learned: deconv)",
    )
    pooling: str = _setting(
        "ceil",
        _one_of("ceil", "floor"),
        "pools of maps with an odd side: ceil has a window for the last row, as the authors, floor none, as PyTorch",
    )
    width: float = _setting(1.0, _ABOVE_0, "multiplier for the channels of each layer")
    dropout: bool = _setting(False, _SWITCH, "dropout 0.5 in the deepest stages (Bayesian SegNet)")
    dtype: str = _setting(
        "float32",
        _one_of("float32", "float64"),
        "element type of the network; float64 is for comparing devices, at half the speed",
    )
    engine: str = _setting(
        AUTO,
        _one_of(*ENGINES),
        "what computes a training step: layers, one op after the other; or fused, few large kernels on one arena "
        "(needs channels in multiples of 8, decoder indices, no dropout; on a GPU sm_80); auto: fused on a GPU where "
        "it can, else layers",
    )
    precision: str = _setting(
        AUTO,
        _one_of(*PRECISIONS),
        "how convolutions multiply: as exactly as float32, or by tensor cores in tf32 or, with the fused engine, "
        "bfloat16; auto: bf16 with the fused engine on a GPU, else float32",
    )
    size: int | tuple[int, int] = _setting(
        224, _IMAGE_SIZE, "training image size in pixels: one integer for a square, or [height, width]"
    )
    batch: int = _setting(4, _at_least(1), "images per step, of all ranks together")
    accumulate: int = _setting(
        1,
        _at_least(1),
        "parts in which a batch goes through the network, their gradients added up: less memory, the same step but for "
        "batch norm, which sees one part at a time",
    )
    sync_bn: bool = _setting(
        False,
        _SWITCH,
        "with several ranks: batch norm over the batch of all of them, as of one process; else each over its own share",
    )
    gradient_sum: str = _setting(
        "float32",
        _one_of("float32", "bf16"),
        "with several ranks: how gradients go between them; bf16 is half the bytes and rounds them to 8 bits",
    )
    epochs: int | None = _setting(
        None,
        _at_least(1),
        f"length of training in passes over the training set ({DEFAULT_EPOCHS} if steps is not given)",
    )
    steps: int | None = _setting(
        None, _at_least(1), "length of training in steps, instead of epochs (the later one given wins)"
    )
    lr: float = _setting(1e-3, _ABOVE_0, "learning rate")
    momentum: float = _setting(0.9, _BELOW_1, "momentum of SGD")
    decay: float = _setting(5e-4, _NOT_NEGATIVE, "weight decay")
    bias_lr: float = _setting(1.0, _NOT_NEGATIVE, "multiplier for the learning rate of biases (the authors use 2)")
    encoder_lr: float = _setting(1.0, _NOT_NEGATIVE, "multiplier for the learning rate of the encoder; 0 freezes it")
    schedule: str = _setting(
        "constant",
        _one_of("constant", "step", "poly"),
        "learning rate over time: constant, times lr_gamma at each of lr_steps, or falling as (1 - t)^poly_power",
    )
    lr_steps: tuple[float, ...] = _setting(
        (),
        _LR_STEPS,
        'where the "step" schedule lowers the learning rate: steps, or below 1 shares of the training, as [0.6, 0.9]',
    )
    lr_gamma: float = _setting(
        0.1,
        _Rule("a finite number in (0, 1)", lambda x: 0 < x < 1),
        'factor of the "step" schedule at each of lr_steps',
    )
    poly_power: float = _setting(0.9, _ABOVE_0, 'exponent of the "poly" schedule')
    warmup: int = _setting(0, _at_least(0), "steps over which the learning rate rises to lr at the start")
    clip_norm: float = _setting(
        0.0,
        _NOT_NEGATIVE,
        "largest Euclidean norm of all gradients together, longer ones are scaled down to it; 0: no limit",
    )
    loss_normalisation: str = _setting(
        "weights",
        _one_of("weights", "valid"),
        "divide the loss by the sum of the weights (as PyTorch) or by the valid pixels (as the authors)",
    )
    class_weights: str | tuple[float, ...] = _setting(
        (),
        _CLASS_WEIGHTS,
        f'loss weight of each class, one number a class; empty: all 1; "{MEDIAN_FREQUENCY}": from the training masks, '
        "rare classes weigh more",
    )
    label_smoothing: float = _setting(0.0, _BELOW_1, "share of each label that is spread over all classes")
    scale: tuple[float, float] = _setting(
        (1.0, 1.25),
        _Rule("[low, high], two finite numbers with 0 < low <= high", lambda pair: 0 < pair[0] <= pair[1]),
        "range of the random scale of a training image, [low, high]",
    )
    short_side: tuple[int, ...] = _setting(
        (),
        _SHORT_SIDE,
        "in place of scale: range of the random length in pixels of an image's shorter side, [low, high], its aspect "
        "kept; size is then cut out of it",
    )
    flip: bool = _setting(True, _SWITCH, "mirror half of the training images at random")
    brightness: float = _setting(0.0, _SHARE, "largest random change of brightness, as a share: 0.2 is 80 % to 120 %")
    contrast: float = _setting(0.0, _SHARE, "largest random change of contrast, as a share")
    saturation: float = _setting(0.0, _SHARE, "largest random change of colour saturation, as a share")
    hue: float = _setting(
        0.0,
        _Rule("a finite number in [0, 0.5]", lambda x: 0 <= x <= 0.5),
        "largest random turn of the hue, as a share of the colour circle",
    )
    init: str = _setting(
        "",
        _Rule("the path of a file, in printable Unicode", str.isprintable),
        'weights to start from (--init): a file of VGG16\'s under torchvision\'s names, "vgg16" or "vgg16-bn" to '
        "download it, or a checkpoint; empty: at random",
    )
    train_split: str = _setting("train", _LIST, "list of the images to train on")
    val_split: str = _setting("val", _LIST, f'list of the images to validate on; "{NO_VALIDATION}": do not validate')
    bad_samples: str = _setting(
        "stop", _one_of("stop", "skip"), "what a training image that cannot be read does: stop the run, or be left out"
    )
    seed: int = _setting(0, _at_least(0), "seed of the initial weights, the order of samples, transforms and dropout")
    workers: int = _setting(2, _at_least(0), "threads that prepare samples; 0: the training thread itself")
    cache: str = _setting(
        "none",
        _one_of("none", "memory", "disk", "device"),
        "where decoded samples are kept for the next epoch: nowhere, in memory, on disk for later runs, too, or on the "
        "device, which then makes the batches itself",
    )
    checkpoint_every: int = _setting(
        500, _at_least(0), "steps between checkpoints; 0: only after each validation and at the end"
    )
    validate_every: int = _setting(0, _at_least(0), "steps between validations; 0: every validate_epochs epochs")
    validate_epochs: int = _setting(1, _at_least(1), "epochs between validations, where validate_every is 0")
    patience: int = _setting(
        0, _at_least(0), "validations without a better mIoU after which training ends early; 0: never"
    )

    def __post_init__(self) -> None:
        for setting in fields(self):
            rule, value = setting.metadata["rule"], getattr(self, setting.name)
            try:
                converted = _of_type(setting.type, value)
                if converted is not None and not rule.accepts(converted):
                    raise ValueError
            except (ValueError, OverflowError):  # OverflowError: an integer too large for a float
                example = toml_value(DEFAULT_EPOCHS if setting.default is None else setting.default)
                raise ConfigError(
                    f"{setting.name}: expected {rule.expected}, got {value!r}; "
                    f"correct it, for example {setting.name} = {example}."
                ) from None
            object.__setattr__(self, setting.name, converted)
        # A square has one spelling, so that 224 and [224, 224] count as the same setting on resume.
        if isinstance(self.size, tuple) and self.size[0] == self.size[1]:
            object.__setattr__(self, "size", self.size[0])
        if self.epochs is None and self.steps is None:
            object.__setattr__(self, "epochs", DEFAULT_EPOCHS)
        elif self.epochs is not None and self.steps is not None:
            raise ConfigError(
                f"epochs and steps: expected one of the two, got epochs = {self.epochs} and "
                f"steps = {self.steps}; remove one."
            )
        if self.schedule == "step" and not self.lr_steps:
            raise ConfigError('schedule = "step": expected lr_steps, got none; add for example lr_steps = [0.6, 0.9].')
        if self.engine == "layers" and self.precision == "bf16":
            raise ConfigError('precision = "bf16": expected the fused engine, got layers; add engine = "fused".')
        if self.dtype == "float64" and self.gradient_sum == "bf16":
            raise ConfigError('gradient_sum = "bf16": expected dtype = "float32", got float64; leave one out.')
        if self.engine == "fused" and self.accumulate > 1:
            raise ConfigError(
                f'engine = "fused": expected accumulate = 1, got {self.accumulate} parts; it needs less memory, so a '
                "whole batch may fit."
            )
        if self.patience and self.val_split == NO_VALIDATION:
            raise ConfigError(
                f'val_split = "{NO_VALIDATION}": expected patience = 0, got {self.patience}; it counts validations.'
            )
        if self.accumulate > self.batch:
            raise ConfigError(
                f"accumulate: expected at most the batch, got {self.accumulate} parts of {self.batch} images; "
                f"correct it, for example accumulate = {self.batch}."
            )

    @property
    def image_size(self) -> tuple[int, int]:
        """The training image size as (height, width) in pixels."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    def to_toml(self) -> str:
        """The settings as TOML, each under a comment with its meaning; load_config reads it back equal."""
        return "\n".join(
            f"# {setting.metadata['help']}\n{setting.name} = {toml_value(value)}\n"
            for setting in fields(self)
            if (value := getattr(self, setting.name)) is not None  # TOML has no null: the key is left out
        )


def describe() -> list[tuple[str, str, str]]:
    """One row (key, default in TOML, meaning) for each setting, in the order of the configuration file."""
    defaults = Config()
    rows = []
    for setting in fields(defaults):
        value = getattr(defaults, setting.name)
        rows.append((setting.name, "-" if value is None else toml_value(value), setting.metadata["help"]))
    return rows


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
        try:
            _check_keys(found)
            Config(**found)  # on its own first, so that the error can name the file
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from None
        values = _over(values, found)
    for override in overrides:
        values = _over(values, dict([_parse_override(override)]))
    return Config(**values)


def _over(values: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """The values with later ones over them; a length takes the place of the other."""
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
        if set(changed) <= set(_LENGTH):
            raise ConfigError(
                f"resume: {listing}: the learning rates of the steps made would have been others, as the schedule "
                f'"{new.schedule}" goes by shares of the whole length; train as long as planned, or start a new run '
                "folder with --init of the last checkpoint."
            )
        raise ConfigError(
            f"resume: expected the settings that the run started with, got other values of {listing}; "
            "resume with the old values or start a new run folder."
        )


def init_setting(init: str | Path) -> str:
    """What the setting `init` is for `--init`: a name of PRETRAINED, else the path from the root."""
    return str(init) if str(init) in PRETRAINED else os.path.realpath(init)


def toml_value(value: Any) -> str:
    """One value as TOML on one line (tomli_w gives each element of a list a line of its own)."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    import tomli_w  # only who writes settings needs it

    return tomli_w.dumps({"value": value}).removeprefix("value = ").strip()


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        # utf-8-sig, because some editors put a byte order mark in front, which tomllib refuses.
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(
            f"{path}: expected a TOML configuration file, got {error.strerror}; check the path."
        ) from error
    except (ValueError, RecursionError) as error:  # ValueError covers TOMLDecodeError and UnicodeDecodeError
        raise ConfigError(f"{path}: expected valid TOML, got: {error}; correct the file.") from error


def _check_keys(values: Mapping[str, Any]) -> None:
    known = [setting.name for setting in fields(Config)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key.lower().replace("-", "_"), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(known)}."
            raise ConfigError(f"unknown setting {key!r}; {hint}")


def _parse_override(override: str) -> tuple[str, Any]:
    key, equals, text = (part.strip() for part in override.partition("="))
    if not equals or not key or not text:
        raise ConfigError(f"--set {override}: expected key=value, got {override!r}; write for example lr=0.01.")
    _check_keys({key: text})
    if re.fullmatch(r"[A-Za-z_][\w-]*", text) and text not in ("true", "false", "inf", "nan"):
        return key, text
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        parsed = {}
    if list(parsed) != ["value"]:
        raise ConfigError(
            f"--set {override}: expected a TOML value after the '=', got {text!r}; "
            "write for example lr=0.01, size=[96,128] or flip=false."
        )
    return key, parsed["value"]
