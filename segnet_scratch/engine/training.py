"""The training step of the fused engine: forward, loss and backward as one program on one arena.

Read `training_program` top-down: it is SegNet, forwards and then backwards. Of the forward pass only y (a convolution's
bare result), the pooled maps and their two-bit codes last until backward; z = relu(bn(y)) or its unpooled map goes as
soon as the next convolution has read it, and is made again where wgrad needs it: to keep it would take the memory of y
another time, to make it takes one pass.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from segnet_scratch.engine.arena import Arena
from segnet_scratch.engine.convolutions import Convolutions
from segnet_scratch.engine.network import CLASSIFIER, Layer, layers_of, padded, storage, vector
from segnet_scratch.engine.program import Program
from segnet_scratch.engine.weights import WorkingWeights
from segnet_scratch.ops.convolution.conv2d import Conv2dBackwardBias
from segnet_scratch.ops.convolution.conv2d_fused import Below
from segnet_scratch.ops.convolution.tile_table import table_of
from segnet_scratch.ops.elementwise.cast import Cast
from segnet_scratch.ops.loss.softmax_cross_entropy import SoftmaxCrossEntropy
from segnet_scratch.ops.normalisation.norm_relu import (
    NormMergeGradients,
    NormMergeStatistics,
    NormReluBackward,
    NormReluForward,
    NormReluPoolBackward,
    NormReluPoolForward,
    NormReluUnpoolForward,
)
from segnet_scratch.ops.op import Op, Spec, spec
from segnet_scratch.ops.pooling.unpool_packed import UnpoolPacked
from segnet_scratch.runtime.devices import Array, Device
from segnet_scratch.runtime.machine import switch
from segnet_scratch.runtime.precision import BFLOAT16
from segnet_scratch.segnet import Block, SegNet


@dataclass(frozen=True)
class Objective:
    """What is minimised: softmax cross-entropy, as `nn.functions.cross_entropy` has it."""

    classes: int
    weighted: bool = False  # are there class weights?
    normalisation: str = "weights"
    smoothing: float = 0.0
    shared: bool = False  # is the batch a share of that of several ranks?


class _Builder:
    """Appends the steps of each layer. Arrays are called `<layer>.<what>`; `d<what>` is the gradient of <what>."""

    def __init__(
        self,
        layers: Sequence[Layer],
        convolutions: Convolutions,
        objective: Objective,
        classifier_kernel: int,
        branches: bool,
    ) -> None:
        self.program, self.layers, self.convolutions, self.objective = Program(), layers, convolutions, objective
        self.branches = branches
        rung = self.rung = convolutions.rung
        self.type = storage(rung)
        # By layer: the size, and the codes, of the unpool that follows it.
        self.unpool_above = {b.name: (a.unpool, a.codes) for b, a in pairwise(layers) if a.unpool and a.codes}
        n, h, w, c = layers[-1].full
        self.logits = Spec((n, h, w, padded(objective.classes, rung)), self.type)
        self.classifier_weight = (self.logits.shape[3], classifier_kernel, classifier_kernel, c)
        self._give(n, *layers[0].full[1:3])

    def _give(self, n: int, h: int, w: int) -> None:
        give = self.program.give
        give("images", spec((n, h, w, 3), np.float32))
        give("labels", spec((n, h, w), np.uint8))
        if self.objective.weighted:
            give("class_weights", vector(self.objective.classes))
        if self.objective.shared:
            give("share", spec((1,), np.float64))
        for layer in self.layers:
            self._give_weight(f"{layer.name}.conv.weight", layer.weight)
            for name in ("weight", "bias", "running_mean", "running_var"):
                give(f"{layer.name}.bn.{name}", vector(layer.block.out_channels))
            for name in ("weight", "bias"):
                give(f"d{layer.name}.bn.{name}", vector(layer.block.out_channels))
        self._give_weight(f"{CLASSIFIER}.weight", self.classifier_weight)
        give(f"{CLASSIFIER}.bias", vector(self.logits.shape[3]))
        give(f"d{CLASSIFIER}.bias", vector(self.logits.shape[3]))

    def _give_weight(self, name: str, shape: tuple[int, ...]) -> None:
        o, k, _, c = shape
        self.program.give(name, Spec(shape, self.type))
        below = name != f"{self.layers[0].name}.conv.weight"  # below the first layer there is nothing
        if below and self.convolutions.needs_flipped(shape):
            self.program.give(f"{name}.flipped", Spec((c, k, k, o), self.type))
        self.program.give(f"d{name}", spec(shape, np.float32))

    def add(self, layer: str, op: Op, **arrays: str) -> None:
        self.program.add(layer, op, **arrays)

    def spec_of(self, array: str) -> Spec:
        return self.program.spec_of(array)

    # Forward.

    def forward(self) -> None:
        x = "images"
        if self.type == BFLOAT16:
            self.add("images", Cast.plan(self.spec_of("images")), x="images", y="images.cast")
            x = "images.cast"
        self.first_input = x
        for layer in self.layers:
            self._block_forward(layer, x)
            x = self._output(layer)
        weight, bias = f"{CLASSIFIER}.weight", f"{CLASSIFIER}.bias"
        op = self.convolutions.forward(self.spec_of(x), self.spec_of(weight), bias=True)
        self.add(CLASSIFIER, op, x=x, weight=weight, bias=bias, y="logits")

    def _block_forward(self, layer: Layer, x: str) -> None:
        """y, its statistics, and where there is a pool the pooled map."""
        name = layer.name
        op = self.convolutions.forward(self.spec_of(x), Spec(layer.weight, self.type), statistics=True)
        statistics = {"partials": f"{name}.statistics"}
        if counted := "counts" in op.outputs:
            statistics["counts"] = f"{name}.counts"
        self.add(name, op, x=x, weight=f"{name}.conv.weight", y=f"{name}.y", **statistics)
        partials = self.spec_of(statistics["partials"])
        self.add(
            name,
            NormMergeStatistics.plan(partials, op.geometry.pixels, counted=counted),
            **statistics,
            running_mean=f"{name}.bn.running_mean",
            running_var=f"{name}.bn.running_var",
            mean=f"{name}.mean",
            inv_std=f"{name}.inv_std",
        )
        if layer.block.pool:
            pool = NormReluPoolForward.plan(self.spec_of(f"{name}.y"), layer.block.relu)
            out = {"pooled": f"{name}.pooled", "codes": f"{name}.codes"}
            self.add(name, pool, y=f"{name}.y", **self._norm(layer), **out)

    def _output(self, layer: Layer, again: str = "") -> str:
        """The array that the convolution above reads: z or the pooled map, unpooled if that block begins so.

        `again` ends the name of what is made another time, for wgrad.
        """
        name, relu, y = layer.name, layer.block.relu, self.spec_of(f"{layer.name}.y")
        unpool, codes = self.unpool_above.get(name, (None, ""))
        if unpool is None:
            if layer.block.pool:
                return f"{name}.pooled"
            made = f"{name}.z{again}"
            self.add(name, NormReluForward.plan(y, relu), y=f"{name}.y", **self._norm(layer), z=made)
            return made
        made = f"{name}.unpooled{again}"
        if layer.block.pool:
            pooled = f"{name}.pooled"
            self.add(name, UnpoolPacked.plan(self.spec_of(pooled), unpool), x=pooled, codes=codes, y=made)
        else:
            op = NormReluUnpoolForward.plan(y, unpool, relu)
            self.add(name, op, y=f"{name}.y", codes=codes, **self._norm(layer), unpooled=made)
        return made

    def _norm(self, layer: Layer) -> dict[str, str]:
        return {
            "mean": f"{layer.name}.mean",
            "inv_std": f"{layer.name}.inv_std",
            "weight": f"{layer.name}.bn.weight",
            "bias": f"{layer.name}.bn.bias",
        }

    # Backward.

    def backward(self) -> None:
        last, bias = self.layers[-1], f"d{CLASSIFIER}.bias"
        objective = self.objective
        loss = SoftmaxCrossEntropy.plan(self.logits, objective.classes, objective.normalisation, objective.smoothing)
        optional = {"class_weights": objective.weighted, "share": objective.shared}
        given = {name: name for name, there in optional.items() if there}
        self.add("loss", loss, logits="logits", labels="labels", **given, loss="loss", dlogits="dlogits")
        self.program.phase = "backward"
        with self._aside():
            self.add(CLASSIFIER, Conv2dBackwardBias.plan(self.logits), dy="dlogits", dbias=bias)
            self._weight_gradient(CLASSIFIER, f"{CLASSIFIER}.weight", f"{last.name}.z", "dlogits")
        self._below_gradient(CLASSIFIER, f"{CLASSIFIER}.weight", "dlogits", last, None, None)
        for position in reversed(range(len(self.layers))):
            below = self.layers[position - 1] if position else None
            self._block_backward(self.layers[position], below)

    def _block_backward(self, layer: Layer, below: Layer | None) -> None:
        """From dr, the gradient before the layer's ReLU, to its parameters' gradients and the dr of the layer below."""
        name, weight = layer.name, f"{layer.name}.conv.weight"
        sums = {"dweight": f"d{name}.bn.weight", "dbias": f"d{name}.bn.bias"}
        partials = f"d{name}.sums"
        self.add(name, NormMergeGradients.plan(self.spec_of(partials)), partials=partials, **sums)
        norm = {key: array for key, array in self._norm(layer).items() if key != "bias"}
        y = self.spec_of(f"{name}.y")
        if layer.block.pool:
            dy, codes = f"d{name}.y", f"{name}.codes"
            op: Op = NormReluPoolBackward.plan(y)
            self.add(name, op, y=f"{name}.y", dr=f"d{name}.r", codes=codes, **norm, **sums, dy=dy)
        else:
            dy = f"d{name}.r"  # in place
            self.add(name, NormReluBackward.plan(y), y=f"{name}.y", dr=dy, **norm, **sums)
        with self._aside():
            x = self._output(below, ".again") if below else self.first_input
            self._weight_gradient(name, weight, x, dy)
        if below is None:
            return
        self._below_gradient(name, weight, dy, below, layer.unpool, layer.codes)

    @contextmanager
    def _aside(self) -> Generator[None]:
        """Weight gradients lie on nobody's way: they may run beside what comes after them."""
        self.program.aside = self.branches
        yield
        self.program.aside = False

    def _weight_gradient(self, name: str, weight: str, x: str, dy: str) -> None:
        of_weight = self.spec_of(weight)
        self.add(name, self.convolutions.backward_weight(self.spec_of(x), of_weight), x=x, dy=dy, dweight=f"d{weight}")

    def _below_gradient(
        self, name: str, weight: str, dy: str, below: Layer, unpool: tuple[int, int] | None, codes: str | None
    ) -> None:
        of_below = Below(self.spec_of(f"{below.name}.y"), below.block.relu, below.block.pool)
        op = self.convolutions.backward_data(self.spec_of(dy), self.spec_of(weight), of_below, unpool)
        norm = self._norm(below)
        arrays = {
            "mean": norm["mean"],
            "inv_std": norm["inv_std"],
            "bn_weight": norm["weight"],
            "bn_bias": norm["bias"],
        }
        if below.block.pool:
            arrays["pool_codes"] = f"{below.name}.codes"
        if codes is not None:
            arrays["unpool_codes"] = codes
        out = {"dr": f"d{below.name}.r", "partials": f"d{below.name}.sums"}
        if "weight" in op.inputs:
            arrays["weight"] = weight
        else:
            arrays["flipped"] = f"{weight}.flipped"
        self.add(name, op, dy=dy, below_y=f"{below.name}.y", **arrays, **out)


