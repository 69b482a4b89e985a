"""Weights to and from PyTorch SegNets: state dicts in .pth and safetensors files, whatever the names in them.

Which of their arrays is which of ours is told by the names where they are ours, by a name map, or by order: the
convolutions and batch norms of a file that stand there in the order of execution, their shapes those of a SegNet.
A name map is a TOML file of prefixes, the PyTorch module's on the left, ours on the right; "" takes a prefix away, and
false leaves out what is of no use here:

    "features.down1.conv1" = "encoder.1.1.conv"
    "features.down1.bn1" = "encoder.1.1.bn"
    "head" = "classifier"
    "auxiliary" = false
"""

import json
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from segnet_scratch import checkpoint, weights
from segnet_scratch.errors import CheckpointError, ConfigError
from segnet_scratch.files import write_durably
from segnet_scratch.ops.normalisation.batch_norm import EPS
from segnet_scratch.segnet import ARCHITECTURES, POOLINGS, SegNet

# PyTorch counts batches for a running average that SegNet does not use.
_COUNT = "num_batches_tracked"
_PARALLEL = "module"  # what DataParallel puts before every name
# What of a checkpoint's metadata is kept in a state dict's, as JSON; others may have written something else there.
_KEPT: dict[str, Callable[[Any], bool]] = {
    "classes": lambda names: isinstance(names, list) and all(isinstance(name, str) for name in names),
    "size": lambda size: isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size),
    "pooling": lambda mode: mode in POOLINGS,
}

NameMap = Mapping[str, str | None]  # None: left out


def read_map(path: Path | None) -> dict[str, str | None]:
    """Our prefix for each of theirs, None for what is left out; empty without a file. ConfigError names the line."""
    if path is None:
        return {}
    try:
        pairs = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: expected a name map in TOML: {error}") from error
    if wrong := [key for key, value in pairs.items() if not isinstance(value, str) and value is not False]:
        raise ConfigError(
            f'{path}: {wrong[0]} is no text; write "their.prefix" = "encoder.1.1.conv", both quoted, or = false'
        )
    if max(Counter(value for value in pairs.values() if value).values(), default=0) > 1:
        raise ConfigError(f"{path}: two of their prefixes are mapped to one of ours")
    return {name: None if value is False else value for name, value in pairs.items()}


@dataclass(frozen=True)
class Places:
    """Which of another network's arrays is which of ours.

    ours: our name by theirs; what is left out is not there. turned: those of theirs (by our names) that are weights of
    transposed convolutions of stride 1, which are convolutions whose kernel has its axes exchanged and is turned by
    half a turn.
    """

    ours: dict[str, str]
    turned: frozenset[str] = frozenset()

    def turn(self, name: str, array: np.ndarray) -> np.ndarray:
        """The weight as the other side has it: from theirs to ours and back are one."""
        return array.swapaxes(0, 1)[:, :, ::-1, ::-1] if name in self.turned else array

    def lines(self, arrays: Mapping[str, np.ndarray]) -> list[str]:
        """A report, one line a block of ours, and one on what was left out."""
        blocks: dict[str, list[str]] = {}
        for theirs, ours in self.ours.items():
            block = ours.partition(".conv.")[0].partition(".bn.")[0].removesuffix(".weight").removesuffix(".bias")
            module = theirs.rpartition(".")[0]
            if theirs.endswith(".weight") and arrays[theirs].ndim == 4:
                module += f" {_sides(arrays[theirs])}{' turned' if ours in self.turned else ''}"
                module += ", its bias folded" if f"{block}.conv.bias" in self.ours.values() else ""
            said = blocks.setdefault(block, [])
            said += [module] if not any(text.startswith(module) for text in said) else []
        lines = [f"{block:14} <- {', '.join(modules)}" for block, modules in blocks.items()]
        left = [name for name in arrays if name not in self.ours and not name.endswith(_COUNT)]
        return [*lines, f"left out: {len(left)} arrays ({', '.join(left[:3])} ...)"] if left else lines


