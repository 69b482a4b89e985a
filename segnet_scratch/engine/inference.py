"""Inference by the fused engine: batch norm folded, one kernel a block, one arena, one graph.

A block is one kernel: bias, ReLU and pool on the way out; where it begins with an unpool, the unpooled map is written.
"""

from collections.abc import Callable, Sequence

import numpy as np

from segnet_scratch.engine.arena import Arena
from segnet_scratch.engine.convolutions import Convolutions
from segnet_scratch.engine.network import CLASSIFIER, check, layers_of, padded, storage, vector
from segnet_scratch.engine.program import Program
from segnet_scratch.errors import ShapeError
from segnet_scratch.nn.modules import ConvUnit
from segnet_scratch.ops.elementwise.cast import Cast
from segnet_scratch.ops.op import Spec, spec
from segnet_scratch.ops.pooling.unpool_packed import UnpoolPacked
from segnet_scratch.runtime.devices import Array
from segnet_scratch.runtime.precision import BFLOAT16
from segnet_scratch.segnet import Block, SegNet


def inference_program(
    blocks: Sequence[Block],
    classes: int,
    batch: int,
    size: tuple[int, int],
    convolutions: Convolutions,
    classifier_kernel: int = 3,
) -> Program:
    """Logits of images (batch, *size, 3), padded to whole pieces of channels; nothing is allocated."""
    rung = convolutions.rung
    program, dtype = Program(), storage(rung)
    x = program.give("images", spec((batch, *size, 3), np.float32))
    if dtype == BFLOAT16:
        program.add("images", Cast.plan(program.given["images"]), x="images", y="images.cast")
        x = "images.cast"
    for layer in layers_of(blocks, batch, *size):
        name, block = layer.name, layer.block
        if layer.unpool is not None and layer.codes is not None:
            unpool = UnpoolPacked.plan(program.spec_of(x), layer.unpool)
            program.add(name, unpool, x=x, codes=layer.codes, y=f"{name}.unpooled")
            x = f"{name}.unpooled"
        arrays = {
            "weight": program.give(f"{name}.weight", Spec(layer.weight, dtype)),
            "bias": program.give(f"{name}.bias", vector(block.out_channels)),
        }
        if block.pool:
            arrays["pool_codes"] = f"{name}.codes"
        options = {"bias": True, "relu": block.relu, "pool": block.pool}
        op = convolutions.forward(program.spec_of(x), Spec(layer.weight, dtype), **options)
        program.add(name, op, x=x, **arrays, y=f"{name}.z")
        x = f"{name}.z"
    shape = (padded(classes, rung), classifier_kernel, classifier_kernel, blocks[-1].out_channels)
    weight = program.give(f"{CLASSIFIER}.weight", Spec(shape, dtype))
    bias = program.give(f"{CLASSIFIER}.bias", vector(shape[0]))
    classify = convolutions.forward(program.spec_of(x), Spec(shape, dtype), bias=True)
    program.add(CLASSIFIER, classify, x=x, weight=weight, bias=bias, y="logits")
    return program


class FusedInference:
    """Logits of a SegNet, in evaluation mode, for batches of one shape.

    Takes the weights as they are now, batch norm folded into them in double and rounded once; the model may already be
    folded, and is left as it is. `rung` is "tf32x3", "tf32" or "bf16".
    """

    def __init__(self, model: SegNet, batch: int, size: tuple[int, int], rung: str) -> None:
        check(model, rung, training=False)
        self.device, self.classes = model.device, model.classes
        kernels = Convolutions.on(self.device, rung)
        self.program = inference_program(model.blocks, model.classes, batch, size, kernels, model.classifier_kernel)
        self.arena = Arena.plan(self.program.lifetimes(kept=("logits",)))
        arrays = self._weights(model) | self.arena.allocate(self.device)
        arrays["images"] = self.device.zeros(self.program.given["images"].shape, np.float32)
        self._images, self._logits = arrays["images"], arrays["logits"]
        self._bound = self.program.bind(arrays)
        self._replay: Callable[[], None] | None = None

    def _weights(self, model: SegNet) -> dict[str, Array]:
        given: dict[str, np.ndarray] = {
            f"{CLASSIFIER}.weight": model.classifier.weight.numpy(),
            f"{CLASSIFIER}.bias": model.classifier.bias.numpy(),
        }
        for name, unit in model.named_modules(ConvUnit).items():
            given[f"{name}.weight"], given[f"{name}.bias"] = unit.folded()
        arrays = {}
        for name, values in given.items():
            target = self.program.given[name]
            whole = np.zeros(target.shape, target.dtype)  # outputs beyond the classes stay 0
            whole[: len(values)] = values
            arrays[name] = self.device.upload(whole)
        return arrays

    def run(self, enter: Callable[[str], None] = lambda phase: None) -> None:
        """One pass over what the images hold, op by op."""
        self._bound.run(self.device, enter)

    def __call__(self, images: Array) -> Array:
        """Logits (batch, *size, channels) of images (batch, *size, 3), float32, on the device. Waits for nothing.

        The first `classes` channels are the logits, in the rung's element type; the same array every time.
        """
        if tuple(images.shape) != tuple(self._images.shape) or images.dtype != np.float32:
            raise ShapeError(
                f"fused engine: images are {tuple(images.shape)} {images.dtype}, expected {tuple(self._images.shape)} "
                "float32: it was planned for one shape"
            )
        self.device.write(self._images, images)
        if self._replay is None:
            self.run()  # loads the kernels, which a graph cannot
            self._replay = self.device.capture(self.run)
        else:
            self._replay()
        return self._logits
