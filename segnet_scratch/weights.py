"""Models to and from files: checkpoints of this project, and VGG16's convolutions as a start."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segnet_scratch import checkpoint
from segnet_scratch.errors import CheckpointError, of_file
from segnet_scratch.runtime.devices import Device
from segnet_scratch.segnet import SegNet, build

MOMENTUM = "momentum."  # prefix of the optimiser's arrays in a checkpoint


def save(
    path: Path, model: SegNet, metadata: Mapping[str, Any], momenta: Mapping[str, np.ndarray] | None = None
) -> None:
    """Writes a model, and the optimiser's momenta where training is to go on from here; atomic and durable.

    CheckpointError where a number is not finite: it would replace the last state that is of use.
    """
    tensors = model.state_dict()
    tensors |= {MOMENTUM + name: array for name, array in (momenta or {}).items()}
    if broken := [name for name, array in tensors.items() if not np.isfinite(array).all()]:
        problem = f"{len(broken)} arrays hold NaN or infinity ({broken[0]}, ...); the file there, if any, is an earlier"
        raise CheckpointError(f"{path}: not saved, {problem} one; train with a smaller lr, or with warmup")
    checkpoint.save(path, tensors, {**metadata, "model": model.describe()})


def read(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, Any]]:
    """(weights, momenta, metadata) of a checkpoint; CheckpointError where it is damaged or not one of ours."""
    loaded = checkpoint.load(path)
    if not isinstance(loaded.metadata.get("model"), dict):
        raise CheckpointError(f"{path}: the checkpoint does not say what network it holds; was it written by segnet?")
    weights, theirs = loaded.tensors, [name for name in loaded.tensors if name.startswith(MOMENTUM)]
    momenta = {name.removeprefix(MOMENTUM): weights.pop(name) for name in theirs}
    return weights, momenta, loaded.metadata


def load(path: str | Path, device: "str | Device" = "auto", fold: bool = False, rung: str | None = None) -> SegNet:
    """The model of a checkpoint, in evaluation mode; `model.metadata` has its class names and image size.

    With `fold` batch norm becomes a part of the convolutions: the same logits to rounding, faster, inference only.
    `rung` is how the layers multiply: "tf32" by tensor cores.
    """
    weights, _, metadata = read(path)
    model = build(metadata["model"], device, rung=rung)
    with of_file(path):
        model.load_state_dict(weights)
    model.metadata = metadata
    return model.fold_batch_norm() if fold else model.eval()


def check_values(path: str | Path, arrays: Mapping[str, np.ndarray]) -> None:
    """CheckpointError where weights of another program are no numbers, or a running variance is negative."""
    for name, array in arrays.items():
        if array.dtype.kind not in "iuf" or not np.isfinite(array).all():
            problem = f"holds values that are no finite numbers ({array.dtype})"
            raise CheckpointError(f"{path}: {name} {problem}; export it anew")
        if name.endswith("running_var") and array.min(initial=0) < 0:
            raise CheckpointError(f"{path}: {name} holds {array.min():g}, and no variance is negative; export it anew")


def initialise(model: SegNet, path: str | Path, names: Sequence[str] | None = None) -> str:
    """Gives a fresh model the weights of a file: VGG16 under torchvision's names, or a checkpoint of the same network.

    A checkpoint for another number of classes, or for others than `names`, gives all but its classifier, which stays as
    it was initialised.
    Returns one line that says what was taken. CheckpointError where the file fits neither.
    """
    arrays, texts = checkpoint.load_foreign(path)
    weights = {name: array for name, array in arrays.items() if not name.startswith(MOMENTUM)}
    check_values(path, weights)
    told = checkpoint.metadata_in(texts)
    with of_file(path):
        pooling = told.get("model", {}).get("pooling", "ceil")
        if told and pooling != model.pooling:
            modes = f"pools odd maps in {pooling!r} mode, this one in {model.pooling!r} mode"
            raise CheckpointError(f'its network {modes}; set pooling = "{pooling}"')
        if "encoder.1.1.conv.weight" not in weights:
            model.load_vgg16(weights)
            return f"encoder from VGG16{'-BN' if 'features.1.running_mean' in weights else ''} ({path})"
        classes, trained = len(weights.get("classifier.bias", ())), told.get("classes")
        others = bool(names and trained) and list(names or ()) != trained
        if classes == model.classes and not others:
            model.load_state_dict(weights)
            return f"all weights from {path}"
        own = {name: array for name, array in model.state_dict().items() if name.startswith("classifier.")}
        model.load_state_dict({**weights, **own})
        why = f"{classes} classes there, {model.classes} here" if classes != model.classes else "its classes are others"
        return f"all weights but the classifier from {path} ({why})"
