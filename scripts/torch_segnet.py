"""SegNet and SegNet-Basic in plain PyTorch: the oracle of the parity tests and the peer of the benchmarks.

Written from the paper (arXiv 1511.00561), not from `segnet_scratch`: an error in our list of blocks must show here.
The modules are named so that `load_state_dict` takes the arrays of our checkpoints.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

VOID = 255
VGG16_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def conv_unit(in_channels: int, out_channels: int, kernel: int, relu: bool) -> nn.Sequential:
    """Convolution, batch norm, and ReLU where wanted: (n, in, h, w) to (n, out, h, w)."""
    unit = nn.Sequential()
    unit.add_module("conv", nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False))
    unit.add_module("bn", nn.BatchNorm2d(out_channels))
    if relu:
        unit.add_module("relu", nn.ReLU(inplace=True))
    return unit


def conv_stage(channels: list[int], kernel: int = 3, relu: bool = True) -> nn.Sequential:
    """One unit from each number of channels to the next, named 1, 2, ..."""
    stage = nn.Sequential()
    for i in range(1, len(channels)):
        stage.add_module(str(i), conv_unit(channels[i - 1], channels[i], kernel, relu))
    return stage


class TorchSegNet(nn.Module):
    """SegNet: VGG16's convolutions, each stage pooled, and a decoder that mirrors them. Images are (n, 3, h, w).

    `decoder` is "indices", or what the paper compares them with: "bilinear", or "deconv" (kernel 4, cropped to size).
    """

    def __init__(self, classes: int = 21, width: float = 1.0, decoder: str = "indices") -> None:
        super().__init__()
        stages = [[max(1, round(width * channels)) for channels in stage] for stage in VGG16_STAGES]
        fed = [[3], *stages]  # fed[s][-1]: the channels that stage s + 1 gets
        self.encoder = nn.ModuleDict({str(s): conv_stage([fed[s - 1][-1], *stages[s - 1]]) for s in range(1, 6)})
        self.decoder = nn.ModuleDict({str(s): conv_stage([*stages[s - 1], fed[s - 1][-1]]) for s in range(5, 1, -1)})
        self.decoder["1"] = conv_stage(stages[0])  # its second convolution is the classifier
        self.classifier = nn.Conv2d(stages[0][-1], classes, 3, padding=1)
        self._add_windows(decoder, {s: stage[-1] for s, stage in enumerate(stages, 1)})

    def _add_windows(self, decoder: str, channels: Mapping[int, int]) -> None:
        self.kind = decoder
        self.pool = nn.MaxPool2d(2, ceil_mode=True, return_indices=True)
        self.unpool = nn.MaxUnpool2d(2)
        if decoder == "deconv":
            for s, stage in self.decoder.items():
                wide = channels[int(s)]
                stage.add_module("up", nn.ConvTranspose2d(wide, wide, 4, stride=2, padding=1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, classes, h, w)."""
        pooled = []
        for stage in self.encoder.values():
            x = stage(x)
            size = x.shape
            x, indices = self.pool(x)
            pooled.append((indices, size))
        for stage in self.decoder.values():
            x = self._enlarge(stage, x, *pooled.pop())
            for name, unit in stage.named_children():
                x = x if name == "up" else unit(x)
        return self.classifier(x)

    def _enlarge(self, stage: nn.Module, x: Tensor, indices: Tensor, size: torch.Size) -> Tensor:
        if self.kind == "indices":
            return self.unpool(x, indices, output_size=size)
        if self.kind == "bilinear":
            return nn.functional.interpolate(x, size=size[2:], mode="bilinear", align_corners=False)
        return stage.get_submodule("up")(x)[:, :, : size[2], : size[3]]

    def load_numpy(self, state: Mapping[str, np.ndarray]) -> None:
        """Takes the arrays of `segnet_scratch`'s `state_dict()`; every name and shape must fit."""
        tensors = {name: torch.from_numpy(np.array(array)) for name, array in state.items()}
        # PyTorch also counts batches, which matters only where momentum is None.
        counters = {name: n for name, n in self.state_dict().items() if name.endswith("num_batches_tracked")}
        self.load_state_dict({**tensors, **counters})


class TorchSegNetBasic(TorchSegNet):
    """SegNet-Basic: four encoders and four decoders of 7x7, no ReLU in the decoders, a 1x1 classifier."""

    def __init__(self, classes: int = 21, width: float = 1.0, decoder: str = "indices") -> None:
        nn.Module.__init__(self)
        wide = max(1, round(width * 64))
        self.encoder = nn.ModuleDict({str(s): conv_stage([3 if s == 1 else wide, wide], 7) for s in range(1, 5)})
        self.decoder = nn.ModuleDict({str(s): conv_stage([wide, wide], 7, relu=False) for s in range(4, 0, -1)})
        self.classifier = nn.Conv2d(wide, classes, 1)
        self._add_windows(decoder, dict.fromkeys(range(1, 5), wide))


def parameter_groups(
    model: nn.Module, decay: float, bias_lr: float = 1.0, encoder_lr: float = 1.0
) -> list[dict[str, Any]]:
    """For torch.optim.SGD: weights of convolutions decay, biases and batch norms do not, as in `segnet_scratch`.

    "factor" is what a group's learning rate is to be multiplied by.
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        weight = parameter.ndim == 4
        factor = (1.0 if weight else bias_lr) * (encoder_lr if name.startswith("encoder.") else 1.0)
        groups.setdefault((weight, factor), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay * weight, "factor": factor}
        for (weight, factor), parameters in groups.items()
    ]


def mean_over_valid(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the pixels that are not void."""
    return nn.functional.cross_entropy(logits, labels, ignore_index=VOID)


def loss_of(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    objective: Callable[[Tensor, Tensor], Tensor] = mean_over_valid,
) -> tuple[Tensor, Tensor]:
    """The first half of a training step: logits (n, classes, h, w), and the loss, whose `backward` is the second."""
    logits = model(images)
    return logits, objective(logits, labels)


def gradients_of(model: nn.Module) -> dict[str, np.ndarray]:
    """By the names of our checkpoints, in OIHW; float32, of a float64 model float64."""
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.cpu().numpy()
    return found
