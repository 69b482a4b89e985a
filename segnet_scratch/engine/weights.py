"""The weights as the fused kernels read them, beside the float32 parameters that SGD moves."""

import numpy as np

from segnet_scratch.engine.convolutions import Convolutions
from segnet_scratch.engine.network import CLASSIFIER, PLANES_OF, check, padded, storage
from segnet_scratch.runtime.devices import Array
from segnet_scratch.runtime.precision import BFLOAT16
from segnet_scratch.segnet import SegNet


class WorkingWeights:
    """For each convolution its weight in bfloat16 or planes of it, and flipped where dgrad takes it so.

    The classifier's outputs are padded to whole pieces: its parameters move into larger arrays, in which what lies
    beyond the classes is 0 and stays so. Where kernels take float32 (mma.sync), the parameter is the working weight.
    The optimiser that is given this object writes the copies in the launch that moves the parameters; its `refresh`
    does so after any other change.
    """

    def __init__(self, model: SegNet, rung: str) -> None:
        check(model, rung)
        self.model, self.rung, self.storage = model, rung, storage(rung)
        device = model.device
        self.convolutions = Convolutions.on(device, rung)
        beyond = 0, padded(model.classes, rung) - model.classes
        self._whole: dict[str, Array] = {}  # the classifier's parameters with their padding
        for part, parameter in model.classifier.named_parameters().items():
            values = np.pad(parameter.numpy(), [beyond, *[(0, 0)] * (len(parameter.shape) - 1)])
            self._whole[f"{CLASSIFIER}.{part}"] = array = device.upload(values)
            parameter.data = array[: model.classes]
        self.copies: dict[str, Array] = {}
        self.flipped: dict[str, Array] = {}
        weights = {name: p.data for name, p in model.named_parameters().items() if len(p.shape) == 4}
        for position, (name, weight) in enumerate(weights.items()):
            o, k, _, c = self._whole.get(name, weight).shape
            if copy := self.convolutions.copy_of((o, k, k, c)):
                self.copies[name] = device.zeros(copy.shape, copy.dtype)
            if position > 0 and self.convolutions.needs_flipped((o, k, k, c)):  # below the first layer there is nothing
                self.flipped[name] = device.zeros((c, k, k, o), self.storage)

    def arrays(self) -> dict[str, Array]:
        """What the kernels read, by the names of the training program."""
        arrays = {name: p.data for name, p in self.model.named_parameters().items()}
        flipped = {f"{name}.flipped": array for name, array in self.flipped.items()}
        of_copies = "" if self.storage == BFLOAT16 else PLANES_OF
        copies = {f"{name}{of_copies}": array for name, array in self.copies.items()}
        return arrays | self._whole | copies | flipped
