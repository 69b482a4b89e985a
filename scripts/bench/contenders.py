"""Every contender of a case: ours, by the fused engine and by the layers, and PyTorch in every way that could be its
best. Both sides get the same batches, in memory that they share on a GPU."""

import functools
import gc
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch_segnet import TorchSegNet, gradients_of, loss_of, parameter_groups

from bench.cases import CLASSES, DECAY, LR, MOMENTUM, Arrays, Case, initial_state
from bench.run import INPUTS, Maker
from segnet_scratch.config import Config
from segnet_scratch.inference_step import InferenceStep
from segnet_scratch.runtime.devices import Array, Device
from segnet_scratch.segnet import SegNet, to_file_layout
from segnet_scratch.step import TrainingStep

State = Mapping[str, np.ndarray]
Meter = Callable[[bool], int]  # bytes that are taken; told whether it is asked for the first time
# Compiled kernels that are launched one by one may wait for Python, on slow cores: hence a graph of them, too.
WAYS = ("eager", "graph", "compile", "compile graph", "max-autotune")
FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


class Ours:
    """One engine. The layers know no bfloat16."""

    def __init__(self, engine: str, case: Case, device: Device, state: State) -> None:
        if engine == "layers" and case.precision == "bf16":
            raise ValueError("the layers compute in float32 or tf32")
        self.device = device
        self.model = SegNet(CLASSES, case.width, device, rung="tf32" if case.precision == "tf32" else None)
        self.model.load_state_dict(state)
        if case.task == "training":
            self._step = TrainingStep(self.model, engine, case.precision, Config(momentum=MOMENTUM, decay=DECAY))
        else:
            self._infer = InferenceStep(self.model, engine, case.precision)

    def call(self, images: Array, labels: Array | None) -> None:
        """A training step, or inference where there are no labels."""
        if labels is None:
            self._infer(images)
        else:
            self._step(images, labels, LR)

    def training_pass(self, images: np.ndarray, labels: np.ndarray) -> Arrays:
        """Logits and gradients, as the correctness gate compares them."""
        logits = self._step.gradients(images, labels)
        download = self.device.download
        gradients = {name: to_file_layout(download(p.grad)) for name, p in self.model.named_parameters().items()}
        return {"logits": download(logits)[..., :CLASSES].astype(np.float32), **gradients}


OURS = {"ours, fused": functools.partial(Ours, "fused"), "ours, layers": functools.partial(Ours, "layers")}