def from_pytorch(
    source: Path,
    target: Path,
    names: NameMap,
    pooling: str | None = None,
    eps: float = EPS,
    classes: Sequence[str] | None = None,
    size: tuple[int, int] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> SegNet:
    """Reads a PyTorch SegNet's state dict and writes a checkpoint of this project.

    The network (SegNet or SegNet-Basic, width, classes) is read off the shapes; `pooling` (segnet.POOLINGS), which
    leaves no trace there, must be told, and so must the `eps` of its batch norms. A convolution's bias before a batch
    norm has no effect but a shift of what the norm subtracts: running_mean -= bias. `classes` and `size` (height,
    width) are class names and input size, if not those of the file. `report` is told, line by line, what went where.
    CheckpointError where the arrays cannot be used.
    """
    arrays, texts = checkpoint.load_foreign(source)
    notes, places = _notes(texts), find_places(arrays, names, source)
    ours = {new: places.turn(new, arrays[name]) for name, new in places.ours.items()}
    if "classifier.weight" in ours:
        ours.setdefault("classifier.bias", np.zeros(len(ours["classifier.weight"]), np.float32))
    weights.check_values(source, ours)
    for name in [n for n in ours if n.endswith(".bn.running_mean")]:
        ours[name] = ours[name] - ours.pop(name.removesuffix("bn.running_mean") + "conv.bias", 0)
    _change_eps(ours, eps, EPS)
    try:
        model = _network_of(ours, pooling or notes.get("pooling", "ceil"))
        model.load_state_dict(ours)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}; a name map (--map) tells which of their modules is which") from error
    names_of_classes = list(classes or notes.get("classes") or [])
    if names_of_classes and len(names_of_classes) != model.classes:
        raise ConfigError(f"{len(names_of_classes)} class names for the {model.classes} classes of {source}")
    told = {"classes": names_of_classes, "size": size or notes.get("size")}
    model.metadata = {key: value for key, value in told.items() if value}
    weights.save(target, model, model.metadata)
    for line in places.lines(arrays) if any(name != new for name, new in places.ours.items()) else ():
        report(line)
    return model


def to_pytorch(
    source: Path, target: Path, like: Path | None = None, names: NameMap | None = None, eps: float = EPS
) -> int:
    """Writes the weights of a checkpoint as a state dict in a safetensors file; returns the number of arrays.

    With `like`, a state dict of the PyTorch module that is to load it, it has the names, shapes and number of arrays of
    that one, strict=True: biases before batch norms are 0, and arrays that have no place here stay what they are there.
    `names` and `eps` are of that module, as in `from_pytorch`. Without it the names are ours. Class names, size and the
    mode of the pools go into the file's metadata.
    """
    arrays, _, metadata = weights.read(source)
    _change_eps(arrays, EPS, eps)
    counts = [f"{name.removesuffix('running_var')}{_COUNT}" for name in arrays if name.endswith(".running_var")]
    state = arrays | {name: np.array(0) for name in counts}
    if like is not None:
        theirs, _ = checkpoint.load_foreign(like)
        places, state = find_places(theirs, names or {}, like), dict(theirs)
        if homeless := [n for n in arrays.keys() - set(places.ours.values()) if arrays[n].any()]:
            raise CheckpointError(f"{like}: its network has no place for {min(homeless)} of {source}")
        for name, ours in places.ours.items():
            if ours in arrays:
                state[name] = places.turn(ours, arrays[ours])
            elif ours.endswith(".conv.bias"):
                state[name] = np.zeros_like(theirs[name])
            if state[name].shape != theirs[name].shape and not ours.startswith("classifier."):  # other classes will do
                sides = f"{name} is {_sides(theirs[name])}, but {_sides(state[name])} in {source}"
                raise CheckpointError(f"{like}: {sides}; give the state dict of the same network")
    notes = {**metadata, "pooling": metadata["model"].get("pooling", "ceil")}
    texts = {key: json.dumps(notes[key]) for key in _KEPT if notes.get(key)}
    plain = {name: np.ascontiguousarray(array) for name, array in state.items()}
    write_durably(target, [safetensors.numpy.save(plain, texts)])
    return len(state)


