"""Inference by the fused engine: batch norm folded, one kernel a block, one arena, one graph.

A block is one kernel: bias, ReLU and pool on the way out; where it begins with an unpool, the unpooled map is written.
"""

from collections.abc import Callable, Sequence

import numpy as np

from segnet_scratch.engine.arena import Arena
from segnet_scratch.engine.convolutions import Convolutions
from segnet_scratch.engine.network import CLASSIFIER, RUNG_OF_PRECISION, check, layers_of, padded, storage, vector
from segnet_scratch.engine.program import Program
from segnet_scratch.nn.modules import ConvUnit
from segnet_scratch.ops.elementwise.cast import Cast
from segnet_scratch.ops.op import Spec, spec
from segnet_scratch.ops.pooling.unpool_packed import UnpoolPacked
from segnet_scratch.runtime.devices import Array
from segnet_scratch.runtime.precision import BFLOAT16
from segnet_scratch.segnet import Block, SegNet

LOWEST = -1e30  # and bfloat16 has it


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


class FoldedWeights:
    """Weights and biases of a network's convolutions as they are now, in the element type of a rung.

    Batch norm is folded into them in double and rounded once; the model may already be folded, and is left as it is.
    The classifier has outputs beyond the classes, up to whole pieces: their logits are LOWEST, which neither a softmax
    nor an argmax sees.
    """

    def __init__(self, model: SegNet, rung: str) -> None:
        check(model, rung, training=False)
        self.convolutions, self.channels = Convolutions.on(model.device, rung), padded(model.classes, rung)
        classifier = np.zeros((self.channels, *model.classifier.weight.shape[1:]))
        classifier[: model.classes] = model.classifier.weight.numpy()
        bias = np.full(self.channels, LOWEST)
        bias[: model.classes] = model.classifier.bias.numpy()
        given = {CLASSIFIER: (classifier, bias)}
        given |= {name: unit.folded() for name, unit in model.named_modules(ConvUnit).items()}
        self.arrays: dict[str, Array] = {}
        for name, (weight, bias) in given.items():
            self.arrays[f"{name}.weight"] = model.device.upload(weight.astype(storage(rung)))
            self.arrays[f"{name}.bias"] = model.device.upload(bias.astype(np.float32))

    @classmethod
    def of(cls, model: SegNet, precision: str) -> "FoldedWeights":
        """For one of the settings of `precision`: float32, tf32, bf16."""
        return cls(model, RUNG_OF_PRECISION[precision])


class FusedInference:
    """Logits of a SegNet, in evaluation mode, for batches of one shape: images (batch, *size, 3) float32."""

    def __init__(self, model: SegNet, weights: FoldedWeights, batch: int, size: tuple[int, int]) -> None:
        self.device = model.device
        self.program = inference_program(
            model.blocks, model.classes, batch, size, weights.convolutions, model.classifier_kernel
        )
        self.arena = Arena.plan(self.program.lifetimes(kept=("logits",)))
        arrays = weights.arrays | self.arena.allocate(self.device)
        self.images = arrays["images"] = self.device.zeros((batch, *size, 3), np.float32)
        self._logits = arrays["logits"]
        self._bound = self.program.bind(arrays)

    def run(self, enter: Callable[[str], None] = lambda phase: None) -> Array:
        """Logits (batch, *size, channels) of what the images hold, op by op; the same array every time."""
        self._bound.run(self.device, enter)
        return self._logits