def set_precision(precision: str) -> None:
    """cuDNN's search on, TF32 as the precision has it; nothing is left to defaults."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"


class Peer:
    """PyTorch in one memory format and one way; `folded`: batch norm folded into the convolutions, for inference."""

    def __init__(
        self,
        case: Case,
        state: State,
        memory_format: str = "channels_last",
        way: str = "eager",
        folded: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.case, self.device = case, "cuda" if case.on_gpu else "cpu"
        self.form: dict[str, Any] = {"dtype": dtype, "memory_format": FORMATS[memory_format]}
        model = TorchSegNet(CLASSES, case.width)
        model.load_numpy(state)
        if folded:
            _fold(model.eval())
        self.model: nn.Module = model.to(self.device, **self.form).train(case.task == "training")
        self.images = torch.zeros((case.batch, 3, *case.size), device=self.device).to(**self.form)
        self.labels = torch.zeros((case.batch, *case.size), dtype=torch.long, device=self.device)
        if case.task == "training":
            groups = parameter_groups(model, DECAY)
            self.optimiser = torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM, fused=True)
        self.forward: Callable[[Tensor], Tensor] = self.model
        if way not in ("eager", "graph"):
            self.forward = torch.compile(self.model, mode=way if way == "max-autotune" else "default")
        set_precision(case.precision)
        self._autocast = torch.autocast(self.device, torch.bfloat16, enabled=case.precision == "bf16")
        self._run: Callable[[], object] = captured(self._step) if way in ("graph", "compile graph") else self._step

    def _forward_backward(self) -> Tensor:
        self.optimiser.zero_grad(set_to_none=True)
        with self._autocast:
            logits, loss = loss_of(self.forward, self.images, self.labels)
        loss.backward()
        return logits

    def _step(self) -> None:
        if self.case.task == "training":
            self._forward_backward()
            self.optimiser.step()
            return
        with torch.inference_mode(), self._autocast:
            self.forward(self.images)

    def call(self, images: Tensor, labels: Tensor | None) -> None:
        """A training step, or inference where there are no labels. Images are in this contender's format already."""
        self.images.copy_(images)
        if labels is not None:
            self.labels.copy_(labels)
        self._run()

    def training_pass(self, images: np.ndarray, labels: np.ndarray) -> Arrays:
        """Logits (n, h, w, classes) and gradients, as the correctness gate compares them."""
        self.images.copy_(torch.from_numpy(images.transpose(0, 3, 1, 2)))
        self.labels.copy_(torch.from_numpy(labels))
        logits = self._forward_backward().detach().to("cpu", self.form["dtype"])
        return {"logits": logits.numpy().transpose(0, 2, 3, 1), **gradients_of(self.model)}


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """Replays a call as a CUDA graph; what the call refers to is kept as long."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles, looks for cuDNN's fastest algorithms
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    def replay(_: Callable[[], object] = call) -> None:
        graph.replay()

    return replay


def _fold(model: nn.Module) -> None:
    """Makes batch norm a part of the convolution before it, as ours does."""
    for unit in model.modules():
        if isinstance(unit, nn.Sequential) and hasattr(unit, "bn"):
            unit.conv = fuse_conv_bn_eval(unit.conv, unit.bn)
            unit.bn = nn.Identity()


def peers_of(case: Case, thorough: bool) -> dict[str, Callable[[State], Peer]]:
    """Makers by name. `thorough`: every way in every memory format; else those of which one was the best so far."""
    ways = [("channels_last", way) for way in ("graph", "compile graph")]
    if not case.on_gpu:
        ways = [(memory_format, "eager") for memory_format in FORMATS]
    elif thorough:
        ways = [(memory_format, way) for memory_format in FORMATS for way in WAYS]
    made: dict[str, Callable[[State], Peer]] = {}
    folds = (True, False) if thorough or not case.on_gpu else (True,)
    for folded in folds if case.task == "inference" else (False,):
        for memory_format, way in ways:
            name = f"PyTorch, {memory_format}, {way}{', folded' if folded else ''}"
            made[name] = functools.partial(Peer, case, memory_format=memory_format, way=way, folded=folded)
    return made


def makers_of(case: Case, device: Device, right: Sequence[str], thorough: bool) -> dict[str, Maker]:
    """Makers by name; of ours those that are right. Bytes are what a contender takes of the GPU, its model included."""
    state = initial_state(0, case.width)
    training, place = case.task == "training", "cuda" if case.on_gpu else "cpu"
    ours: list[tuple[Array, Array | None]] = []
    theirs: dict[str, list[tuple[Tensor, Tensor | None]]] = {name: [] for name in FORMATS}
    for seed in range(INPUTS):
        images, labels = (torch.from_numpy(array).to(place) for array in case.data(seed))
        ours.append((device.from_dlpack(images), device.from_dlpack(labels) if training else None))
        for name, batches in theirs.items():
            nchw = images.permute(0, 3, 1, 2).contiguous(memory_format=FORMATS[name])
            batches.append((nchw, labels.long() if training else None))

    def maker(make: Callable[[], Ours | Peer], batches: Sequence[tuple[Any, Any]], meter: Meter) -> Maker:
        def build() -> tuple[Callable[[int], object], int]:
            before = meter(True)
            contender = make()
            for batch in batches[:2]:  # the second is recorded
                contender.call(*batch)
            return (lambda number: contender.call(*batches[number])), meter(False) - before

        return build

    meters = (_of_gpu, _of_torch) if case.on_gpu else (_of_process, _of_process)
    made = {name: maker(functools.partial(OURS[name], case, device, state), ours, meters[0]) for name in right}
    for name, make in peers_of(case, thorough).items():
        batches = theirs[name.split(", ")[1]]
        made[name] = maker(functools.partial(make, state), batches, meters[1])
    return made


def _of_gpu(begin: bool) -> int:
    import cupy

    if begin:
        cupy.get_default_memory_pool().free_all_blocks()
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free


def _of_torch(begin: bool) -> int:
    if begin:
        gc.collect()  # what contenders before it have left, and would be freed in its course
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def _of_process(begin: bool) -> int:
    """The most that this process has held: it has to be one for this contender alone."""
    # ru_maxrss would do, but on Linux a process inherits it from whoever started it.
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
