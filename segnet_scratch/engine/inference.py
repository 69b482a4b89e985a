"""Inference by the fused engine: batch norm folded, one kernel a block, one arena, one graph.

A block is one kernel: bias, ReLU and pool in its epilogue; where it begins with an unpool, the unpooled map is written.
"""

from collections.abc import Callable

import numpy as np

from segnet_scratch.engine.convolutions import Convolutions
from segnet_scratch.engine.network import CLASSIFIER, PLANES_OF, Network, NetworkProgram, check, padded, storage, vector
from segnet_scratch.engine.program import BoundProgram
from segnet_scratch.nn.modules import ConvUnit
from segnet_scratch.ops.convolution.split_planes import planes_of, split_for
from segnet_scratch.ops.normalisation.norm_relu import NormReluUnpoolForward
from segnet_scratch.ops.op import Spec
from segnet_scratch.runtime.devices import Array
from segnet_scratch.segnet import SegNet

LOWEST = -1e30  # and bfloat16 has it


class InferenceProgram(NetworkProgram):
    """Logits of images, padded to whole pieces of channels; nothing is allocated."""

    def __init__(self, network: Network, convolutions: Convolutions) -> None:
        super().__init__(network, convolutions)
        x = self.images()
        for layer in network.layers:
            name, block = layer.name, layer.block
            arrays = self._declare(name, layer.weight)
            map_, weight = Spec(layer.input, self.type), self.spec_of(arrays["weight"])
            op = convolutions.forward(map_, weight, bias=True, relu=block.relu, pool=block.pool)
            if layer.unpool is not None and layer.codes is not None:
                planes = planes_of(op.inputs["x"], block.in_channels)
                unpool = NormReluUnpoolForward.plan(self.spec_of(x), layer.unpool, relu=False, planes=planes)
                self.add(name, unpool, y=x, codes=layer.codes, unpooled=f"{name}.unpooled")
                x = f"{name}.unpooled"
            if block.pool:
                arrays["pool_codes"] = f"{name}.codes"
            arrays["weight"] = self.as_read(name, arrays["weight"], op.inputs["weight"])
            self.add(name, op, x=self.as_read(name, x, op.inputs["x"]), **arrays, y=f"{name}.z")
            x = f"{name}.z"
        self._declare(CLASSIFIER, network.classifier(convolutions.rung))
        self.classify(self.classifier_op(self.spec_of(x)), x)

    def _declare(self, name: str, weight: tuple[int, ...]) -> dict[str, str]:
        return {
            "weight": self.declare_weight(f"{name}.weight", weight),
            "bias": self.declare(f"{name}.bias", vector(weight[0])),
        }


class FoldedWeights:
    """Weights and biases of a network's convolutions as they are now, in the element type of a rung.

    Batch norm is folded into them in double and rounded once; the model may already be folded, and is left as it is.
    The classifier has outputs beyond the classes, up to whole pieces: their logits are LOWEST, which neither a softmax
    nor an argmax sees.
    """

    def __init__(self, model: SegNet, rung: str) -> None:
        check(model, rung, training=False)
        self.convolutions, self.channels = Convolutions.on(model.device, rung), padded(model.classes, rung)
        classifier, beyond = model.classifier, (0, self.channels - model.classes)
        weight = np.pad(classifier.weight.numpy(), [beyond, (0, 0), (0, 0), (0, 0)])
        given = {CLASSIFIER: (weight, np.pad(classifier.bias.numpy(), beyond, constant_values=LOWEST))}
        given |= {name: unit.folded() for name, unit in model.named_modules(ConvUnit).items()}
        self.arrays: dict[str, Array] = {}
        for name, (weight, bias) in given.items():
            self.arrays[f"{name}.weight"] = array = model.device.upload(weight.astype(storage(rung)))
            if copy := self.convolutions.copy_of(weight.shape):
                self.arrays[f"{name}.weight{PLANES_OF}"] = split_for(model.device, array, copy)
            self.arrays[f"{name}.bias"] = model.device.upload(bias.astype(np.float32))


class FusedInference:
    """Logits of a SegNet, in evaluation mode, for batches of one shape: images (batch, *size, 3) float32."""

    def __init__(self, model: SegNet, weights: FoldedWeights, batch: int, size: tuple[int, int]) -> None:
        self.program = InferenceProgram(Network.of(model, batch, size), weights.convolutions)
        self.images = model.device.zeros((batch, *size, 3), np.float32)
        given = weights.arrays | {"images": self.images}
        self._bound = BoundProgram(self.program, model.device, given, kept=("logits",))

    def run(self, on_phase: Callable[[str], None] = lambda phase: None) -> Array:
        """Logits (batch, *size, channels) of what the images hold, op by op; the same array every time."""
        self._bound.run(on_phase)
        return self._bound.arrays["logits"]
