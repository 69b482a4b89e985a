"""Models to and from files: checkpoints of this project, and VGG16's convolutions as a start."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segnet_scratch import checkpoint
from segnet_scratch.errors import CheckpointError
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
        raise CheckpointError(
            f"{path}: not saved, {len(broken)} arrays hold NaN or infinity ({broken[0]}, ...); the file there, if any, "
            "is an earlier, finite one; train with a smaller lr, or with warmup"
        )
    checkpoint.save(path, tensors, {**metadata, "model": model.describe()})


def read(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, Any]]:
    """(weights, momenta, metadata) of a checkpoint; CheckpointError where it is damaged or not one of ours."""
    loaded = checkpoint.load(path)
    if not isinstance(loaded.metadata.get("model"), dict):
        raise CheckpointError(f"{path}: the checkpoint does not say what network it holds; was it written by segnet?")
    weights = {name: array for name, array in loaded.tensors.items() if not name.startswith(MOMENTUM)}
    momenta = {
        name.removeprefix(MOMENTUM): array for name, array in loaded.tensors.items() if name.startswith(MOMENTUM)
    }
    return weights, momenta, loaded.metadata


def load(path: str | Path, device: "str | Device" = "auto", fold: bool = False, rung: str | None = None) -> SegNet:
    """The model of a checkpoint, in evaluation mode; `model.metadata` has its class names and image size.

    With `fold` batch norm becomes a part of the convolutions: the same logits to rounding, faster, inference only.
    `rung` is how the layers multiply: "tf32" by tensor cores.
    """
    weights, _, metadata = read(path)
    model = build(metadata["model"], device, rung=rung)
    try:
        model.load_state_dict(weights)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    model.metadata = metadata
    return model.fold_batch_norm() if fold else model.eval()


def check_values(path: str | Path, arrays: Mapping[str, np.ndarray]) -> None:
    """CheckpointError where weights of another program are no numbers, or a running variance is negative."""
    for name, array in arrays.items():
        if array.dtype.kind not in "iuf" or not np.isfinite(array).all():
            raise CheckpointError(
                f"{path}: {name} holds values that are no finite numbers ({array.dtype}); export it anew"
            )
        if name.endswith("running_var") and array.min(initial=0) < 0:
            raise CheckpointError(f"{path}: {name} holds {array.min():g}, and no variance is negative; export it anew")


def initialise(model: SegNet, path: str | Path, names: Sequence[str] | None = None) -> str:
    """Gives a fresh model the weights of a file: VGG16 under torchvision's names, or a checkpoint of the same network.

    A checkpoint for another number of classes, or for others than `names`, gives all but its classifier, which stays as
    it was initialised.
    Returns one line that says what was taken. CheckpointError where the file fits neither.
    """
    weights = {name: array for name, array in checkpoint.load_foreign(path).items() if not name.startswith(MOMENTUM)}
    check_values(path, weights)
    _expect_pooling(model, path)
    try:
        if "encoder.1.1.conv.weight" not in weights:
            model.load_vgg16(weights)
            return f"encoder from VGG16{'-BN' if 'features.1.running_mean' in weights else ''} ({path})"
        classes = len(weights.get("classifier.bias", ()))
        trained = _class_names(path)
        others = bool(names and trained) and list(names or ()) != trained
        if classes == model.classes and not others:
            model.load_state_dict(weights)
            return f"all weights from {path}"
        own = {name: array for name, array in model.state_dict().items() if name.startswith("classifier.")}
        model.load_state_dict({**weights, **own})
        why = f"{classes} classes there, {model.classes} here" if classes != model.classes else "its classes are others"
        return f"all weights but the classifier from {path} ({why})"
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _class_names(path: str | Path) -> list[str] | None:
    """The names that a checkpoint gives its classes; None where it tells of none, as files from elsewhere do."""
    try:
        names = checkpoint.read_metadata(path).get("classes")
    except CheckpointError:
        return None
    return names if isinstance(names, list) else None


def _expect_pooling(model: SegNet, path: str | Path) -> None:
    """CheckpointError where a checkpoint of ours belongs to a network that pools odd maps otherwise."""
    try:
        description = checkpoint.read_metadata(path).get("model", {})
    except CheckpointError:  # the file of another program
        return
    pooling = description.get("pooling", "ceil")
    if pooling != model.pooling:
        raise CheckpointError(
            f"{path}: its network pools odd maps in {pooling!r} mode, this one in {model.pooling!r} mode; set "
            f'pooling = "{pooling}"'
        )
