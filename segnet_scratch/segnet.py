"""SegNet and SegNet-Basic (Badrinarayanan, Kendall, Cipolla, arXiv 1511.00561), read like the paper's figure 2.

A network is a list of blocks: unpool? -> convolution -> batch norm -> ReLU? -> pool? -> dropout?, then a classifier.
Whoever needs to know the network (the model, a profiler, an export) reads that list.

The paper sets the pooling indices against decoders that do without (section 3.1, table 1). `decoder` picks one:
"indices", the paper's own; "bilinear", fixed interpolation; "deconv", a learned transposed convolution (as FCN's).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike

from segnet_scratch.errors import CheckpointError, ConfigError, DTypeError, ShapeError, TrainingError
from segnet_scratch.nn.autograd import Tensor, tensor
from segnet_scratch.nn.functions import fit, max_pool, max_unpool, resize_bilinear
from segnet_scratch.nn.modules import BatchNorm2d, Conv2d, ConvUnit, Dropout, Factory, Module, Upsample2d
from segnet_scratch.ops.elementwise.dropout import STATE
from segnet_scratch.ops.normalisation.batch_norm import EPS
from segnet_scratch.ops.pooling.windows import PoolCodes
from segnet_scratch.parallel import Communicator
from segnet_scratch.runtime.devices import Device, get_device
from segnet_scratch.runtime.observe import scope

DROPOUT = 0.5  # Bayesian SegNet, arXiv 1511.02680
DECODERS = ("indices", "bilinear", "deconv")
# What becomes of the last row or column of an odd map: a window of its own, as in the authors' Caffe, or nothing, as in
# PyTorch's MaxPool2d(2, 2).
POOLINGS = ("ceil", "floor")


@dataclass(frozen=True)
class Block:
    """One convolution of the network and what stands round it."""

    stage: int
    index: int  # position in its stage, in order of execution, from 1
    decoder: bool
    in_channels: int
    out_channels: int
    kernel: int = 3
    unpool: str | None = None  # before the convolution: the size that a pool had comes back, by one of DECODERS
    relu: bool = True
    pool: bool = False
    dropout: bool = False  # after everything else

    @property
    def name(self) -> str:
        """The prefix of its parameters: `encoder.1.2`."""
        return f"{'decoder' if self.decoder else 'encoder'}.{self.stage}.{self.index}"


# Output channels of the convolutions of each stage: VGG16 (arXiv 1409.1556, configuration D).
VGG16_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def segnet_blocks(width: float, dropout: bool = False, decoder: str = "indices") -> list[Block]:
    """SegNet: the 13 convolutions of VGG16, and a decoder of 12 that mirrors them, before a 3x3 classifier.

    Decoder stage s undoes encoder stage s: it unpools first and ends with the channels of stage s - 1. `dropout`
    follows the three deepest stages of encoder and decoder, where the authors' Bayesian SegNet has it.
    """
    encoder = [[max(1, round(channels * width)) for channels in stage] for stage in VGG16_STAGES]
    # Mirrored: as many convolutions as the encoder stage, the last one down to the channels of the stage below.
    # In stage 1 that last one is the classifier.
    below = [[], *([stage[-1]] for stage in encoder)]
    return _mirrored(encoder, [stage[1:] + last for stage, last in zip(encoder, below, strict=False)], dropout, decoder)


def segnet_basic_blocks(width: float, dropout: bool = False, decoder: str = "indices") -> list[Block]:
    """SegNet-Basic: four encoders, four decoders, 7x7, 64 channels throughout, no ReLU in the decoder (section 3.2)."""
    stages = [[max(1, round(64 * width))]] * 4
    return _mirrored(stages, stages, dropout, decoder, kernel=7, relu=False)


def _mirrored(
    encoder: list[list[int]], decoder: list[list[int]], dropout: bool, unpool: str, kernel: int = 3, relu: bool = True
) -> list[Block]:
    """The blocks of both halves, given by the output channels of each stage; `relu` is that of the decoder."""
    halves = [(s, False, outputs) for s, outputs in enumerate(encoder, start=1)]
    halves += [(s, True, outputs) for s, outputs in reversed([*enumerate(decoder, start=1)])]
    blocks, channels = [], 3
    for s, up, outputs in halves:
        for i, out in enumerate(outputs, start=1):
            first, last = i == 1, i == len(outputs)
            shape = s, i, up, channels, out, kernel, unpool if up and first else None, relu or not up
            blocks.append(Block(*shape, pool=last and not up, dropout=dropout and last and s >= 3))
            channels = out
    return blocks


class SegNet(Module):
    """SegNet for images (n, h, w, 3), RGB normalised with ImageNet's mean and standard deviation, any size from 32x32.

    `width` scales the channels of every convolution; `dropout` makes it Bayesian SegNet; `decoder` is one of DECODERS;
    `pooling` is one of POOLINGS; `seed` is that of the He initialisation, the same weights for every decoder; `rung`
    picks the convolution kernels by name (host and cuda).
    """

    architecture = "segnet"
    classifier_kernel = 3
    blocks_of = staticmethod(segnet_blocks)  # of a width, without building the network

    def __init__(
        self,
        classes: int = 21,
        width: float = 1.0,
        device: "str | Device" = "auto",
        *,
        dropout: bool = False,
        decoder: str = "indices",
        pooling: str = "ceil",
        seed: int = 0,
        dtype: DTypeLike = np.float32,
        rung: str | None = None,
    ) -> None:
        name = type(self).__name__
        if not 1 <= classes <= 255:
            raise ShapeError(f"{name}: {classes} classes; expected 1 to 255 (255 is the void label)")
        if not width > 0:
            raise ShapeError(f"{name}: width {width}; expected a positive factor, 1.0 for the paper's")
        for what, given, known in (("decoder", decoder, DECODERS), ("pooling", pooling, POOLINGS)):
            if given not in known:
                raise ConfigError(f"{name}: {what} {given!r}; expected one of {', '.join(known)}")
        self.classes, self.width, self.has_dropout = classes, width, dropout
        self.decoder_kind, self.pooling = decoder, pooling
        self.device, self.dtype = get_device(device), np.dtype(dtype)
        self.blocks = self.blocks_of(width, dropout, decoder)
        factory = Factory(self.device, np.random.default_rng(seed), self.dtype, rung)
        self.metadata: dict[str, Any] = {}  # of the checkpoint that it was loaded from
        self.folded = False  # is batch norm a part of the convolutions?
        self.encoder: dict[int, dict[int, ConvUnit]] = {}
        self.decoder: dict[int, dict[int | str, Module]] = {}
        for block in self.blocks:
            half: dict[int, dict[Any, Any]] = self.decoder if block.decoder else self.encoder
            if block.unpool == "deconv":
                self.decoder[block.stage] = {"up": Upsample2d(block.in_channels, factory)}
            unit = ConvUnit(block.in_channels, block.out_channels, block.kernel, block.relu, factory)
            half.setdefault(block.stage, {})[block.index] = unit
        self.classifier = Conv2d(self.blocks[-1].out_channels, classes, self.classifier_kernel, True, factory)
        self.random_state = self.device.zeros(STATE.shape, STATE.dtype)
        dropped = [(layer, block.name) for layer, block in enumerate(self.blocks) if block.dropout]
        self.dropouts = {name: Dropout(DROPOUT, layer, self.random_state) for layer, name in dropped}

    def forward(
        self, images: "np.ndarray | Tensor", watch: Callable[[str, Tensor], None] = lambda layer, output: None
    ) -> Tensor:
        """Logits (n, h, w, classes) of images (n, h, w, 3).

        `watch` is shown the output of each layer, under the layer's name.
        """
        x = self._input(images)
        sizes: list[tuple[int, int]] = []
        codes: list[PoolCodes] = []
        for block in self.blocks:
            with scope(block.name):
                if block.unpool:
                    size = sizes.pop()
                    if block.unpool == "indices":
                        x = max_unpool(x, codes.pop())
                    elif block.unpool == "bilinear":
                        x = resize_bilinear(x, size)
                    else:
                        x = self.decoder[block.stage]["up"](x, self._pooled(*size))
                    x = fit(x, size)
                x = (self.decoder if block.decoder else self.encoder)[block.stage][block.index](x)
                if block.pool:
                    sizes.append((x.shape[1], x.shape[2]))
                    x, code = max_pool(fit(x, self._pooled(*sizes[-1])))
                    if self.decoder_kind == "indices":  # the others do not hold on to the codes
                        codes.append(code)
                if block.dropout:
                    x = self.dropouts[block.name](x)
            watch(block.name, x)
        with scope("classifier"):
            x = self.classifier(x)
        watch("classifier", x)
        return x

    def _pooled(self, h: int, w: int) -> tuple[int, int]:
        """What a pool reads of a map of this size."""
        if self.pooling == "ceil":
            return h, w
        if min(h, w) < 2:
            name = type(self).__name__
            raise ShapeError(f"{name}: pooling 'floor' leaves nothing of a map of {h}x{w}; give larger images")
        return h - h % 2, w - w % 2

    def _input(self, images: "np.ndarray | Tensor") -> Tensor:
        name = type(self).__name__
        if images.dtype != self.dtype:
            fix = "RGB scaled to [0, 1] and normalised; see segnet_scratch.data.normalise"
            raise DTypeError(f"{name}: images are {images.dtype}, expected {self.dtype}: {fix}")
        if len(images.shape) != 4 or images.shape[3] != 3:
            hint = "; move the channels last" if len(images.shape) == 4 and images.shape[1] == 3 else ""
            raise ShapeError(f"{name}: images have shape {tuple(images.shape)}, expected (n, h, w, 3){hint}")
        return images if isinstance(images, Tensor) else tensor(images, self.device)

    def fold_batch_norm(self) -> Self:
        """Makes batch norm a part of the convolutions, for faster inference; evaluation mode from here on.

        The logits stay what they were in evaluation mode, to rounding. The network can no longer be trained or saved.
        """
        self.eval()
        for unit in self.named_modules(ConvUnit).values():
            unit.fold_batch_norm()
        self.folded = True
        return self

    def train(self, training: bool = True) -> Self:
        """Training mode: batch statistics, dropout on. Returns self. TrainingError once batch norm is folded."""
        if training and self.folded:
            fix = "which leaves nothing to train; load the checkpoint without fold=True"
            raise TrainingError(f"{type(self).__name__}: batch norm is folded into the convolutions, {fix}")
        return super().train(training)

    def synchronise_batch_norm(self, ranks: Communicator) -> None:
        """From now on batch norm in training is over the batches of all these ranks together."""
        for norm in self.named_modules(BatchNorm2d).values():
            norm.ranks = ranks

    def set_random_state(self, seed: int, step: int) -> None:
        """What the dropout masks are made from; a trainer sets the step before each forward pass."""
        self.device.write(self.random_state, np.array([seed % 2**64, step], STATE.dtype))

    def describe(self) -> dict[str, Any]:
        """What `build` needs to make this network again; kept in checkpoints."""
        size = {"architecture": self.architecture, "classes": self.classes, "width": self.width}
        return size | {"dropout": self.has_dropout, "decoder": self.decoder_kind, "pooling": self.pooling}

    def state_dict(self) -> dict[str, np.ndarray]:
        """All parameters and running statistics as float32, weights OIHW, under the names of checkpoints.

        CheckpointError once batch norm is folded: a checkpoint could not be trained on or folded again.
        """
        self._expect_batch_norm("state_dict()")
        return {name: to_file_layout(self.device.download(array)) for name, array in self._arrays().items()}

    def _arrays(self) -> dict[str, Any]:
        """All parameters and running statistics on the device, under the names of checkpoints."""
        return {name: held.data for name, held in (self.named_parameters() | self.named_buffers()).items()}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Overwrites all parameters and running statistics; nothing is changed unless names and shapes all fit."""
        self._expect_batch_norm("load_state_dict()")
        targets = self._arrays()
        missing, unknown = targets.keys() - state.keys(), state.keys() - targets.keys()
        if missing or unknown:
            wrong = f"{_some('missing', missing)}; {_some('not known', unknown)}"
            counts = f"expected {len(targets)} arrays, got {len(state)}"
            raise CheckpointError(f"the weights are not those of this {type(self).__name__}: {wrong}; {counts}")
        values = {name: from_file_layout(np.asarray(state[name])) for name in targets}
        for name, target in targets.items():
            if values[name].shape != tuple(target.shape):
                got, expected = np.shape(state[name]), to_file_layout(np.empty(target.shape, np.bool_)).shape
                fix = f"was the model built with width {self.width}?"
                if name.startswith("classifier") and got and got[0] != self.classes:
                    fix = f"the weights are for {got[0]} classes, this model has {self.classes}; "
                    fix += f"build it with classes={got[0]}, or use the data set it was trained on"
                raise CheckpointError(f"{name} has shape {got}, expected {expected}; {fix}")
        for name, target in targets.items():
            self.device.write(target, values[name].astype(self.dtype))

    def _expect_batch_norm(self, what: str) -> None:
        if self.folded:
            raise CheckpointError(f"{what}: batch norm is folded into this network; load it without fold=True")

    def load_vgg16(self, weights: Mapping[str, np.ndarray]) -> None:
        """Takes the 13 convolutions of VGG16 under torchvision's names, `features.0.weight` (OIHW) and so on.

        These convolutions have no bias: batch norm would take it out again. It goes into the running mean, and the
        running variance is 1 - eps, so that in evaluation mode the encoder computes what VGG16 does. VGG16-BN is taken
        with its batch norms. CheckpointError, and nothing is changed, unless all of it fits.
        """
        self._expect_batch_norm("load_vgg16()")
        if self.architecture != "segnet":
            raise CheckpointError("VGG16 weights fit model = segnet only; SegNet-Basic has 7x7 convolutions of its own")
        norm = ("weight", "bias", "running_mean", "running_var") if "features.1.running_mean" in weights else ()
        # Modules of `features`: convolution, ReLU, a pool after each stage; with batch norm three to a convolution.
        encoder = [block for block in self.blocks if not block.decoder]
        places = [(3 if norm else 2) * i + block.stage - 1 for i, block in enumerate(encoder)]
        expected: dict[str, tuple[Block, tuple[int, ...]]] = {}
        for block, i in zip(encoder, places, strict=True):
            shape = block.out_channels, block.in_channels, block.kernel, block.kernel
            vectors = [f"features.{i}.bias", *(f"features.{i + 1}.{part}" for part in norm)]
            expected |= {f"features.{i}.weight": (block, shape)} | dict.fromkeys(vectors, (block, shape[:1]))
        if missing := expected.keys() - weights.keys():
            raise CheckpointError(
                f"these are not VGG16{'-BN' if norm else ''}'s convolutions: {_some('missing', missing)}; expected "
                "torchvision's names, features.0.weight and so on"
            )
        for name, (block, takes) in expected.items():
            if weights[name].shape != takes:
                fits = f"{block.name} of width {self.width} takes {takes}; VGG16 weights need width = 1.0"
                raise CheckpointError(f"{name} is {weights[name].shape}, {fits}")
        targets = self._arrays()
        for block, i in zip(encoder, places, strict=True):
            weight, bias = weights[f"features.{i}.weight"], weights[f"features.{i}.bias"]
            found = [weights[f"features.{i + 1}.{part}"] for part in norm]
            gamma, beta, mean, var = found or (np.ones_like(bias), np.zeros_like(bias), 0, np.full_like(bias, 1 - EPS))
            values = {"conv.weight": from_file_layout(weight), "bn.weight": gamma, "bn.bias": beta}
            values |= {"bn.running_mean": mean - bias, "bn.running_var": var}
            for name, array in values.items():
                self.device.write(targets[f"{block.name}.{name}"], array.astype(self.dtype))