def find_places(arrays: Mapping[str, np.ndarray], names: NameMap, source: Path) -> Places:
    """Which of these arrays, of the file `source`, is which of ours.

    By the map, if there is one; by their names, if they are ours; else by order. CheckpointError, with both lists side
    by side, where order and shapes do not tell; ConfigError for a map that cannot be meant.
    """
    theirs = [name for name in arrays if not name.endswith(_COUNT)]
    if not any(name.split(".")[0] == _PARALLEL for name in names):
        names = names if any(not name.startswith(f"{_PARALLEL}.") for name in theirs) else {**names, _PARALLEL: ""}
    renamed = _renamed(theirs, names, source)
    if "encoder.1.1.conv.weight" in renamed.values():
        return Places(renamed)
    by_order = _by_order({new: arrays[name] for name, new in renamed.items()}, source)
    return Places({n: by_order.ours[new] for n, new in renamed.items() if new in by_order.ours}, by_order.turned)


def _by_order(arrays: Mapping[str, np.ndarray], source: Path) -> Places:
    """The places of a network whose convolutions, and whose batch norms, stand in the order of execution.

    Convolutions without a batch norm right behind them, but the last, are no part of it where there are too many: some
    keep the VGG16 that their encoder started from.
    """
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in arrays))
    every = convolutions = [m for m in modules if getattr(arrays.get(f"{m}.weight"), "ndim", 0) == 4]
    norms = [m for m in modules if f"{m}.running_mean" in arrays]
    if len(convolutions) > len(norms) + 1:
        behind = dict(pairwise(modules))
        convolutions = [m for m in convolutions[:-1] if behind.get(m) in norms] + convolutions[-1:]
    shapes = [arrays[f"{m}.weight"].shape for m in convolutions]
    sizes = [arrays[f"{m}.running_mean"].shape for m in norms]
    expected: dict[str, tuple[int, ...]] = {}
    for turned in (False, True):
        expected = _expected(shapes, turned)
        outputs = [(shape[turned and not name.startswith("encoder")],) for name, shape in expected.items()]
        if [*expected.values()] == shapes and outputs[:-1] == sizes:
            break
    else:
        expected = _expected(shapes, False)
        ours = [f"{name} {'x'.join(map(str, shape))}" for name, shape in expected.items()]
        theirs = [f"{m} {_sides(arrays[f'{m}.weight'])}" for m in every]
        width = max(map(len, theirs), default=0)
        rows = [
            f"  {left:{width}}  {'  ' if left.split(' ')[-1:] == right.split(' ')[-1:] else '!='} {right}"
            for left, right in zip_longest(theirs, ours, fillvalue="")
        ]
        raise CheckpointError(
            f"{source}: its convolutions ({len(every)}, with {len(norms)} batch norms; {len(expected)} with "
            f"{len(expected) - 1} are expected) are not those of a SegNet in order; theirs, and ours:",
            *rows,
            'Write which is which into a TOML file, a line a module ("conv11" = "encoder.1.1.conv", "bn11" = '
            '"encoder.1.1.bn"; "auxiliary" = false leaves out), and give it with --map.',
        )
    units = [name.removesuffix(".conv") for name in expected]
    pairs = [*zip(convolutions, expected, strict=True), *zip(norms, (f"{u}.bn" for u in units[:-1]), strict=True)]
    new = dict(pairs)
    found = {name: f"{new[m]}.{name.rpartition('.')[2]}" for name in arrays if (m := name.rpartition(".")[0]) in new}
    kernels = [f"{name}.weight" for name in expected if turned and not name.startswith("encoder")]
    return Places(found, frozenset(kernels))


