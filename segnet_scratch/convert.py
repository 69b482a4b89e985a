"""Weights to and from PyTorch SegNets: state dicts in safetensors files, other names by a map.

A name map is a TOML file of prefixes, the PyTorch module's on the left, ours on the right; "" takes a prefix away, and
false leaves out what is of no use here:

    "features.down1.conv1" = "encoder.1.1.conv"
    "features.down1.bn1" = "encoder.1.1.bn"
    "head" = "classifier"
    "auxiliary" = false
"""

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from segnet_scratch import checkpoint, weights
from segnet_scratch.errors import CheckpointError, ConfigError
from segnet_scratch.files import reason, write_durably
from segnet_scratch.ops.normalisation.batch_norm import EPS
from segnet_scratch.segnet import ARCHITECTURES, SegNet

# PyTorch counts batches for a running average that SegNet does not use.
_IGNORED = "num_batches_tracked"
_PARALLEL = "module"  # what DataParallel puts before every name
_KEPT = ("classes", "size", "pooling")  # of a checkpoint's metadata in a state dict's, as JSON

NameMap = Mapping[str, str | None]  # None: left out


def read_map(path: Path | None) -> dict[str, str | None]:
    """Our prefix for each of theirs, None for what is left out; empty without a file. ConfigError names the line."""
    if path is None:
        return {}
    try:
        pairs = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: expected a name map in TOML: {error}") from error
    wrong = [key for key, value in pairs.items() if not isinstance(value, str) and value is not False]
    if wrong:
        raise ConfigError(
            f'{path}: {wrong[0]} is no text; write "their.prefix" = "encoder.1.1.conv", both quoted, or = false'
        )
    ours = [value for value in pairs.values() if value]
    if len(set(ours)) != len(ours):
        raise ConfigError(f"{path}: two of their prefixes are mapped to one of ours")
    return {name: value if isinstance(value, str) else None for name, value in pairs.items()}


def from_pytorch(
    source: Path,
    target: Path,
    names: NameMap,
    pooling: str | None = None,
    eps: float = EPS,
    classes: Sequence[str] | None = None,
    size: tuple[int, int] | None = None,
) -> SegNet:
    """Reads a PyTorch SegNet's state dict and writes a checkpoint of this project.

    The network (SegNet or SegNet-Basic, width, classes) is read off the shapes; `pooling` (segnet.POOLINGS), which
    leaves no trace there, must be told, and so must the `eps` of its batch norms. A convolution's bias before a batch
    norm has no effect but a shift of what the norm subtracts: running_mean -= bias. `classes` and `size` (height,
    width) are class names and input size, if not those of the file. CheckpointError where the arrays cannot be used.
    """
    arrays, notes = checkpoint.load_foreign(source), _notes(source)
    theirs = {n: a for n, a in arrays.items() if not n.endswith(_IGNORED)}
    if all(name.startswith(f"{_PARALLEL}.") for name in theirs) and not any(
        n.split(".")[0] == _PARALLEL for n in names
    ):
        theirs = {name.removeprefix(f"{_PARALLEL}."): array for name, array in theirs.items()}
    ours = _renamed_all(theirs, names, source)
    weights.check_values(source, ours)
    for name in [n for n in ours if n.endswith(".conv.bias")]:
        running_mean = name.removesuffix("conv.bias") + "bn.running_mean"
        if running_mean in ours:
            ours[running_mean] = ours[running_mean] - ours.pop(name)
    for name in [n for n in ours if n.endswith(".running_var")]:
        ours[name] = _variance_for_our_eps(name, ours[name], eps)
    try:
        model = _network_of(ours, pooling or notes.get("pooling") or "ceil")
        model.load_state_dict(ours)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}; a name map (--map) tells which of their modules is which") from error
    names_of_classes = list(classes or notes.get("classes") or [])
    if names_of_classes and len(names_of_classes) != model.classes:
        raise ConfigError(f"{len(names_of_classes)} class names for the {model.classes} classes of {source}")
    told = {"classes": names_of_classes, "size": size or notes.get("size")}
    model.metadata = {key: value for key, value in told.items() if value}
    weights.save(target, model, model.metadata)
    return model


