"""Modules: objects that hold parameters and buffers and apply ops to tensors."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from math import sqrt
from typing import Any, Self, TypeVar

import numpy as np

from segnet_scratch.nn.autograd import Tensor
from segnet_scratch.nn.functions import batch_norm, conv2d, conv_transpose2d, dropout, relu
from segnet_scratch.ops.convolution.conv_transpose2d import bilinear_weight
from segnet_scratch.ops.normalisation.batch_norm import EPS, MOMENTUM
from segnet_scratch.parallel import ALONE
from segnet_scratch.runtime.devices import Array, Device
from segnet_scratch.runtime.observe import within

Kind = TypeVar("Kind", bound="Module")


class Buffer:
    """An array that belongs to a module but is not trained: a running mean."""

    def __init__(self, data: Array) -> None:
        self.data = data


class Module:
    """Base of everything with parameters. Attributes that are Tensors, Buffers, Modules, or dicts of Modules count."""

    training = True

    def _members(self, kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
        for name, value in vars(self).items():
            yield from _walk(kind, f"{prefix}{name}", value)

    def named_parameters(self) -> dict[str, Tensor]:
        """Every parameter by its dotted name, in order of definition."""
        return dict(self._members(Tensor))

    def parameters(self) -> list[Tensor]:
        """Every parameter."""
        return list(self.named_parameters().values())

    def named_buffers(self) -> dict[str, Buffer]:
        """Every buffer by its dotted name."""
        return dict(self._members(Buffer))

    def named_modules(self, kind: type[Kind]) -> dict[str, Kind]:
        """Every module of this class inside this one by its dotted name, in order of definition."""
        return dict(self._members(kind))

    def train(self, training: bool = True) -> Self:
        """Training mode: batch statistics, dropout on. Returns self."""
        self.training = training
        for _, module in self._members(Module):
            module.training = training
        return self

    def eval(self) -> Self:
        """Evaluation mode: running statistics, dropout off. Returns self."""
        return self.train(False)

    def zero_grad(self) -> None:
        """Forgets every gradient."""
        for parameter in self.parameters():
            parameter.grad = None

    def __call__(self, *arguments: Any) -> Any:
        return self.forward(*arguments)

    def forward(self, *arguments: Any) -> Any:
        """Applies the module."""
        raise NotImplementedError


def _walk(kind: type, name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, kind):
        yield name, value
    if isinstance(value, Module):
        yield from value._members(kind, f"{name}.")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _walk(kind, f"{name}.{key}", item)


@dataclass(frozen=True)
class Factory:
    """Makes the parameters of a network's modules, on one device; `rung` picks their convolution kernels by name."""

    device: Device
    rng: np.random.Generator
    dtype: np.dtype
    rung: str | None = None

    def parameter(self, values: np.ndarray) -> Tensor:
        """A parameter with these initial values."""
        return Tensor(self.array(values), self.device, requires_grad=True)

    def array(self, values: np.ndarray) -> Array:
        """An array on the device."""
        return self.device.upload(values.astype(self.dtype))

    def he_normal(self, shape: tuple[int, ...]) -> np.ndarray:
        """Normal numbers of variance 2 / fan-in for a weight (o, kh, kw, c) (He et al., arXiv 1502.01852, eq. 10)."""
        return self.rng.standard_normal(shape) * sqrt(2 / int(np.prod(shape[1:])))


