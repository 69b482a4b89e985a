"""A training step of full SegNet against PyTorch: interleaved, medians of synchronised steps."""

from collections.abc import Callable
from statistics import median
from time import perf_counter

import numpy as np

from gpu_check.part import Outcome, Work
from gpu_check.steps import Steps

BATCH, SIZE, WARM_UP, REPETITIONS = 4, 224, 3, 20


def timing(work: Work) -> Outcome:
    """Ours, one by one and as a graph, beside PyTorch in strict float32 and in TF32."""
    if not work.on_gpu:
        return Outcome(None, "not run: timings belong to a GPU")
    steps = Steps(work.device, BATCH, SIZE, 1.0)
    steps.losses(1)
    peers: dict[str, Callable[[], object]] = {"ours": steps.step.walk, "ours as a graph": steps.step.run}
    peers |= _torch_steps(*steps.data(0))
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    for repetition in range(WARM_UP + REPETITIONS):
        if repetition > WARM_UP + 3 and work.over:
            break
        for name, step in peers.items():
            work.device.synchronise()
            began = perf_counter()
            step()
            work.device.synchronise()
            if repetition >= WARM_UP:
                seconds[name].append(perf_counter() - began)
    ms = {name: 1000 * median(values) for name, values in seconds.items()}
    text = ", ".join(f"{name} {value:.1f} ms" for name, value in ms.items())
    count = len(seconds["ours"])
    return Outcome(
        None, f"training step, batch {BATCH} at {SIZE}x{SIZE}, medians of {count}: {text}", details={"ms": ms}
    )


def _torch_steps(images: np.ndarray, labels: np.ndarray) -> dict[str, Callable[[], None]]:
    """The same step in PyTorch, channels_last; nothing where there is no PyTorch."""
    try:
        import torch
    except ImportError:
        return {}
    import torch_segnet

    torch.backends.cudnn.benchmark = True
    x = torch.from_numpy(images).permute(0, 3, 1, 2).to("cuda", memory_format=torch.channels_last)
    y = torch.from_numpy(labels.astype(np.int64)).cuda()

    def make(tf32: bool) -> Callable[[], None]:
        model = torch_segnet.TorchSegNet(21, 1.0).cuda().to(memory_format=torch.channels_last)
        groups = torch_segnet.parameter_groups(model, 5e-4)
        optimiser = torch.optim.SGD(groups, lr=1e-3, momentum=0.9, fused=True)

        def step() -> None:
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
            optimiser.zero_grad(set_to_none=True)
            torch.nn.functional.cross_entropy(model(x), y, ignore_index=255).backward()
            optimiser.step()
            torch.cuda.synchronize()

        return step

    return {"PyTorch float32": make(False), "PyTorch TF32": make(True)}