def to_pytorch(source: Path, target: Path, names: NameMap, biases: bool | None = None) -> int:
    """Writes the weights of a checkpoint as a plain state dict (OIHW float32) and returns the number of arrays.

    `biases` writes a bias of 0 for every convolution before a batch norm, too, for networks that have them there;
    unless given, that is where a map says that the names are those of another network. Class names, size and the mode
    of the pools go into the file's metadata.
    """
    arrays, _, metadata = weights.read(source)
    if bool(names) if biases is None else biases:
        convolutions = [name.removesuffix("weight") for name in arrays if name.endswith(".conv.weight")]
        arrays |= {f"{name}bias": np.zeros(len(arrays[f"{name}weight"]), np.float32) for name in convolutions}
    inverse = {ours: theirs for theirs, ours in names.items() if ours is not None}
    renamed = _renamed_all(arrays, inverse, source)
    notes = {**metadata, "pooling": metadata["model"].get("pooling", "ceil")}
    texts = {key: json.dumps(notes[key]) for key in _KEPT if notes.get(key)}
    try:
        write_durably(target, [safetensors.numpy.save(renamed, texts)])
    except OSError as error:
        raise CheckpointError(f"{target}: could not be written: {reason(error)}") from error
    return len(renamed)


def _notes(source: Path) -> dict[str, Any]:
    """What `to_pytorch` noted in the metadata of a state dict; nothing of what others wrote there."""
    texts = checkpoint.foreign_metadata(source)
    notes: dict[str, Any] = {}
    for key in _KEPT:
        try:
            value = json.loads(texts.get(key, "null"))
        except ValueError:
            continue
        notes[key] = value
    kinds = {"classes": lambda v: isinstance(v, list) and all(isinstance(name, str) for name in v)}
    kinds["size"] = lambda v: isinstance(v, list) and len(v) == 2 and all(type(n) is int and n > 0 for n in v)
    kinds["pooling"] = lambda v: v in ("ceil", "floor")
    return {key: value for key, value in notes.items() if kinds[key](value)}


def _variance_for_our_eps(name: str, variance: np.ndarray, eps: float) -> np.ndarray:
    """The variance with which a batch norm of our eps divides by what one of another eps divided by."""
    if eps == EPS:
        return variance
    changed = variance.astype(np.float64) + (eps - EPS)
    if changed.min(initial=0) < 0:
        raise CheckpointError(f"{name}: variances below {EPS - eps:g} cannot be kept with an eps of {EPS:g}")
    return changed.astype(np.float32)


def _renamed_all(arrays: Mapping[str, np.ndarray], names: NameMap, source: Path) -> dict[str, np.ndarray]:
    """The arrays under their new names. ConfigError where two get one name, and for lines of the map without use."""
    renamed: dict[str, np.ndarray] = {}
    origin: dict[str, str] = {}
    used: set[str] = set()
    for name, array in arrays.items():
        prefix = _prefix_of(name, names)
        new: str | None = name
        if prefix is not None:
            used.add(prefix)
            ours = names[prefix]
            rest = name.removeprefix(prefix).lstrip(".")
            new = None if ours is None else f"{ours}.{rest}".strip(".")
        if new is None:
            continue
        if new in renamed:
            raise ConfigError(
                f"{source}: the map gives {origin[new]} and {name} one name, {new}; leave one out: = false"
            )
        renamed[new], origin[new] = array, name
    if idle := [prefix for prefix in names if prefix and prefix not in used]:
        raise ConfigError(
            f"{source}: nothing begins with {idle[0]!r}, which the map names ({len(idle)} such lines); it has "
            f"{', '.join(sorted(arrays)[:4])}, ..."
        )
    return renamed


def _prefix_of(name: str, names: NameMap) -> str | None:
    """The longest prefix of a name, or the name itself, that the map knows; "" is one of every name."""
    prefix = name
    while prefix:
        if prefix in names:
            return prefix
        prefix = prefix.rpartition(".")[0]
    return "" if "" in names else None


def _network_of(state: Mapping[str, np.ndarray], pooling: str) -> SegNet:
    """A fresh network of the architecture, width and classes that these arrays have.

    Its decoder is "deconv" where there are arrays for it, else "indices": "bilinear" leaves no trace.
    """
    first, classifier = state.get("encoder.1.1.conv.weight"), state.get("classifier.weight")
    if first is None or classifier is None or first.ndim != 4 or classifier.ndim != 4:
        shown = ", ".join(sorted(state)[:4])
        raise CheckpointError(f"no SegNet under our names (encoder.1.1.conv.weight, classifier.weight); it has {shown}")
    architecture = "segnet-basic" if first.shape[2] == 7 else "segnet"
    # Both networks begin with 64 channels at width 1.
    decoder = "deconv" if any(name.endswith(".up.weight") for name in state) else "indices"
    return ARCHITECTURES[architecture](
        classifier.shape[0], first.shape[0] / 64, "numpy", decoder=decoder, pooling=pooling
    )