class Conv2d(Module):
    """Convolution of stride 1 that keeps the image size: odd kernel k, padding k // 2. Weight (out, k, k, in)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, bias: bool, factory: Factory) -> None:
        self.weight = factory.parameter(factory.he_normal((out_channels, kernel, kernel, in_channels)))
        if bias:
            self.bias = factory.parameter(np.zeros(out_channels))
        self.padding = kernel // 2
        self.rung = factory.rung

    def forward(self, x: Tensor) -> Tensor:
        """(n, h, w, in) to (n, h, w, out)."""
        return conv2d(x, self.weight, getattr(self, "bias", None), stride=1, padding=self.padding, rung=self.rung)


class Upsample2d(Module):
    """Learned upsampling by 2: a transposed convolution of kernel 4 that starts as bilinear. Weight (in, 4, 4, out)."""

    def __init__(self, channels: int, factory: Factory) -> None:
        self.weight = factory.parameter(bilinear_weight(channels))
        self.rung = factory.rung

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """(n, ceil(h/2), ceil(w/2), channels) to (n, h, w, channels), `size` = (h, w)."""
        return conv_transpose2d(x, self.weight, size, self.rung)


class BatchNorm2d(Module):
    """Batch normalisation of every channel over batch and image."""

    def __init__(self, channels: int, factory: Factory) -> None:
        zeros, ones = np.zeros(channels), np.ones(channels)
        self.weight, self.bias = factory.parameter(ones), factory.parameter(zeros)
        self.running_mean, self.running_var = Buffer(factory.array(zeros)), Buffer(factory.array(ones))
        self.momentum = MOMENTUM  # share of a batch in the running statistics
        self.ranks = ALONE  # over whose batches the statistics of training are taken

    def forward(self, x: Tensor) -> Tensor:
        """(n, h, w, c) to the same shape."""
        running = self.running_mean.data, self.running_var.data
        return batch_norm(x, self.weight, self.bias, *running, self.training, self.momentum, ranks=self.ranks)


# Of each thread its own: several may sample from one network, each with random numbers of its own.
_sampling: ContextVar[Array | None] = ContextVar("sampling", default=None)


def dropout_sampling(state: Array) -> AbstractContextManager[None]:
    """Within it dropout drops in evaluation mode, too, in this thread; `state` (seed, step) says what."""
    return within(_sampling, state)


class Dropout(Module):
    """Drops elements with probability p in training. `state` (seed, step) is shared by all layers of a model."""

    def __init__(self, p: float, layer: int, state: Array) -> None:
        self.p, self.layer, self.state = p, layer, state

    def forward(self, x: Tensor) -> Tensor:
        """Any shape (n, ...) to the same."""
        sampling = _sampling.get()
        if sampling is None and not self.training:
            return x
        return dropout(x, self.p, self.layer, self.state if sampling is None else sampling)


class ConvUnit(Module):
    """Convolution without bias, batch norm unless it is folded into the former, and ReLU where the network has one."""

    bn: BatchNorm2d | None

    def __init__(self, in_channels: int, out_channels: int, kernel: int, activate: bool, factory: Factory) -> None:
        self.conv = Conv2d(in_channels, out_channels, kernel, False, factory)
        self.bn = BatchNorm2d(out_channels, factory)
        self.activate = activate

    def forward(self, x: Tensor) -> Tensor:
        """(n, h, w, in) to (n, h, w, out)."""
        x = self.conv(x)
        if self.bn is not None:
            x = self.bn(x)
        return relu(x) if self.activate else x

    def folded(self) -> tuple[np.ndarray, np.ndarray]:
        """The weight (o, k, k, c) and bias (o) of one convolution that does what this one and batch norm do.

        weight (conv(x) - mean) / sqrt(var + eps) + bias, with running statistics, is a convolution with the weight of
        each output channel times weight / sqrt(var + eps), plus bias - mean weight / sqrt(var + eps). In double.
        """
        if self.bn is None:
            return self.conv.weight.numpy(), self.conv.bias.numpy()
        device = self.conv.weight.device
        arrays = (self.bn.weight.data, self.bn.bias.data, self.bn.running_mean.data, self.bn.running_var.data)
        weight, bias, mean, var = (device.download(array).astype(np.float64) for array in arrays)
        factor = weight / np.sqrt(var + EPS)
        return self.conv.weight.numpy() * factor[:, None, None, None], bias - mean * factor

    def fold_batch_norm(self) -> None:
        """Makes this that one convolution, in its own element type; for inference alone."""
        if self.bn is None:
            return
        device, dtype = self.conv.weight.device, self.conv.weight.dtype
        weight, bias = (Tensor(device.upload(array.astype(dtype)), device) for array in self.folded())
        self.conv.weight, self.conv.bias = weight, bias
        self.bn = None
