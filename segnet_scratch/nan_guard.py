"""Where NaN or infinity began: the second look at a training step whose loss or gradients are not finite.

The step itself pays for one look at its loss and its gradients. Only when that fails is the step walked through.
"""

from collections.abc import Iterator

import numpy as np

from segnet_scratch.nn.autograd import Tensor, no_grad
from segnet_scratch.runtime.devices import Array
from segnet_scratch.segnet import SegNet


def first_not_finite(model: SegNet, images: "np.ndarray | Tensor | Array") -> str | None:
    """Names the first array of a training step that holds NaN or infinity, in the order in which it is computed.

    images, then each block's parameters and its output in turn, the logits, then the gradients that the step left
    behind, at last the running statistics, which training does not read. The forward pass is run again in training
    mode with the dropout masks that the step drew last: where it took the batch in parts (accumulate), those of the
    last part, for the whole batch. Running statistics are put back. None where all of it is finite: then the
    loss itself overflowed.
    """
    return next(_broken(model, images), None)


def _broken(model: SegNet, images: "np.ndarray | Tensor | Array") -> Iterator[str]:
    """Every array that is not finite, in order of use."""
    if not _finite(model, images.data if isinstance(images, Tensor) else images):
        yield "images"
    parameters = model.named_parameters()
    for layer, finite in _outputs(model, images).items():
        # The last dot keeps encoder.1.1 apart from encoder.1.10. A stage's learned upsampling precedes its first block.
        up = [f"{layer.removesuffix('1')}up."] if layer.startswith("decoder.") and layer.endswith(".1") else []
        used = {name: p for name, p in parameters.items() if name.startswith((*up, f"{layer}."))}
        yield from (name for name, parameter in used.items() if not _finite(model, parameter.data))
        if not finite:
            yield f"output of {layer}"
    # Backward runs from the classifier to the first convolution: the fault is at the layer named, or just after it.
    for name, parameter in reversed(parameters.items()):
        if parameter.grad is not None and not _finite(model, parameter.grad):
            yield f"gradient of {name}"
    yield from (name for name, buffer in model.named_buffers().items() if not _finite(model, buffer.data))


def _outputs(model: SegNet, images: "np.ndarray | Tensor | Array") -> dict[str, bool]:
    """Is it finite? For the output of each layer by its name, in order, of one more forward pass."""
    device = model.device
    running = [(buffer.data, device.copy(buffer.data)) for buffer in model.named_buffers().values()]
    outputs: dict[str, bool] = {}

    def watch(layer: str, output: Tensor) -> None:
        outputs[layer] = _finite(model, output.data)

    model.train()
    try:
        with no_grad(), np.errstate(all="ignore"):
            model(images, watch)
    finally:
        for array, before in running:
            device.write(array, before)
    return outputs


def _finite(model: SegNet, array: Array) -> bool:
    held = array if isinstance(array, np.ndarray) else model.device.download(array)
    return bool(np.isfinite(held).all())
