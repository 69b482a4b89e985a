"""Copies beside compute, and graphs: the same results as without them, and what they gain."""

from collections.abc import Callable, Iterator
from statistics import median
from time import perf_counter

import numpy as np

from gpu_check.part import Outcome, Work
from gpu_check.steps import Steps
from segnet_scratch.ops.convolution.conv2d import Conv2dForward
from segnet_scratch.ops.op import Buffers, spec


def uploads(work: Work) -> Outcome:
    """Training with batches uploaded before each step, prefetched, and lying on the device already."""
    batch, size, count = (32, 224, 20) if work.on_gpu else (2, 32, 3)
    steps = {name: Steps(work.device, batch, size, 1 / 16) for name in ("uploaded", "prefetched", "resident")}
    data = [steps["uploaded"].data(number) for number in range(count)]
    losses: dict[str, list[float]] = {name: [] for name in steps}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    device = work.device

    def resident() -> Iterator[tuple]:
        arrays = [device.upload(array) for array in data[0]]
        return ((arrays, arrays) for _ in data)

    sources: dict[str, Callable[[], Iterator[tuple]]] = {
        "uploaded": lambda: ((item, [device.upload(array) for array in item]) for item in data),
        "prefetched": lambda: device.prefetch(iter(data), lambda item: item),
        "resident": resident,
    }
    rounds = 0
    while rounds < 2 or (rounds < 8 and not work.over):
        for name, source in sources.items():
            device.synchronise()
            began = perf_counter()
            for _, (images, labels) in source():
                steps[name].step(images, labels, 1e-3)
                losses[name].append(steps[name].loss)
            device.synchronise()
            if rounds:  # the first round compiles and fills the pool
                seconds[name].append((perf_counter() - began) / count)
        rounds += 1
    same = losses["uploaded"] == losses["prefetched"] and all(np.isfinite(losses["uploaded"]))
    ms = {name: 1000 * median(values) for name, values in seconds.items()}
    cost = ms["uploaded"] - ms["resident"]
    megabytes = sum(array.nbytes for array in data[0]) / 1e6
    text = f"losses {'equal' if same else 'DIFFER'}; {megabytes:.1f} MB a step: "
    text += ", ".join(f"{name} {value:.2f} ms" for name, value in ms.items())
    if work.on_gpu:
        hidden = (ms["uploaded"] - ms["prefetched"]) / cost if cost > 0 else float("nan")
        text += f"; {hidden:.0%} of the upload's {cost:.2f} ms hidden; {_overlap(work)}"
    return Outcome(same, text, details={"ms": ms, "bytes": megabytes * 1e6, "rounds": rounds})


def _overlap(work: Work) -> str:
    """How much of a pinned copy passes while kernels run, by events on one clock."""
    import cupy

    def event(stream: object = None) -> object:
        mark = cupy.cuda.Event()
        mark.record(stream)
        return mark

    x = spec((16, 224, 224, 64), np.float32)
    op = Conv2dForward.plan(x, spec((64, 3, 3, 64), np.float32), 1, 1)
    arrays = {name: work.device.zeros(s.shape, s.dtype) for name, s in {**op.inputs, **op.outputs}.items()}
    target = cupy.empty(1 << 26, np.uint8)
    pinned = np.frombuffer(cupy.cuda.alloc_pinned_memory(target.nbytes), np.uint8, target.size)
    stream = cupy.cuda.Stream(non_blocking=True)
    for _ in range(2):  # the second time everything is loaded
        base = event()
        stream.wait_event(base)
        marks = [event()]
        for _ in range(4):
            op.run(work.device, Buffers(**arrays))
        marks += [event(), event(stream)]
        target.set(pinned, stream=stream)
        marks.append(event(stream))
        cupy.cuda.Device().synchronize()
        begin, end, copy_begin, copy_end = (cupy.cuda.get_elapsed_time(base, mark) for mark in marks)
    shared = max(0.0, min(end, copy_end) - max(begin, copy_begin))
    duration = copy_end - copy_begin
    rate = target.nbytes / duration / 1e6
    return f"a copy of {target.nbytes / 1e6:.0f} MB at {rate:.1f} GB/s ran {shared / duration:.0%} beside kernels"


def graphs(work: Work) -> Outcome:
    """A captured training step replayed against the same steps made one by one, bit for bit."""
    size, width, replays = (64, 1 / 4, 20) if work.on_gpu else (32, 1 / 16, 2)
    eager, captured = (Steps(work.device, 1, size, width, dropout=True) for _ in range(2))
    made = {"eager": (eager, eager.step.walk), "replayed": (captured, captured.step.run)}
    losses: dict[str, list[float]] = {"eager": [], "replayed": []}
    seconds: dict[str, list[float]] = {"eager": [], "replayed": []}
    for number in range(1 + replays):
        for name, (steps, step) in made.items():
            steps.write(number)
            work.device.synchronise()
            began = perf_counter()
            step()
            work.device.synchronise()
            if number:  # the first is recorded
                seconds[name].append(perf_counter() - began)
            losses[name].append(steps.loss)
    problems = []
    if losses["eager"] != losses["replayed"] or not all(np.isfinite(losses["eager"])):
        problems.append(f"losses: {losses}")
    if eager.digest() != captured.digest():
        problems.append("the weights differ")
    ms = {name: 1000 * median(values) for name, values in seconds.items() if values}
    text = (
        f"{replays} replays {'differ from' if problems else 'equal'} steps made one by one; batch 1 at {size}x{size}: "
    )
    text += ", ".join(f"{name} {value:.2f} ms" for name, value in ms.items())
    return Outcome(not problems, text, problems, {"ms": ms})
