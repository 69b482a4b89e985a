"""Weights to and from PyTorch SegNets: state dicts in safetensors files, other names by a map.

A name map is a TOML file of prefixes, the PyTorch module's on the left, ours on the right:

    "features.down1.conv1" = "encoder.1.1.conv"
    "features.down1.bn1" = "encoder.1.1.bn"
    "head" = "classifier"
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy

from segnet_scratch import checkpoint, weights
from segnet_scratch.errors import CheckpointError, ConfigError
from segnet_scratch.files import reason, write_durably
from segnet_scratch.segnet import ARCHITECTURES, SegNet

# PyTorch counts batches for a running average that SegNet does not use.
_IGNORED = "num_batches_tracked"


def read_map(path: Path | None) -> dict[str, str]:
    """Prefixes of theirs by prefix of ours; empty without a file. ConfigError names the file and what is wrong."""
    if path is None:
        return {}
    try:
        pairs = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: expected a name map in TOML: {error}") from error
    wrong = [key for key, value in pairs.items() if not isinstance(value, str)]
    if wrong:
        raise ConfigError(f'{path}: {wrong[0]} is no text; write "their.prefix" = "encoder.1.1.conv", quoted')
    if len(set(pairs.values())) != len(pairs):
        raise ConfigError(f"{path}: two of their prefixes are mapped to one of ours")
    return pairs


def from_pytorch(source: Path, target: Path, names: Mapping[str, str]) -> SegNet:
    """Reads a PyTorch SegNet's state dict and writes a checkpoint of this project.

    The network (SegNet or SegNet-Basic, width, classes) is read off the shapes. A convolution's bias before a batch
    norm has no effect but a shift of what the norm subtracts: running_mean -= bias.
    """
    theirs = {n: a for n, a in checkpoint.load_foreign(source).items() if not n.endswith(_IGNORED)}
    ours = {_renamed(name, names): array for name, array in theirs.items()}
    for name in [n for n in ours if n.endswith(".conv.bias")]:
        running_mean = name.removesuffix("conv.bias") + "bn.running_mean"
        if running_mean in ours:
            ours[running_mean] = ours[running_mean] - ours.pop(name)
    try:
        model = _network_of(ours)
        model.load_state_dict(ours)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}; a name map (--map) tells which of their modules is which") from error
    weights.save(target, model, {})
    return model


def to_pytorch(source: Path, target: Path, names: Mapping[str, str]) -> int:
    """Writes the weights of a checkpoint as a plain state dict (OIHW float32) and returns the number of arrays."""
    arrays, _, _ = weights.read(source)
    inverse = {ours: theirs for theirs, ours in names.items()}
    renamed = {_renamed(name, inverse): array for name, array in arrays.items()}
    try:
        write_durably(target, [safetensors.numpy.save(renamed)])
    except OSError as error:
        raise CheckpointError(f"{target}: could not be written: {reason(error)}") from error
    return len(renamed)


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """The name with the longest prefix that the map knows replaced; itself where it knows none."""
    prefix, _, rest = name.rpartition(".")
    while prefix:
        if prefix in names:
            return f"{names[prefix]}.{rest}"
        prefix, _, more = prefix.rpartition(".")
        rest = f"{more}.{rest}"
    return name


def _network_of(state: Mapping[str, np.ndarray]) -> SegNet:
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
    return ARCHITECTURES[architecture](classifier.shape[0], first.shape[0] / 64, "numpy", decoder=decoder)
