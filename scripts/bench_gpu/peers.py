"""PyTorch's contenders: every memory format and way to run that could be its best."""

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch_segnet import TorchSegNet, parameter_groups

from bench_gpu.cases import Case
from bench_gpu.common import CLASSES, DECAY, LR, MOMENTUM, VOID, Arrays

WAYS = ("eager", "graph", "compile", "max-autotune")
FORMATS = ("channels_last", "contiguous_format")


def set_precision(precision: str) -> None:
    """cuDNN's search on, TF32 as the precision has it; nothing is left to defaults."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"


def autocast(precision: str, device: str) -> AbstractContextManager[object]:
    """bfloat16 by automatic mixed precision."""
    return torch.autocast(device, torch.bfloat16) if precision == "bf16" else nullcontext()


class Peer:
    """PyTorch in one memory format and one way; `folded`: batch norm folded into the convolutions, for inference."""

    def __init__(
        self,
        case: Case,
        state: Mapping[str, np.ndarray],
        memory_format: str = "channels_last",
        way: str = "eager",
        folded: bool = False,
        device: str = "cuda",
        width: float = 1.0,
    ) -> None:
        self.case, self.way, self.device = case, way, device
        self.format = getattr(torch, memory_format)
        model = TorchSegNet(CLASSES, width)
        model.load_numpy(state)
        if folded:
            _fold(model.eval())
        self.model: nn.Module = model.to(device, memory_format=self.format).train(case.task == "training")
        self.images = torch.zeros((case.batch, 3, *case.size), device=device).to(memory_format=self.format)
        self.labels = torch.zeros((case.batch, *case.size), dtype=torch.long, device=device)
        if case.task == "training":
            groups = parameter_groups(model, DECAY)
            self.optimiser = torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM, fused=True)
        self.forward: Callable[[Tensor], Tensor] = self.model
        if way in ("compile", "max-autotune"):
            self.forward = torch.compile(self.model, mode="default" if way == "compile" else way)
        set_precision(case.precision)
        self._run: Callable[[], object] = self._capture() if way == "graph" else self._step

    def _forward_backward(self) -> Tensor:
        self.optimiser.zero_grad(set_to_none=True)
        with autocast(self.case.precision, self.device):
            logits = self.forward(self.images)
            loss = cross_entropy(logits, self.labels, ignore_index=VOID)
        loss.backward()
        return logits

    def _step(self) -> None:
        if self.case.task == "training":
            self._forward_backward()
            self.optimiser.step()
            return
        with torch.inference_mode(), autocast(self.case.precision, self.device):
            self.forward(self.images)

    def _capture(self) -> Callable[[], object]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        return graph.replay

    def call(self, images: Tensor, labels: Tensor | None) -> None:
        """A training step, or inference where there are no labels. Images are in this contender's format already."""
        self.images.copy_(images)
        if labels is not None:
            self.labels.copy_(labels)
        self._run()

    def training_pass(self, images: Tensor, labels: Tensor) -> Arrays:
        """Logits (n, h, w, classes) and gradients, as the correctness gate compares them."""
        self.images.copy_(images)
        self.labels.copy_(labels)
        logits = self._forward_backward().detach().float().cpu().numpy().transpose(0, 2, 3, 1)
        return {"logits": logits, **{name: p.grad.float().cpu().numpy() for name, p in self.model.named_parameters()}}


def _fold(model: nn.Module) -> None:
    """Makes batch norm a part of the convolution before it, as ours does."""
    for unit in model.modules():
        if isinstance(unit, nn.Sequential) and hasattr(unit, "bn"):
            unit.conv = torch.nn.utils.fusion.fuse_conv_bn_eval(unit.conv, unit.bn)
            unit.bn = nn.Identity()


def peers_of(case: Case, thorough: bool) -> dict[str, Callable[[Mapping[str, np.ndarray]], Peer]]:
    """Makers by name. `thorough`: every way in every memory format; else the two of which one was the best so far."""
    ways = [("channels_last", "graph"), ("channels_last", "compile")]
    if thorough:
        ways = [(memory_format, way) for memory_format in FORMATS for way in WAYS]
    made: dict[str, Callable[[Mapping[str, np.ndarray]], Peer]] = {}
    for folded in ((True, False) if thorough else (True,)) if case.task == "inference" else (False,):
        for memory_format, way in ways:
            name = f"PyTorch, {memory_format.removesuffix('_format')}, {way}{', folded' if folded else ''}"
            made[name] = functools.partial(Peer, case, memory_format=memory_format, way=way, folded=folded)
    return made
