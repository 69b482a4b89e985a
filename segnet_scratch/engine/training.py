"""The training step of the fused engine: forward, loss and backward as one program on one arena.

Read `TrainingProgram` top-down: it is SegNet, forwards and then backwards. Of the forward pass only y (a convolution's
bare result), and of pools their maps, two-bit codes and y where they chose last until backward; z = relu(bn(y)) or its
unpooled map goes as soon as the next convolution has read it, and is made again where wgrad needs it: to keep it would
take the memory of y another time, to make it takes one pass.
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
from segnet_scratch.ops.convolution.conv2d import Conv2dBackwardBias
from segnet_scratch.ops.convolution.conv2d_fused import Below
from segnet_scratch.ops.convolution.conv2d_hopper import tiles_on
from segnet_scratch.ops.convolution.split_planes import planes_of
from segnet_scratch.ops.loss.softmax_cross_entropy import SoftmaxCrossEntropy
from segnet_scratch.ops.normalisation import norm_relu
from segnet_scratch.ops.op import Op, Spec, spec
from segnet_scratch.ops.pooling.packed_codes import UnpoolPacked
from segnet_scratch.runtime.devices import Array, Device
from segnet_scratch.runtime.machine import switch
from segnet_scratch.segnet import SegNet


@dataclass(frozen=True)
class Objective:
    """What is minimised: softmax cross-entropy, as `nn.functions.cross_entropy` has it."""

    weighted: bool = False  # are there class weights?
    normalisation: str = "weights"
    smoothing: float = 0.0
    shared: bool = False  # is the batch a share of that of several ranks?


class TrainingProgram(NetworkProgram):
    """Forward, loss and backward of a network; nothing is allocated.

    `branches`: weight gradients, and the maps that are made again for them, are aside. Arrays are called
    `<layer>.<what>`; `d<what>` is the gradient of <what>.
    """

    def __init__(
        self, network: Network, convolutions: Convolutions, objective: Objective, branches: bool = False
    ) -> None:
        super().__init__(network, convolutions)
        self.objective, self.branches, self.layers = objective, branches, network.layers
        # By layer: the size, and the codes, of the unpool that follows it.
        self.unpool_above = {b.name: (a.unpool, a.codes) for b, a in pairwise(self.layers) if a.unpool and a.codes}
        self._give()
        self._forward()
        self._backward()

    def _give(self) -> None:
        give, network = self.give, self.network
        give("labels", spec((network.batch, *network.size), np.uint8))
        if self.objective.weighted:
            give("class_weights", vector(network.classes))
        if self.objective.shared:
            give("share", spec((1,), np.float64))
        for layer in self.layers:
            self._give_weight(f"{layer.name}.conv.weight", layer.weight)
            for name in ("weight", "bias", "running_mean", "running_var"):
                give(f"{layer.name}.bn.{name}", vector(layer.block.out_channels))
            for name in ("weight", "bias"):
                give(f"d{layer.name}.bn.{name}", vector(layer.block.out_channels))
        classifier = network.classifier(self.convolutions.rung)
        self._give_weight(f"{CLASSIFIER}.weight", classifier)
        for name in (f"{CLASSIFIER}.bias", f"d{CLASSIFIER}.bias"):
            give(name, vector(classifier[0]))

    def _give_weight(self, name: str, shape: tuple[int, ...]) -> None:
        o, k, _, c = shape
        self.give_weight(name, shape)
        below = name != f"{self.layers[0].name}.conv.weight"  # below the first layer there is nothing
        if below and self.convolutions.needs_flipped(shape):
            self.give(f"{name}.flipped", Spec((c, k, k, o), self.type))
        self.give(f"d{name}", spec(shape, np.float32))

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
        op = self.convolutions.forward(Spec(layer.input, self.type), Spec(layer.weight, self.type), statistics=True)
        x = self._output(below, op.inputs["x"]) if below else self.first_input
        statistics = {"partials": f"{name}.statistics"}
        if counted := "counts" in op.outputs:
            statistics["counts"] = f"{name}.counts"
        weight = self.as_read(name, f"{name}.conv.weight", op.inputs["weight"])
        self.add(name, op, x=x, weight=weight, y=f"{name}.y", **statistics)
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

    def _output(self, layer: Layer, read: Spec, again: str = "") -> str:
        """The array that the convolution above reads: z or the pooled map, unpooled if that block begins so.

        In planes, where it reads these; `again` ends the name of what is made another time, for wgrad; what was
        pooled lasts till then.
        """
        name, relu, y = layer.name, layer.block.relu, self.spec_of(f"{layer.name}.y")
        unpool, codes = self.unpool_above.get(name, (None, ""))
        planes = planes_of(read, layer.block.out_channels)
        if layer.block.pool and not again:
            pool = norm_relu.NormReluPoolForward.plan(y, relu, planes if unpool is None else 1)
            out = {what: f"{name}.{what}" for what in pool.outputs}
            self.add(name, pool, y=f"{name}.y", **self._norm(layer), **out)
        if unpool is None:
            if layer.block.pool:
                return f"{name}.pooled"
            made = f"{name}.z{again}"
            self.add(name, norm_relu.NormReluForward.plan(y, relu, planes), y=f"{name}.y", **self._norm(layer), z=made)
            return made
        made = f"{name}.unpooled{again}"
        if layer.block.pool:
            pooled = f"{name}.pooled"
            self.add(name, UnpoolPacked.plan(self.spec_of(pooled), unpool, planes), x=pooled, codes=codes, y=made)
        else:
            op = norm_relu.NormReluUnpoolForward.plan(y, unpool, relu, planes)
            self.add(name, op, y=f"{name}.y", codes=codes, **self._norm(layer), unpooled=made)
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
        given = {name: name for name in loss.optional if name in self.given}
        self.add("loss", loss, logits="logits", labels="labels", **given, loss="loss", dlogits="dlogits")
        self.phase = "backward"
        wgrad = self.convolutions.backward_weight(Spec(last.full, self.type), self.spec_of(weight))
        dy = self.as_read(CLASSIFIER, "dlogits", wgrad.inputs["dy"])
        with self._aside():
            self.add(CLASSIFIER, Conv2dBackwardBias.plan(logits), dy="dlogits", dbias=f"d{CLASSIFIER}.bias")
            self._weight_gradient(CLASSIFIER, weight, wgrad, f"{last.name}.z", dy)
        self._below_gradient(CLASSIFIER, weight, logits, dy, last)
        for layer, below in zip(reversed(self.layers), [*reversed(self.layers[:-1]), None], strict=True):
            self._block_backward(layer, below)

    def _block_backward(self, layer: Layer, below: Layer | None) -> None:
        """From dr, the gradient before the layer's ReLU, to its parameters' gradients and the dr of the layer below."""
        name, weight = layer.name, f"{layer.name}.conv.weight"
        sums = {"dweight": f"d{name}.bn.weight", "dbias": f"d{name}.bn.bias"}
        partials = f"d{name}.sums"
        self.add(name, norm_relu.NormMergeGradients.plan(self.spec_of(partials)), partials=partials, **sums)
        norm = self._norm(layer)
        del norm["bias"]
        y = self.spec_of(f"{name}.y")
        wgrad = self.convolutions.backward_weight(Spec(layer.input, self.type), self.spec_of(weight))
        planes, dr = planes_of(wgrad.inputs["dy"], layer.block.out_channels), f"d{name}.r"
        if layer.block.pool:
            dy, codes = f"d{name}.y", f"{name}.codes"
            op: Op = norm_relu.NormReluPoolBackward.plan(y, planes)
            self.add(name, op, y=f"{name}.y", dr=dr, codes=codes, **norm, **sums, dy=dy)
        else:
            op = norm_relu.NormReluBackward.plan(y, planes)
            dy = dr if op.updates else f"d{name}.y"
            self.add(name, op, y=f"{name}.y", dr=dr, **norm, **sums, **dict.fromkeys(op.outputs, dy))
        with self._aside():
            x = self._output(below, wgrad.inputs["x"], ".again") if below else self.first_input
            self._weight_gradient(name, weight, wgrad, x, dy)
        if below is None:
            return
        self._below_gradient(name, weight, y, dy, below, layer)

    @contextmanager
    def _aside(self) -> Generator[None]:
        """Weight gradients lie on nobody's way: they may run beside what comes after them."""
        self.aside = self.branches
        yield
        self.aside = False

    def _weight_gradient(self, name: str, weight: str, op: Op, x: str, dy: str) -> None:
        self.add(name, op, x=self.as_read(name, x, op.inputs["x"]), dy=dy, dweight=f"d{weight}")

    def _below_gradient(self, name: str, weight: str, y: Spec, dy: str, below: Layer, own: Layer | None = None) -> None:
        read = f"{below.name}.chosen" if below.block.pool else f"{below.name}.y"
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
    multiply, must be up to date. Every parameter's `grad` holds its gradient.
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
        self._bound = BoundProgram(self.program, self.device, given, kept=("loss", "logits"))
        self.loss = self._bound.arrays["loss"]
        # By the last step that touches it: the gradient of each parameter.
        self._done: dict[int, list[Array]] = {}
        for name, parameter in model.named_parameters().items():
            self._done.setdefault(self.program.last_touch(f"d{name}"), []).append(parameter.grad)

    def prepare(self, number: int, labels: Array) -> None:
        """Nothing but images, labels and their share differs from step to step."""
        if self._shares is not None:
            self.device.write(self._share, self._shares(labels, [slice(None)]))

    def run(
        self,
        enter: Callable[[str], None] = lambda phase: None,
        hold: list[Array] | None = None,
        given: Callable[[Array], None] = lambda gradient: None,
    ) -> None:
        """One pass over what images and labels hold, op by op; `enter` is told of forward and backward."""

        def after(number: int) -> None:
            for gradient in self._done.get(number, ()):
                given(gradient)

        self._bound.run(enter, after)
        if hold is not None:
            hold.append(self._bound.arrays["logits"])
