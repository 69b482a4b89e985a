"""SegNet's blocks as the fused engine computes them: which of them it takes, and the arrays that belong to each."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from segnet_scratch.engine.convolutions import Convolutions
from segnet_scratch.engine.program import Program
from segnet_scratch.errors import ConfigError
from segnet_scratch.ops.convolution.conv2d_fused import FusedForward
from segnet_scratch.ops.convolution.conv2d_mma import has_tensor_cores, without_tensor_cores
from segnet_scratch.ops.convolution.split_planes import SplitPlanes, planes_of
from segnet_scratch.ops.elementwise.cast import Cast
from segnet_scratch.ops.op import Spec, spec
from segnet_scratch.ops.pieces import piece_of
from segnet_scratch.ops.pooling.windows import windows_of
from segnet_scratch.runtime.precision import BFLOAT16, ELEMENTS_OF_RUNG
from segnet_scratch.segnet import Block, SegNet

CLASSIFIER = "classifier"
PLANES_OF = ".planes"  # ends the name of the planes of an array
RUNG_OF_PRECISION = {"float32": "tf32x3", "tf32": "tf32", "bf16": "bf16"}


@dataclass(frozen=True)
class Layer:
    """A block of the network with its sizes."""

    block: Block
    full: tuple[int, int, int, int]  # (n, h, w, out channels): y, and z where it is not pooled
    unpool: tuple[int, int] | None  # (h, w) of the unpooled input
    codes: str | None  # the array of packed codes that the block's unpool reads

    @property
    def name(self) -> str:
        """The prefix of its parameters."""
        return self.block.name

    @property
    def out(self) -> tuple[int, ...]:
        """What it gives to the next layer."""
        return windows_of(*self.full) if self.block.pool else self.full

    @property
    def input(self) -> tuple[int, ...]:
        """What its convolution reads: the images, or what the layer below gives, unpooled if the block begins so."""
        return *self.full[:3], self.block.in_channels

    @property
    def weight(self) -> tuple[int, int, int, int]:
        """(o, k, k, c)."""
        b = self.block
        return b.out_channels, b.kernel, b.kernel, b.in_channels


@dataclass(frozen=True)
class Network:
    """What a program is planned for: a network, and its batches of images (batch, *size, 3)."""

    blocks: Sequence[Block]
    classes: int
    batch: int
    size: tuple[int, int]
    classifier_kernel: int = 3

    @staticmethod
    def of(model: SegNet, batch: int, size: tuple[int, int]) -> "Network":
        """A model's."""
        return Network(model.blocks, model.classes, batch, size, model.classifier_kernel)

    @cached_property
    def layers(self) -> list[Layer]:
        """The blocks with their sizes."""
        layers: list[Layer] = []
        pools: list[tuple[str, tuple[int, int]]] = []
        size = self.size
        for block in self.blocks:
            unpool, codes = None, None
            if block.unpool is not None:
                codes, size = pools.pop()
                unpool = size
            layer = Layer(block, (self.batch, *size, block.out_channels), unpool, codes)
            if block.pool:
                pools.append((f"{block.name}.codes", size))
                size = layer.out[1], layer.out[2]
            layers.append(layer)
        return layers

    def classifier(self, rung: str) -> tuple[int, int, int, int]:
        """(o, k, k, c) of the classifier's weight; outputs beyond the classes make up whole pieces."""
        k = self.classifier_kernel
        return padded(self.classes, rung), k, k, self.blocks[-1].out_channels


class NetworkProgram(Program):
    """A program from `images` to `logits`, with what both passes, of training and of inference, have in common."""

    def __init__(self, network: Network, convolutions: Convolutions) -> None:
        super().__init__()
        self.network, self.convolutions, self.type = network, convolutions, storage(convolutions.rung)

    def images(self) -> str:
        """Gives the images; what the first convolution reads."""
        self.declare("images", spec((self.network.batch, *self.network.size, 3), np.float32))
        if self.type != BFLOAT16:
            return "images"
        self.add("images", Cast.plan(self.external["images"]), x="images", y="images.cast")
        return "images.cast"

    def declare_weight(self, name: str, shape: tuple[int, ...]) -> str:
        """Gives a convolution's weight, and its planes where there are kernels that read these."""
        if (copy := self.convolutions.copy_of(shape)) and self.type != BFLOAT16:
            self.declare(f"{name}{PLANES_OF}", copy)
        return self.declare(name, Spec(shape, self.type))

    def as_read(self, layer: str, array: str, read: Spec) -> str:
        """The name of an array as an op reads it: as it is, or in planes, which are made once."""
        whole, planes = self.spec_of(array), f"{array}{PLANES_OF}"
        if whole == read:
            return array
        if planes not in self.external | self.intermediate:
            self.add(layer, SplitPlanes.plan(whole, planes_of(read, whole.shape[-1])), x=array, y=planes)
        return planes

    def classifier_op(self, x: Spec) -> FusedForward:
        """What makes the logits of a map."""
        return self.convolutions.forward(x, self.spec_of(f"{CLASSIFIER}.weight"), bias=True)

    def classify(self, op: FusedForward, x: str) -> None:
        """The logits of the last map."""
        weight = self.as_read(CLASSIFIER, f"{CLASSIFIER}.weight", op.inputs["weight"])
        x = self.as_read(CLASSIFIER, x, op.inputs["x"])
        self.add(CLASSIFIER, op, x=x, weight=weight, bias=f"{CLASSIFIER}.bias", y="logits")


def unsupported_reason(model: SegNet, rung: str, training: bool) -> str | None:
    """Why the fused engine cannot compute a network; None where it can."""
    piece = piece_of(ELEMENTS_OF_RUNG[rung])
    width = f"at width {model.width:g}; widths 1, 0.5, 0.25 and 0.125 fit"
    reasons = (
        (rung == "tf32x3" and without_tensor_cores(), "multiplies float32 on tensor cores, which SEGNET_FMA=1 forbids"),
        (model.decoder_kind != "indices", f"unpools by indices, the decoder of this network is {model.decoder_kind!r}"),
        (model.pooling != "ceil", f"pools odd maps in ceil mode, and this network in {model.pooling!r} mode"),
        (training and model.has_dropout, "has no dropout, and this network does (Bayesian SegNet)"),
        (training and model.folded, "trains batch norm, which is folded into the convolutions of this network"),
        (model.dtype != np.float32, f"keeps parameters in float32, and those of this network are {model.dtype}"),
        *(
            (b.out_channels % piece, f"moves pieces of {piece} channels, and {b.name} has {b.out_channels} {width}")
            for b in model.blocks
        ),
    )
    return next((reason for holds, reason in reasons if holds), None)


def check(model: SegNet, rung: str, training: bool = True) -> None:
    """ConfigError where the fused engine cannot compute this network on this device."""
    if reason := unsupported_reason(model, rung, training):
        raise ConfigError(f'engine: the fused engine {reason}; set engine = "layers"')
    if not has_tensor_cores(model.device):
        raise ConfigError(
            "engine: the fused engine needs tensor cores of sm_80 or newer, and this GPU is "
            f'{model.device.architecture}; set engine = "layers"'
        )


def padded(classes: int, rung: str) -> int:
    """Channels of the logits: the classes, up to whole pieces. Those beyond have weight and gradient 0."""
    piece = piece_of(ELEMENTS_OF_RUNG[rung])
    return -(-classes // piece) * piece


def storage(rung: str) -> np.dtype:
    """The element type of maps."""
    return ELEMENTS_OF_RUNG[rung]


def vector(channels: int) -> Spec:
    """A float32 number a channel."""
    return Spec((channels,), np.dtype(np.float32))
