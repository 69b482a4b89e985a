"""Ceilings of the GPU, and each convolution of SegNet on its own: cuDNN beside ours, in TFLOP/s.

`python -m bench.layers` measures the convolutions alone, in a minute: the ops of the fused engine with what they do
in the epilogue (statistics forward; mask and sums in dgrad), which cuDNN leaves to others; on an sm_90 Hopper's kernels
in every tile, and mma.sync's beside them.
"""

import argparse
import functools
import json
from collections.abc import Callable, Iterator

import torch

from bench.cases import CLASSES, SMALL, Case
from bench.contenders import captured, set_precision
from bench.timing import Clock, CudaClock, in_turn
from segnet_scratch.engine.convolutions import Convolutions
from segnet_scratch.engine.network import RUNG_OF_PRECISION, Network, storage
from segnet_scratch.lab.profile.tune import random_buffers
from segnet_scratch.ops.convolution.conv2d_fused import Below
from segnet_scratch.ops.convolution.conv2d_hopper import HopperBackwardData, HopperForward
from segnet_scratch.ops.op import Op, Spec
from segnet_scratch.runtime.devices import Device, get_device
from segnet_scratch.segnet import SegNet
from segnet_scratch.step import GraphReplay

GIGABYTE = 10**9


def ceilings(clock: Clock, seconds: float) -> dict[str, float]:
    """TB/s of a large copy, TFLOP/s of a large product in each precision."""
    source = torch.empty(GIGABYTE // 4, device="cuda")
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source)}
    for precision in ("bf16", "tf32", "float32"):
        matrix = torch.randn((8192, 8192), device="cuda", dtype=torch.bfloat16 if precision == "bf16" else None)
        calls[precision] = functools.partial(_product, precision, matrix)
    times = in_turn(calls, clock, seconds)
    speeds = {name: 2 * 8192**3 / times[name].median / 1e12 for name in calls if name != "copy"}
    return {"copy, TB/s": 2 * GIGABYTE / times["copy"].median / 1e12, **{f"{k}, TFLOP/s": v for k, v in speeds.items()}}


def _product(precision: str, matrix: torch.Tensor) -> torch.Tensor:
    set_precision(precision)
    return matrix @ matrix


def convolutions(case: Case, device: Device, clock: Clock, seconds: float) -> Iterator[dict[str, object]]:
    """One row for each shape of a convolution and each direction: FLOP, and TFLOP/s of cuDNN and of ours."""
    network = Network(SegNet.blocks_of(1.0), CLASSES, case.batch, case.size)
    shapes = dict.fromkeys((layer.full, layer.weight) for layer in network.layers)
    rung = RUNG_OF_PRECISION[case.precision]
    classifier = network.classifier(rung)
    shapes[(case.batch, *case.size, classifier[0]), classifier] = None
    set_precision(case.precision)
    kernels = Convolutions.on(device, rung)
    for full, of_weight in shapes:
        for direction in ("fprop", "dgrad", "wgrad"):
            if direction == "dgrad" and of_weight[3] == 3:
                continue
            x, weight = Spec((*full[:3], of_weight[3]), storage(rung)), Spec(of_weight, storage(rung))
            ops = _ours(kernels, direction, x, weight)
            if kernels.tiles is not None:
                ops["mma.sync"] = _ours(Convolutions(rung), direction, x, weight)["ours"]
            calls = {"cuDNN": captured(_cudnn(direction, case.precision, x.shape, of_weight))}
            for name, op in ops.items():
                calls[name] = GraphReplay(device, functools.partial(op.run, device, random_buffers(device, op)))
            flops = ops["ours"].flops
            times = in_turn(calls, clock, seconds / (3 * len(shapes)))
            shape = f"{of_weight[3]} -> {of_weight[0]}, {full[1]}x{full[2]}"
            speeds = {name: flops / t.median / 1e12 for name, t in times.items()}
            yield {"layer": shape, "direction": direction, "GFLOP": flops / 1e9, **speeds}


def _ours(kernels: Convolutions, direction: str, x: Spec, weight: Spec) -> dict[str, Op]:
    """The engine's op, and the same in every other tile that there is a choice of."""
    y = x.with_shape(*x.shape[:3], weight.shape[0])
    if direction == "wgrad":
        return {"ours": kernels.backward_weight(x, weight)}
    if direction == "dgrad":
        op: Op = kernels.backward_data(y, weight, Below(x), None)
    else:
        op = kernels.forward(x, weight, statistics=True)
    others = op.alternatives() if isinstance(op, HopperForward | HopperBackwardData) else {}
    return {"ours": op, **others}


def _cudnn(direction: str, precision: str, x: tuple[int, ...], weight: tuple[int, ...]) -> Callable[[], object]:
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    n, h, w, c = x
    o, k = weight[:2]

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=kind).to(memory_format=torch.channels_last)

    image, kernel = random(n, c, h, w), random(o, c, k, k)
    if direction == "fprop":
        return lambda: torch.nn.functional.conv2d(image, kernel, padding=k // 2)
    gradient = random(n, o, h, w)
    mask = [direction == "dgrad", direction == "wgrad", False]
    pad = [k // 2, k // 2]
    backward = torch.ops.aten.convolution_backward
    return lambda: backward(gradient, image, kernel, None, [1, 1], pad, [1, 1], False, [0, 0], 1, mask)


def main() -> None:
    """Prints a line of JSON for each row as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="for all rows together (default: 60)")
    parser.add_argument("--precision", choices=RUNG_OF_PRECISION, default="bf16")
    options = parser.parse_args()
    case = Case("training", 16, SMALL, options.precision)
    for row in convolutions(case, get_device("cuda"), CudaClock(), options.seconds):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
