"""The training step of the fused engine: forward, loss and backward as one program on one arena.

Read `TrainingProgram` top-down: it is SegNet, forwards and then backwards. Of the forward pass only y (a convolution's
bare result), and of pools two-bit codes and y where they chose last until backward; z = relu(bn(y)), its pooled or its
unpooled map goes as soon as the next convolution has read it, and is recomputed where wgrad needs it: to keep it would
take the memory of y another time, to make it takes one pass. So is y of the first layer.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from segnet_scratch.engine.convolutions import Convolutions
from segnet_scratch.engine.network import CLASSIFIER, Layer, Network, NetworkProgram, vector
from segnet_scratch.engine.program import BoundProgram
from segnet_scratch.engine.weights import WorkingWeights
from segnet_scratch.nn.autograd import Tensor
from segnet_scratch.ops.convolution.conv2d import Conv2dBackwardBias
from segnet_scratch.ops.convolution.conv2d_fused import Below, FusedForward
from segnet_scratch.ops.convolution.conv2d_hopper import tiles_on
from segnet_scratch.ops.convolution.split_planes import planes_of
from segnet_scratch.ops.loss.softmax_cross_entropy import SoftmaxCrossEntropy
from segnet_scratch.ops.normalisation import norm_relu
from segnet_scratch.ops.op import Op, Spec, spec
from segnet_scratch.runtime.devices import Array, Device
from segnet_scratch.runtime.machine import switch
from segnet_scratch.segnet import SegNet

RECOMPUTED = ".recomputed"  # ends the name of a map that backward computes another time


@dataclass(frozen=True)
class Objective:
    """What is minimised: softmax cross-entropy, as `nn.functions.cross_entropy` has it."""

    weighted: bool = False  # are there class weights?
    normalisation: str = "weights"
    smoothing: float = 0.0
    shared: bool = False  # is the batch a share of that of several ranks?


class TrainingProgram(NetworkProgram):
    """Forward, loss and backward of a network; nothing is allocated.

    `branches`: weight gradients, and what is recomputed for them, are on the side stream. Arrays are called
    `<layer>.<what>`; `d<what>` is the gradient of <what>.
    """

    def __init__(
        self, network: Network, convolutions: Convolutions, objective: Objective, branches: bool = False
    ) -> None:
        super().__init__(network, convolutions)
        self.objective, self.branches, self.layers = objective, branches, network.layers
        # By layer: the size, and the codes, of the unpool that follows it.
        self.unpool_above = {b.name: (a.unpool, a.codes) for b, a in pairwise(self.layers) if a.unpool and a.codes}
        self.y = {layer.name: f"{layer.name}.y" for layer in self.layers}
        self._declare()
        self._forward()
        self._backward()
        gradients = [f"d{name}" for name in self.external if name.endswith((".weight", ".bias"))]
        self.kept = ["loss", *gradients]  # to the end

    def _declare(self) -> None:
        declare, network = self.declare, self.network
        declare("labels", spec((network.batch, *network.size), np.uint8))
        if self.objective.weighted:
            declare("class_weights", vector(network.classes))
        if self.objective.shared:
            declare("share", spec((1,), np.float64))
        for layer in self.layers:
            self._declare_weight(f"{layer.name}.conv.weight", layer.weight)
            for name in ("weight", "bias", "running_mean", "running_var"):
                declare(f"{layer.name}.bn.{name}", vector(layer.block.out_channels))
        classifier = network.classifier(self.convolutions.rung)
        self._declare_weight(f"{CLASSIFIER}.weight", classifier)
        declare(f"{CLASSIFIER}.bias", vector(classifier[0]))

    def _declare_weight(self, name: str, shape: tuple[int, ...]) -> None:
        o, k, _, c = shape
        self.declare_weight(name, shape)
        below = name != f"{self.layers[0].name}.conv.weight"  # below the first layer there is nothing
        if below and self.convolutions.needs_flipped(shape):
            self.declare(f"{name}.flipped", Spec((c, k, k, o), self.type))

    # Forward.

    def _forward(self) -> None:
        self.first_input = self.images()
        for layer, below in zip(self.layers, [None, *self.layers[:-1]], strict=True):
            self._block_forward(layer, below)
        last = self.layers[-1]
        op = self.classifier_op(Spec(last.full, self.type))
        self.classify(op, self._output(last, op.inputs["x"]))

    def _block_forward(self, layer: Layer, below: Layer | None) -> None:
        """y and its statistics."""
        name = layer.name
        op = self._convolution(layer, statistics=True)
        x = self._output(below, op.inputs["x"]) if below else self.first_input
        statistics = {"partials": f"{name}.statistics"}
        if counted := "counts" in op.outputs:
            statistics["counts"] = f"{name}.counts"
        weight = self.as_read(name, f"{name}.conv.weight", op.inputs["weight"])
        self.add(name, op, x=x, weight=weight, y=self.y[name], **statistics)
        partials = self.spec_of(statistics["partials"])
        self.add(
            name,
            norm_relu.NormMergeStatistics.plan(partials, op.geometry.pixels, counted=counted),
            **statistics,
            running_mean=f"{name}.bn.running_mean",
            running_var=f"{name}.bn.running_var",
            mean=f"{name}.mean",
            inv_std=f"{name}.inv_std",
        )

    def _convolution(self, layer: Layer, statistics: bool) -> FusedForward:
        x, weight = Spec(layer.input, self.type), Spec(layer.weight, self.type)
        return self.convolutions.forward(x, weight, statistics=statistics)

    def _output(self, layer: Layer, read: Spec, recomputed: str = "") -> str:
        """The array that the convolution above reads: z or the pooled map, unpooled if that block begins so.

        In planes, where it reads these; `recomputed`: the end of its name where that is done, for wgrad. A pooled map
        is then the z of y where the pool chose, and so is what is unpooled at once: the same numbers.
        """
        name, relu, y = layer.name, layer.block.relu, self.y[layer.name]
        planes, norm = planes_of(read, layer.block.out_channels), self._norm(layer)
        unpool, codes = self.unpool_above.get(name, (None, ""))
        if layer.block.pool:
            if not recomputed:
                pool = norm_relu.NormReluPoolForward.plan(self.spec_of(y), relu, planes if unpool is None else 1)
                self.add(name, pool, y=y, **norm, **{what: f"{name}.{what}" for what in pool.outputs})
                if unpool is None:
                    return f"{name}.pooled"
            y = f"{name}.chosen"
        if unpool is None:
            made = f"{name}.z{recomputed}"
            self.add(name, norm_relu.NormReluForward.plan(self.spec_of(y), relu, planes), y=y, **norm, z=made)
        else:
            made = f"{name}.unpooled{recomputed}"
            op = norm_relu.NormReluUnpoolForward.plan(self.spec_of(y), unpool, relu, planes)
            self.add(name, op, y=y, codes=codes, **norm, unpooled=made)
        return made

    def _norm(self, layer: Layer, prefix: str = "") -> dict[str, str]:
        """Of the layer's batch norm; `prefix` comes before what an op calls its parameters."""
        statistics = {what: f"{layer.name}.{what}" for what in ("mean", "inv_std")}
        return statistics | {f"{prefix}{what}": f"{layer.name}.bn.{what}" for what in ("weight", "bias")}

    # Backward.

    def _backward(self) -> None:
        objective, logits, last = self.objective, self.spec_of("logits"), self.layers[-1]
        classes, weight = self.network.classes, f"{CLASSIFIER}.weight"
        loss = SoftmaxCrossEntropy.plan(logits, classes, objective.normalisation, objective.smoothing)
        given = {name: name for name in loss.optional if name in self.external}
        self.add("loss", loss, logits="logits", labels="labels", **given, loss="loss", dlogits="dlogits")
        self.phase = "backward"
        wgrad = self.convolutions.backward_weight(Spec(last.full, self.type), self.spec_of(weight))
        dy = self.as_read(CLASSIFIER, "dlogits", wgrad.inputs["dy"])
        # Not on the side stream: beside z, there since the forward pass, dgrad's output would raise the peak by far.
        self.add(CLASSIFIER, Conv2dBackwardBias.plan(logits), dy="dlogits", dbias=f"d{CLASSIFIER}.bias")
        self._weight_gradient(CLASSIFIER, weight, wgrad, f"{last.name}.z", dy)
        self._below_gradient(CLASSIFIER, weight, logits, dy, last)
        first = self.layers[0]
        for layer, below in zip(reversed(self.layers), [*reversed(self.layers[:-1]), None], strict=True):
            if below is first:
                self._recompute_first(first)
            self._block_backward(layer, below)

    def _recompute_first(self, first: Layer) -> None:
        """y of the first layer: one of the largest maps, and of 3 channels the cheapest."""
        name = first.name
        op, self.y[name] = self._convolution(first, statistics=False), f"{name}.y{RECOMPUTED}"
        weight = self.as_read(name, f"{name}.conv.weight", op.inputs["weight"])
        self.add(name, op, x=self.first_input, weight=weight, y=self.y[name])

    def _block_backward(self, layer: Layer, below: Layer | None) -> None:
        """From dr, the gradient before the layer's ReLU, to its parameters' gradients and the dr of the layer below."""
        name, weight = layer.name, f"{layer.name}.conv.weight"
        sums = {"dweight": f"d{name}.bn.weight", "dbias": f"d{name}.bn.bias"}
        partials = f"d{name}.sums"
        self.add(name, norm_relu.NormMergeGradients.plan(self.spec_of(partials)), partials=partials, **sums)
        norm = self._norm(layer)
        del norm["bias"]
        y = self.spec_of(self.y[name])
        wgrad = self.convolutions.backward_weight(Spec(layer.input, self.type), self.spec_of(weight))
        planes, dr = planes_of(wgrad.inputs["dy"], layer.block.out_channels), f"d{name}.r"
        if layer.block.pool:
            dy, codes = f"d{name}.y", f"{name}.codes"
            op: Op = norm_relu.NormReluPoolBackward.plan(y, planes)
            self.add(name, op, y=self.y[name], dr=dr, codes=codes, **norm, **sums, dy=dy)
        else:
            op = norm_relu.NormReluBackward.plan(y, planes)
            dy = dr if op.updates else f"d{name}.y"
            self.add(name, op, y=self.y[name], dr=dr, **norm, **sums, **dict.fromkeys(op.outputs, dy))
        with self._on_side_stream():
            x = self._output(below, wgrad.inputs["x"], RECOMPUTED) if below else self.first_input
            self._weight_gradient(name, weight, wgrad, x, dy)
        if below is None:
            return
        self._below_gradient(name, weight, y, dy, below, layer)

    @contextmanager
    def _on_side_stream(self) -> Generator[None]:
        """Nothing waits for weight gradients: they may run beside what comes after them."""
        self.side_stream = self.branches
        yield
        self.side_stream = False

    def _weight_gradient(self, name: str, weight: str, op: Op, x: str, dy: str) -> None:
        self.add(name, op, x=self.as_read(name, x, op.inputs["x"]), dy=dy, dweight=f"d{weight}")

    def _below_gradient(self, name: str, weight: str, y: Spec, dy: str, below: Layer, own: Layer | None = None) -> None:
        read = f"{below.name}.chosen" if below.block.pool else self.y[below.name]
        of_below = Below(self.spec_of(read), below.block.relu)
        op = self.convolutions.backward_data(y, self.spec_of(weight), of_below, own.unpool if own else None)
        arrays = self._norm(below, "bn_") | {"dr": f"d{below.name}.r", "partials": f"d{below.name}.sums"}
        if own and own.codes:
            arrays["unpool_codes"] = own.codes
        if "weight" in op.inputs:
            arrays["weight"] = self.as_read(name, weight, op.inputs["weight"])
        else:
            arrays["flipped"] = f"{weight}.flipped"
        self.add(name, op, dy=dy, below_y=read, **arrays)


