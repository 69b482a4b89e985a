"""One inference step as an object, for whoever applies a network: evaluation, prediction, profiler, proofs, benchmarks.

    step = InferenceStep(model, *resolve(model, "auto", "auto", training=False))
    logits = step(images)                       # on the device; waits for nothing
    (values,) = step.device.download_async([logits]).get()  # waits for that step alone

The first step of each shape of batch runs op by op, all later ones replay it as a CUDA graph where the device is a GPU.
"""

from collections import OrderedDict
from contextlib import nullcontext

import numpy as np

from segnet_scratch.engine.inference import FoldedWeights, FusedInference
from segnet_scratch.engine.network import RUNG_OF_PRECISION
from segnet_scratch.errors import DTypeError, ShapeError
from segnet_scratch.nn.autograd import Tensor, no_grad
from segnet_scratch.nn.modules import dropout_sampling
from segnet_scratch.ops.elementwise.dropout import STATE
from segnet_scratch.runtime.devices import Array
from segnet_scratch.segnet import SegNet
from segnet_scratch.step import GraphReplay, OnPhase, ignore

SHAPES = 4  # of batches whose maps and graphs are kept; the one that was used least recently makes room


class LayersInference:
    """The pass of the layers; `state` (seed, step): dropout drops by it, although the model is in evaluation mode."""

    def __init__(self, model: SegNet, shape: tuple[int, ...], state: Array | None) -> None:
        self._model, self._state = model, state
        self.images = model.device.zeros(shape, model.dtype)

    def run(self, on_phase: OnPhase = ignore) -> Array:
        """One pass over what the images hold, op by op."""
        on_phase("forward")
        with no_grad(), nullcontext() if self._state is None else dropout_sampling(self._state):
            return self._model(Tensor(self.images, self._model.device)).data


Pass = LayersInference | FusedInference  # logits of batches of one shape, which is written to `images`


class InferenceStep:
    """Logits of a model in evaluation mode, by the `layers` or the `fused` engine, for batches of any shape.

    `precision` is how the fused engine multiplies; layers do it as their model was built. The fused engine takes the
    weights as they are now, the layers as they are at each step. Maps are kept for SHAPES shapes of batches at most.
    For one thread at a time. ConfigError where the fused engine cannot compute the model.
    """

    def __init__(self, model: SegNet, engine: str = "layers", precision: str = "float32") -> None:
        self.model, self.device, self.engine, self.precision = model, model.device, engine, precision
        self._weights = FoldedWeights(model, RUNG_OF_PRECISION[precision]) if engine == "fused" else None
        self._state = self.device.zeros(STATE.shape, STATE.dtype)
        self._passes: OrderedDict[object, tuple[Pass, GraphReplay[Array]]] = OrderedDict()

    @property
    def channels(self) -> int:
        """Of the logits: the classes, and with the fused engine some more, which no class loses to."""
        return self.model.classes if self._weights is None else self._weights.channels

    def __call__(self, images: Array, sample: int | None = None) -> Array:
        """Logits (n, h, w, channels) of normalised images (n, h, w, 3), of the CPU or of the device.

        In the precision's element type; they may be overwritten by the next step. `sample`: the number of the dropout
        masks of a Bayesian SegNet, None for no dropout.
        """
        self.write(images, sample)
        return self.run()

    def write(self, images: Array, sample: int | None = None) -> None:
        """What `run` works on."""
        if len(images.shape) != 4 or images.shape[3] != 3:
            raise ShapeError(f"inference step: images {tuple(images.shape)}; expected (n, h, w, 3)")
        if images.dtype != self.model.dtype:
            raise DTypeError(f"inference step: images of {images.dtype}; expected {self.model.dtype}, normalised")
        key = tuple(images.shape), sample is not None
        if key not in self._passes:
            if len(self._passes) == SHAPES:
                self.device.synchronise()  # its graph may be at work
                self._passes.popitem(last=False)
            planned = self._plan(*key)
            self._passes[key] = planned, GraphReplay(self.device, planned.run)
        self._passes.move_to_end(key)
        self._pass, self._replayed = self._passes[key]
        self.device.write(self._pass.images, images)
        if sample is not None:
            self.device.write(self._state, np.array([0, sample], STATE.dtype))

    def _plan(self, shape: tuple[int, ...], sampled: bool) -> Pass:
        if self._weights is not None:
            return FusedInference(self.model, self._weights, shape[0], (shape[1], shape[2]))
        return LayersInference(self.model, shape, self._state if sampled else None)

    def run(self) -> Array:
        """One step on what was written."""
        if self.model.training:
            self.model.eval()
        return self._replayed()

    def run_eagerly(self, on_phase: OnPhase = ignore) -> Array:
        """As `run`, but op by op, never as a graph, so that observers see it."""
        self.model.eval()
        return self._pass.run(on_phase)