class SegNetBasic(SegNet):
    """SegNet-Basic: 4 + 4 convolutions of 7x7 and a 1x1 classifier; 64 channels, no ReLU in the decoder."""

    architecture = "segnet-basic"
    classifier_kernel = 1
    blocks_of = staticmethod(segnet_basic_blocks)


ARCHITECTURES: dict[str, type[SegNet]] = {cls.architecture: cls for cls in (SegNet, SegNetBasic)}


def build(
    description: Mapping[str, Any], device: "str | Device" = "auto", seed: int = 0, rung: str | None = None
) -> SegNet:
    """The network that `describe` described, with fresh weights. CheckpointError where it cannot be understood."""
    told = {"decoder": "indices", "pooling": "ceil", **description}  # the first files have neither
    try:
        options = {name: told[name] for name in ("classes", "width", "dropout", "decoder", "pooling")}
        return ARCHITECTURES[told["architecture"]](device=device, **options, seed=seed, rung=rung)
    except (KeyError, ShapeError, ConfigError) as error:
        raise CheckpointError(
            f"the description of the network {told} lacks or does not know {error}; expected architecture "
            f"({' or '.join(ARCHITECTURES)}), classes, width, dropout, decoder ({' or '.join(DECODERS)}) "
            f"and pooling ({' or '.join(POOLINGS)})"
        ) from error


def to_file_layout(array: np.ndarray) -> np.ndarray:
    """float32, and OIHW where it is a convolution's weight (OHWI in memory); IOHW where it is a transposed one's."""
    if array.ndim == 4:
        array = array.transpose(0, 3, 1, 2)
    return np.array(array, dtype=np.float32, order="C", copy=True)


def from_file_layout(array: np.ndarray) -> np.ndarray:
    """OHWI where it is a convolution's weight (OIHW in files); IHWO where it is a transposed one's."""
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1)) if array.ndim == 4 else np.asarray(array)


def _some(what: str, names: set[str]) -> str:
    """`missing: 3 (a, b, ...)` for messages."""
    shown = sorted(names)[:3]
    return f"{what}: {len(names)}" + (f" ({', '.join(shown)}{', ...' if len(names) > 3 else ''})" if names else "")