def two_branches(device: Device, rung: str) -> bool:
    """Do weight gradients run on a second stream? Where that was measured to be faster, unless the environment says.

    In bfloat16 with Hopper's kernels (docs/explanation/kernels.md).
    """
    faster = device.gpu is not None and rung == "bf16" and tiles_on(device) is not None
    return switch("SEGNET_BRANCHES", faster, "weight gradients on a second stream", "one stream")


class FusedTraining:
    """Loss and gradients of a SegNet for batches of one shape, in the place of its layers' autograd.

    Parameters and running statistics are the model's own arrays; `weights`, which say in what precision convolutions
    multiply, must be up to date. Every parameter's `grad` is its gradient, until the next run: it lies in the arena,
    where maps of which backward has no more need have been.
    """

    def __init__(
        self,
        model: SegNet,
        weights: WorkingWeights,
        class_weights: Array | None,
        normalisation: str,
        smoothing: float,
        shape: tuple[int, int, int],
        shares: Callable[[Array, Sequence[slice]], np.ndarray] | None = None,
    ) -> None:
        """`shape`: (batch, height, width). `shares` of labels in the loss of several ranks, where there are such."""
        self.device = model.device
        objective = Objective(class_weights is not None, normalisation, smoothing, shares is not None)
        self._shares, self._share = shares, self.device.zeros((1,), np.float64)
        batch, height, width = shape
        network, kernels = Network.of(model, batch, (height, width)), weights.convolutions
        # Of several ranks the second stream is for their sums.
        branches = shares is None and two_branches(self.device, kernels.rung)
        self.program = TrainingProgram(network, kernels, objective, branches)
        self.images, self.labels = self.device.zeros((*shape, 3), np.float32), self.device.zeros(shape, np.uint8)
        batches = {"images": self.images, "labels": self.labels, "class_weights": class_weights, "share": self._share}
        statistics = {name: buffer.data for name, buffer in model.named_buffers().items()}
        given = weights.arrays() | batches | statistics
        self._bound = BoundProgram(self.program, self.device, given, self.program.kept)
        self.loss = self._bound.arrays["loss"]
        self._gradients: list[tuple[Tensor, Array]] = []
        self._done: dict[int, list[Array]] = {}  # by the last step that touches it
        for name, parameter in model.named_parameters().items():
            # Of the classifier the padding is left out; what remains lies together, as outputs come first.
            gradient = self._bound.arrays[f"d{name}"][: parameter.shape[0]]
            self._gradients.append((parameter, gradient))
            self._done.setdefault(self.program.last_touch(f"d{name}"), []).append(gradient)

    def prepare(self, number: int, labels: Array) -> None:
        """Nothing but images, labels and their share differs from step to step."""
        if self._shares is not None:
            self.device.write(self._share, self._shares(labels, [slice(None)]))

    def run(
        self,
        on_phase: Callable[[str], None] = lambda phase: None,
        logits_out: list[Array] | None = None,
        on_gradient: Callable[[Array], None] = lambda gradient: None,
    ) -> None:
        """One pass over what images and labels hold, op by op; `on_phase` is told of forward and backward.

        A copy of the logits, whose memory is used again, is added to `logits_out`, if given.
        """

        def after(number: int) -> None:
            for gradient in self._done.get(number, ()):
                on_gradient(gradient)
            if logits_out is not None and number == self.program.last_touch("logits"):
                logits_out.append(self.device.copy(self._bound.arrays["logits"]))

        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        self._bound.run(on_phase, after)