def training_program(
    blocks: Sequence[Block],
    batch: int,
    size: tuple[int, int],
    convolutions: Convolutions,
    objective: Objective,
    classifier_kernel: int = 3,
    branches: bool = False,
) -> Program:
    """Forward, loss and backward of a network for images (batch, *size, 3); nothing is allocated.

    `branches`: weight gradients, and the maps that are made again for them, are aside.
    """
    builder = _Builder(layers_of(blocks, batch, *size), convolutions, objective, classifier_kernel, branches)
    builder.forward()
    builder.backward()
    return builder.program


def branches_key(blocks: Sequence[Block], batch: int, size: tuple[int, int], rung: str) -> str:
    """What the choice between one branch and two belongs to, in the table of tiles: "one" or "two"."""
    return f"branches {rung} {batch}x{size[0]}x{size[1]} {len(blocks)} blocks of {blocks[0].out_channels}"


def two_branches(device: Device, blocks: Sequence[Block], batch: int, size: tuple[int, int], rung: str) -> bool:
    """Do weight gradients run on a second stream? As `segnet tune` found, unless the environment says."""
    tuned = table_of(device).choices.get(branches_key(blocks, batch, size, rung)) == "two"
    return switch("SEGNET_BRANCHES", tuned, "weight gradients on a second stream", "one stream")


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
        objective = Objective(model.classes, class_weights is not None, normalisation, smoothing, shares is not None)
        self._shares, self._share = shares, self.device.zeros((1,), np.float64)
        batch, *size = shape
        self.program = training_program(
            model.blocks,
            batch,
            (size[0], size[1]),
            weights.convolutions,
            objective,
            model.classifier_kernel,
            shares is None  # of several ranks the second stream is for their sums
            and two_branches(self.device, model.blocks, batch, (size[0], size[1]), weights.convolutions.rung),
        )
        self.arena = Arena.plan(self.program.lifetimes(kept=("loss", "logits")))
        self.images, self.labels = self.device.zeros((*shape, 3), np.float32), self.device.zeros(shape, np.uint8)
        arrays = weights.arrays() | {
            "images": self.images,
            "labels": self.labels,
            "class_weights": class_weights,
            "share": self._share,
        }
        arrays |= {name: buffer.data for name, buffer in model.named_buffers().items()}
        arrays |= self.arena.allocate(self.device)
        self.loss, self._logits = arrays["loss"], arrays["logits"]
        self._bound = self.program.bind(arrays)
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

        self._bound.run(self.device, enter, after)
        if hold is not None:
            hold.append(self._logits)