def _expected(shapes: Sequence[tuple[int, ...]], turned: bool) -> dict[str, tuple[int, ...]]:
    """The shapes of our convolutions by name, in order, of the network whose convolutions begin and end like these.

    turned: the decoder's are those of transposed convolutions.
    """
    first, last = (shapes[0], shapes[-1]) if shapes else ((64, 3, 3, 3), (21, 64, 3, 3))
    network = ARCHITECTURES["segnet-basic" if first[2] == 7 else "segnet"]
    blocks = network.blocks_of(first[0] / 64)
    kernel, classes = network.classifier_kernel, last[turned]
    found: dict[str, tuple[int, ...]]
    found = {f"{b.name}.conv": (b.out_channels, b.in_channels, b.kernel, b.kernel) for b in blocks}
    found["classifier"] = (classes, blocks[-1].out_channels, kernel, kernel)
    if turned:
        found |= {n: (s[1], s[0], *s[2:]) for n, s in found.items() if not n.startswith("encoder")}
    return found


def _sides(array: np.ndarray) -> str:
    return "x".join(map(str, array.shape))


def _notes(texts: Mapping[str, str]) -> dict[str, Any]:
    """What `to_pytorch` noted in the metadata of a state dict; nothing of what others wrote there."""
    notes: dict[str, Any] = {}
    for key, meant in _KEPT.items():
        with suppress(ValueError):
            value = json.loads(texts.get(key, "null"))
            notes |= {key: value} if meant(value) else {}
    return notes


def _change_eps(arrays: dict[str, np.ndarray], old: float, new: float) -> None:
    """Gives batch norms of eps `new` the variances with which they divide by what those of `old` divided by."""
    for name in [n for n in arrays if n.endswith(".running_var")] if old != new else ():
        changed = arrays[name].astype(np.float64) + (old - new)
        if changed.min(initial=0) < 0:
            raise CheckpointError(f"{name}: variances below {new - old:g} cannot be kept with an eps of {new:g}")
        arrays[name] = changed.astype(np.float32)


def _renamed(theirs: Sequence[str], names: NameMap, source: Path) -> dict[str, str]:
    """The new names of arrays. ConfigError where two get one name, and for lines of the map without use."""
    renamed: dict[str, str] = {}
    used: set[str] = set()
    for name in theirs:
        new: str | None = name
        prefixes = [prefix for prefix in names if not prefix or f"{name}.".startswith(f"{prefix}.")]
        if prefixes:
            prefix = max(prefixes, key=len)
            used.add(prefix)
            ours, rest = names[prefix], name.removeprefix(prefix).lstrip(".")
            new = None if ours is None else f"{ours}.{rest}".strip(".")
        if new is None:
            continue
        if other := [old for old, taken in renamed.items() if taken == new]:
            raise ConfigError(f"{source}: the map gives {other[0]} and {name} one name, {new}; leave one out: = false")
        renamed[name] = new
    if idle := [prefix for prefix in names if prefix and prefix not in used]:
        raise ConfigError(
            f"{source}: nothing begins with {idle[0]!r}, which the map names ({len(idle)} such lines); it has "
            f"{', '.join(sorted(theirs)[:4])}, ..."
        )
    return renamed


def _network_of(state: Mapping[str, np.ndarray], pooling: str) -> SegNet:
    """A fresh network of the architecture, width and classes that these arrays have.

    Its decoder is "deconv" where there are arrays for it, else "indices": "bilinear" leaves no trace.
    """
    first, classifier = state["encoder.1.1.conv.weight"], state.get("classifier.weight")
    if classifier is None or first.ndim != 4 or classifier.ndim != 4:
        raise CheckpointError("no SegNet: expected 4 sides of encoder.1.1.conv.weight and of classifier.weight")
    architecture = "segnet-basic" if first.shape[2] == 7 else "segnet"
    decoder = "deconv" if any(name.endswith(".up.weight") for name in state) else "indices"
    width = first.shape[0] / 64  # both networks begin with 64 channels at width 1
    return ARCHITECTURES[architecture](classifier.shape[0], width, "numpy", decoder=decoder, pooling=pooling)
