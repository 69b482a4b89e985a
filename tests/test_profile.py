"""`segnet profile`: counts against hand-computed ones, times on every device, ceilings, occupancy, pictures, traces."""

import json
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from support import ROOT
from support.kernels import FLOAT32, needs_compiler

from segnet_scratch.errors import CompileError
from segnet_scratch.lab.profile import ceilings, kernels, ladder, measure, trace
from segnet_scratch.lab.profile.ceilings import Ceilings
from segnet_scratch.lab.profile.measure import CountingDevice, How, Step, Workload, count
from segnet_scratch.lab.profile.record import OpRun, Profile, Recorder, Summary
from segnet_scratch.nn.autograd import tensor
from segnet_scratch.nn.functions import conv2d, relu
from segnet_scratch.ops.convolution.conv2d import Conv2dBackwardBias
from segnet_scratch.ops.op import spec
from segnet_scratch.ops.optimiser.array_table import chunks_of
from segnet_scratch.runtime import observe
from segnet_scratch.runtime.devices import CudaDevice, HostDevice, Timer, get_device
from segnet_scratch.runtime.host import HostOptions
from segnet_scratch.runtime.launch import ElementTypes, find_kernel
from segnet_scratch.runtime.occupancy import Occupancy, occupancy
from segnet_scratch.segnet import DECODERS, SegNetBasic, segnet_blocks

SMALL = Workload("segnet", "indices", 1 / 16, 2, (32, 48))


@pytest.fixture
def quick(monkeypatch):
    """Ceilings and caches of a size that a CPU goes through in no time."""
    sizes = {"MATRIX": 64, "FMA_THREADS": 512, "FMA_ROUNDS": 5, "MMA_THREADS": 512, "MMA_ROUNDS": 5, "PASSES": 1}
    for name, value in (sizes | {"COPY_BYTES": {"cuda": 1 << 20}}).items():
        monkeypatch.setattr(ceilings, name, value)
    monkeypatch.setattr(measure, "CACHE_BYTES", 1 << 10)


def devices():
    return [pytest.param("numpy"), *(pytest.param(name, marks=needs_compiler) for name in ("host", "cuda"))]


def device_of(name, request):
    if name != "cuda":
        return get_device(name)
    request.getfixturevalue("cupy")
    return CudaDevice()


# The hook


class Notes(observe.Observer):
    def __init__(self):
        self.ops, self.launches, self.barrier_counts = [], [], []

    def op(self, op, run):
        self.ops.append((op.name, observe.current_scope()))
        run()

    def launch(self, launch, run):
        self.launches.append(launch)
        run()

    def barriers(self, count):
        self.barrier_counts.append(count)


def test_ops_are_seen_in_their_layer_and_gradients_in_that_of_their_function():
    x, weight = tensor(np.ones((1, 4, 4, 2)), "numpy", True), tensor(np.ones((3, 3, 3, 2)), "numpy", True)
    notes = Notes()
    with observe.observe(notes):
        with observe.scope("a"):
            y = conv2d(x, weight, padding=1)
            with observe.scope("b"):
                y = relu(y)
        with observe.scope("elsewhere"):
            y.backward(np.ones(y.shape))
        assert observe.current_scope() == ""
    assert notes.ops == [
        *(("conv2d_forward", "a"), ("relu_forward", "b")),
        *(("relu_backward", "b"), ("conv2d_backward_data", "a"), ("conv2d_backward_weight", "a")),
    ]
    relu(x)
    assert len(notes.ops) == 5, "nobody listens any more"


def test_the_hook_comes_off_after_an_error():
    notes, before = Notes(), Notes()
    with observe.observe(before):
        with pytest.raises(RuntimeError), observe.observe(notes), observe.scope("a"):
            raise RuntimeError
        relu(tensor(np.ones(3), "numpy"))
    assert (notes.ops, before.ops) == ([], [("relu_forward", "")])


@needs_compiler
@pytest.mark.parametrize("workers", [1, 8])
def test_launches_and_barriers_are_seen(workers):
    op = Conv2dBackwardBias.plan(spec((1, 256, 128, 35), np.float32))
    device, notes = HostDevice(HostOptions(workers=workers)), Notes()
    with observe.observe(notes):
        op(device, dy=np.ones((1, 256, 128, 35), np.float32))
    partial, merge = notes.launches
    assert (partial.kernel.name, partial.block, partial.types) == ("conv2d_backward_bias_partial", (32, 8, 1), FLOAT32)
    assert (merge.kernel.name, merge.grid) == ("conv2d_backward_bias_merge", (5, 1, 1))
    blocks = int(np.prod(partial.grid))
    assert blocks == 2 * 512  # groups of 32 channels, chunks of 64 pixels
    # A barrier in the first kernel; in each block of the second the store of the lanes and six steps of a tree.
    assert notes.barrier_counts == [blocks, 5 * 7]


# Counts


def convolution_flops(batch, h, w):
    """(forward of an image, of a training step): twice the multiplications of each convolution, by the paper's figure.

    A gradient costs what forward does; the first layer needs none for its input.
    """
    sizes = {}
    for stage in range(1, 6):
        sizes[stage], h, w = h * w, -(-h // 2), -(-w // 2)
    layers = [(b.in_channels, b.out_channels, sizes[b.stage]) for b in segnet_blocks(1.0, False)] + [(64, 21, sizes[1])]
    forward = [2 * 9 * i * o * pixels for i, o, pixels in layers]
    return sum(forward), batch * (3 * sum(forward) - forward[0])


@pytest.mark.parametrize(
    ("batch", "size", "forward", "step"),
    # At 360x480 the deepest map has 23 rows here, in ceil mode; with 22 it would be 214.6 GFLOP and 5.14 TFLOP.
    [(16, (224, 224), 62.4e9, 2.99e12), (8, (360, 480), 215.4e9, 5.16e12)],
    ids=["16x224x224", "8x360x480"],
)
def test_convolutions_come_to_the_known_totals(batch, size, forward, step):
    counted = count(Workload(batch=batch, size=size))
    convolutions = [run for run in counted.runs if run.name.startswith("conv2d") and "bias" not in run.name]
    by_hand = convolution_flops(batch, *size)
    found = sum(run.flops for run in convolutions if run.phase == "forward"), sum(run.flops for run in convolutions)
    assert found == (batch * by_hand[0], by_hand[1])
    assert found[0] / batch == pytest.approx(forward, rel=2e-3)
    assert found[1] == pytest.approx(step, rel=2e-3)
    assert len(convolutions) == 26 + 25 + 26
    assert counted.parameters == 29_447_189
    # The other ops add little work: 0.3 GFLOP an image to forward.
    assert sum(run.flops for run in counted.runs) < 1.004 * found[1]


def test_every_count_of_a_layer_by_hand():
    """decoder.1.1 at 2 images of 32x48: unpool, 4 -> 4 channels of 3x3, batch norm, ReLU, and their gradients."""
    counted = count(SMALL)
    pixels, c = 2 * 32 * 48, 4
    size, conv = pixels * c, 2 * 9 * pixels * c * c
    maps, windows = 4 * size, size // 4
    weight = 4 * 9 * c * c
    expected = {
        "max_unpool_forward": (0, maps + 4 * windows + windows),
        "conv2d_forward": (conv, 2 * maps + weight + 4 * c),
        "batch_norm_training_forward": (7 * size, None),
        "relu_forward": (size, 2 * maps),
        "relu_backward": (size, 3 * maps),
        "batch_norm_backward": (11 * size, None),
        "conv2d_backward_data": (conv, 2 * maps + weight),
        "conv2d_backward_weight": (conv, 2 * maps + weight),
        "max_unpool_backward": (0, maps + 4 * windows + windows),
    }
    found = {run.name: (run.flops, run.bytes) for run in counted.runs if run.layer == "decoder.1.1"}
    assert list(found) == list(expected)
    for name, (flops, nbytes) in expected.items():
        assert found[name][0] == flops, name
        assert nbytes in (found[name][1], None), name
    # Batch norm reads x (backward: and dy) and writes as much as it; the rest is some numbers a channel.
    assert found["batch_norm_training_forward"][1] == pytest.approx(2 * maps, rel=0.01)
    assert found["batch_norm_backward"][1] == pytest.approx(3 * maps, rel=0.01)


def test_layers_and_phases_cover_the_step():
    counted = count(SMALL)
    blocks = [block.name for block in segnet_blocks(1.0, False)]
    layers = list(dict.fromkeys(run.layer for run in counted.runs))
    assert layers == [*blocks, "classifier", "loss", "update"]
    phases = [run.phase for run in counted.runs]
    assert phases == sorted(phases, key=["forward", "backward", "update"].index)
    assert {run.layer for run in counted.runs if run.phase == "backward"} == {*layers} - {"update"}
    assert {(run.name.endswith("forward"), run.phase) for run in counted.runs} == {
        *((True, "forward"), (False, "backward"), (False, "update"))
    }


def test_inference_has_only_forward():
    counted = count(Workload("segnet-basic", "bilinear", 1.0, 3, (32, 32), inference=True))
    assert {run.name for run in counted.runs} == {
        *("conv2d_forward", "batch_norm_evaluation_forward", "relu_forward"),
        *("max_pool_forward", "resize_bilinear_forward"),
    }
    assert "kept for backward" not in counted.memory


def test_the_counting_device_knows_what_is_alive():
    device = CountingDevice()
    a = device.empty((1000,), np.float32)
    b = device.zeros((10, 10), np.float64)
    view = a.reshape(10, 100)
    assert (device.live, device.peak) == (4800, 4800)
    del a, b
    assert (device.live, device.peak) == (4000, 4800)
    del view
    assert device.live == 0


def test_memory_of_a_step_by_hand():
    """SegNet-Basic keeps of each layer what its Functions say that they save; the rest of forward is gone by then."""
    n, h, w, c = 2, 32, 32, 64
    work = Workload("segnet-basic", "indices", 1.0, n, (h, w))
    counted = count(work)
    memory, parameters = counted.memory, counted.parameters
    pixels = [n * h * w // 4**k for k in range(5)]
    kept = 0
    for stage in range(4):
        encoder, decoder = pixels[stage] * c, pixels[stage] * c
        kept += 4 * 2 * encoder  # the input of batch norm, and the output of ReLU
        kept += 4 * decoder  # the input of batch norm; its output is what the next unpool, which saves none, forgets
        kept += 4 * decoder  # the unpooled map, which the convolution reads
        kept += pixels[stage + 1] * c  # codes
        kept += 4 * pixels[stage + 1] * c if stage < 3 else 0  # pooled map, which the next convolution reads
    kept += 4 * pixels[0] * (c + 21)  # what the classifier reads, and the logits
    assert memory["kept for backward"] == pytest.approx(kept, rel=0.01)
    running = 2 * 8 * c
    batch = n * h * w * (3 * 4 + 1)
    sizes = [p.data.size for p in SegNetBasic(21).parameters()]
    # Of the norm: a double for each gradient and each chunk, and where each gradient's chunks begin.
    norm = 8 * (len(sizes) + len(chunks_of(sizes))) + 4 * len(sizes)
    tables = 16 * (8 + 4 + 8 + 16)  # of the running statistics, so that a failed step can take them back
    expected = 4 * (2 * parameters + running) + batch + norm + tables
    assert memory["weights, momenta and batch"] == pytest.approx(expected, abs=64)
    assert memory["peak"] > memory["kept for backward"] + memory["weights, momenta and batch"]


def decoder_figures():
    """The table of docs/explanation/decoders.md: {decoder: the numbers of its row}."""
    text = (ROOT / "docs" / "explanation" / "decoders.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", text, re.MULTILINE)
    return {name: [float(cell.replace(",", "")) for cell in cells.split("|")] for name, cells in rows}


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_figures_of_the_decoders_in_the_documentation(decoder):
    step, inference = (count(Workload(decoder=decoder, batch=4, inference=only)) for only in (False, True))
    forward = sum(run.flops for run in step.runs if run.phase == "forward") / 4
    expected = [step.parameters / 1e6, forward / 1e9, step.total.flops / 1e12]
    expected += [step.memory["kept for backward"] / 1e6, step.memory["peak"] / 1e6, inference.memory["peak"] / 1e6]
    for written, measured in zip(decoder_figures()[decoder], expected, strict=True):
        assert written == pytest.approx(measured, rel=1e-3)


# Times


@pytest.mark.usefixtures("multiply_adds")
@pytest.mark.parametrize("name", devices())
def test_a_step_on_every_device(name, request, quick):
    device = device_of(name, request)
    profile = measure.profile_step(SMALL, device, How(2), timeline=True)
    counted = count(SMALL)
    assert [(r.name, r.phase, r.layer, r.flops, r.bytes) for r in profile.runs] == [
        (r.name, r.phase, r.layer, r.flops, r.bytes) for r in counted.runs
    ]
    assert all(len(run.times) == 2 and min(run.times) > 0 for run in profile.runs)
    launches = [[x.kernel.name for x in run.launches] for run in profile.runs]
    assert launches == [[x.kernel.name for x in run.launches] if name != "numpy" else [] for run in counted.runs]
    # The stand-in for a GPU runs the host's kernels, and so counts their barriers as well.
    assert (profile.total.barriers > 0) == (name != "numpy")
    assert 0 < profile.total.of_ceiling < np.inf
    assert sum(s.seconds for s in profile.by(lambda run: run.layer)) == pytest.approx(profile.total.seconds)
    json.dumps(profile.to_json(), allow_nan=False)
    begins = [begin for _, begin, _ in profile.spans]
    assert begins == sorted(begins)
    assert begins[0] == 0
    assert all(begin <= end for _, begin, end in profile.spans)


@needs_compiler
def test_on_a_gpu_the_cache_is_emptied_outside_of_the_time(cupy, quick, monkeypatch):
    """And again where the GPU was faster than the CPU: a lap in which it waited does not count."""
    device, order = CudaDevice(), []
    reached = iter([True, True, False, False])

    class SlowCpu(Timer):
        def mark(self):
            order.append("mark")
            return len(order)

        def has_reached(self, mark):
            return next(reached)

    monkeypatch.setattr(device, "write", lambda to, value: order.append(f"write {to.size}"))
    monkeypatch.setattr(device, "timer", SlowCpu)
    recorder = How(1).recorder(device)
    x = tensor(np.ones((1, 2, 2, 1), np.float32), device)
    with observe.observe(recorder):
        for covers in (1, 2, 4, 4):
            recorder.begin_pass()
            order.clear()
            relu(x)
            assert order == ["write 1024"] * covers + ["mark", "mark"]
    recorder.take_times()
    (run,) = recorder.runs
    assert [lap.waited for lap in run.laps] == [True, True, False, False]
    assert run.times == [1, 1]


def test_a_median_ignores_one_pass_that_was_disturbed():
    run = OpRun("relu_forward", "forward", "a", 100, 50, times=[2.0, 50.0, 1.0])
    assert run.seconds == 2.0
    assert OpRun("relu_forward", "forward", "a", 100, 50).seconds is None


def test_sums_by_hand():
    roof = Ceilings(flops=100.0, bandwidth=10.0, source="")
    computing, moving = (OpRun("a", "forward", "x", f, b, times=[t]) for f, b, t in ((1000, 10, 20.0), (10, 100, 40.0)))
    both = Summary("both", (computing, moving), roof)
    assert roof.seconds(1000, 10) == 10.0
    assert roof.seconds(10, 100) == 10.0
    assert Summary("", (computing,), roof).of_ceiling == 0.5
    assert Summary("", (moving,), roof).of_ceiling == 0.25
    assert both.of_ceiling == pytest.approx(20 / 60)
    found = both.to_json()
    assert found["gflops_per_second"] == pytest.approx(1010 / 60 / 1e9)
    assert found["gbytes_per_second"] == pytest.approx(110 / 60 / 1e9)
    assert found["seconds_of_bytes"] == pytest.approx(110 / 10)
    assert found["of_copy"] == pytest.approx(11 / 60)
    assert found["intensity"] == pytest.approx(1010 / 110)
    untimed = Summary("", (computing, OpRun("a", "forward", "x", 1, 1)), roof)
    assert untimed.seconds is None
    assert untimed.of_ceiling is None
    assert untimed.to_json()["gflops_per_second"] is untimed.to_json()["of_copy"] is None


def test_each_op_is_held_against_the_ceiling_of_how_it_multiplies():
    roof = Ceilings(flops=100.0, bandwidth=1e9, source="", tensor_cores={"bf16": 1000.0})
    assert roof.seconds(1000, 0, "bf16") == 1.0
    assert roof.seconds(1000, 0, "float32") == roof.seconds(1000, 0) == 10.0
    launched = [observe.Launch(find_kernel("relu_forward"), ElementTypes.named("bf16"), (1,), (1,), 0)]
    run = OpRun("a", "forward", "x", 1000, 1, launches=launched, times=[2.0])
    assert Summary("", (run,), roof).of_ceiling == 0.5
    found = Profile("", "cuda", [run], ceilings=roof).to_json()["ceilings"]
    assert found["tensor_core_flops_per_second"] == {"bf16": 1000.0}


@needs_compiler
@pytest.mark.parametrize(("rung", "depth"), [("tf32", 8), ("bf16", 16)])
def test_the_kernel_of_the_tensor_cores_ceiling_multiplies_what_it_says(rung, depth, monkeypatch):
    monkeypatch.setattr(ceilings, "MMA_THREADS", 512)
    monkeypatch.setattr(ceilings, "MMA_ROUNDS", 3)
    assert ceilings.MMA_FLOPS[rung] == 2 * 16 * 8 * depth
    found = ceilings.products(get_device("host"), rung)
    assert (found == 4 * ceilings.CHAINS * 3 * depth).all()


def test_another_op_in_a_later_pass_is_noticed():
    recorder = Recorder()
    x = tensor(np.ones(3), "numpy")
    with observe.observe(recorder):
        recorder.begin_pass()
        relu(x)
        recorder.begin_pass()
        other = pytest.raises(AssertionError, match="relu_forward of b where the first pass had relu_forward")
        with other, observe.scope("b"):
            relu(x)


@needs_compiler
def test_the_kernel_of_the_ceiling_computes_what_it_says(monkeypatch):
    monkeypatch.setattr(ceilings, "FMA_THREADS", 512)
    monkeypatch.setattr(ceilings, "FMA_ROUNDS", 7)
    found = ceilings.multiply_adds(get_device("host"))
    term = (np.arange(512) % 32).astype(np.float64)
    sums = np.tile(np.arange(8.0)[:, None], 512)
    for _ in range(7):
        sums = sums * 0.5 + term
    np.testing.assert_allclose(found, sums.sum(0), rtol=1e-6)


# Figures of kernels


@pytest.mark.parametrize(
    ("architecture", "threads", "registers", "shared", "expected"),
    [
        ("sm_90", 256, 32, 0, Occupancy(8, 1.0, "threads")),
        ("sm_90", 128, 127, 14848, Occupancy(4, 0.25, "registers")),  # 4096 registers a warp: 16 warps
        ("sm_90", 64, 33, 0, Occupancy(24, 0.75, "registers")),  # 40 a thread: 51 warps, in fours 48
        ("sm_90", 256, 32, 100 * 1024, Occupancy(2, 0.25, "shared memory")),  # 101 KiB with what the system takes
        ("sm_90", 32, 16, 0, Occupancy(32, 0.5, "blocks")),
        ("sm_75", 256, 32, 0, Occupancy(4, 1.0, "threads")),
        ("sm_75", 64, 32, 16 * 1024, Occupancy(4, 0.25, "shared memory")),
        ("sm_86", 1024, 32, 0, Occupancy(1, 1024 / 1536, "threads")),
        ("sm_89", 33, 255, 0, Occupancy(4, 4 * 64 / 1536, "registers")),  # 8192 a warp: 8 warps, 2 a block
        ("sm_120", 1024, 255, 0, Occupancy(0, 0.0, "registers")),
    ],
)
def test_occupancy_by_hand(architecture, threads, registers, shared, expected):
    assert occupancy(architecture, threads, registers, shared) == expected


def some_launches():
    return [x for run in count(SMALL).runs if run.name == "relu_forward" for x in run.launches]


def test_figures_of_launched_kernels():
    pytest.importorskip("nvidia", reason="needs NVRTC: pip install -e '.[nvrtc]'")
    launches = some_launches()
    figures, message = kernels.kernel_figures(launches, ["sm_75", "sm_90", "sm_121"])
    found = [(f["kernel"], f["architecture"]) for f in figures]
    assert found == [("relu_forward", "sm_75"), ("relu_forward", "sm_90")]
    assert "sm_121" in message
    for f in figures:
        assert (f["threads"], f["launches"]) == (256, len(launches))
        assert 8 <= f["registers"] <= 255
        expected = occupancy(f["architecture"], 256, f["registers"], f["shared_bytes"])
        found = [f[name] for name in ("blocks_per_multiprocessor", "occupancy", "limited_by")]
        assert found == [expected.blocks, expected.share, expected.limit]


def test_without_nvrtc_the_rest_goes_on(segnet, monkeypatch, tmp_path):
    def missing():
        raise CompileError("libnvrtc was not found; pip install 'segnet_scratch[cuda13]'")

    monkeypatch.setattr(kernels, "supported_architectures", missing)
    finished = segnet("profile", "--counts", "--width", "0.0625", "--json", tmp_path / "p.json")
    assert finished.code == 0
    assert "no registers and no occupancy: libnvrtc was not found; pip install" in finished.out
    found = json.loads((tmp_path / "p.json").read_text())
    assert found["kernels"] == []
    assert found["total"]["launches"] > 300


# Ladders


def test_every_op_of_the_table_can_be_profiled():
    assert ladder.op_names() == sorted(set(ladder.op_names()))
    assert {"conv2d", "batch_norm", "relu", "max_pool", "conv_transpose2d", "sgd"} <= {*ladder.op_names()}
    device = CountingDevice()
    for op in ladder.op_names():
        found = measure.profile_op(op, (2, 6, 5, 7), None, 3, device, How(1))
        assert len(found.runs) == len(ladder.rows_of(op, device))
        assert all(run.launches for run in found.runs), op


@pytest.mark.parametrize("name", devices())
def test_a_ladder_on_every_device(name, request, quick):
    device = device_of(name, request)
    found = measure.profile_op("max_pool", (1, 5, 6, 3), None, 3, device, How(3))
    scalar = [] if name == "numpy" else ["max_pool_forward_scalar"]  # NumPy has one way, whatever the rung
    assert [run.layer for run in found.runs] == ["max_pool_forward", *scalar, "max_pool_backward"]
    assert all(len(run.times) == 3 and run.seconds > 0 for run in found.runs)
    rungs = [row.name for row in ladder.rows_of("conv2d", device)]
    assert len(rungs) == (4 if name == "numpy" else 19)


# Pictures and traces


def end_of(event):
    return event["ts"] + event["dur"]


def test_a_trace_is_valid(quick):
    profile = measure.profile_step(SMALL, get_device("numpy"), How(1), timeline=True)
    events = trace.events(profile.spans, "a title")
    read = json.loads(json.dumps({"traceEvents": events}, allow_nan=False), parse_constant=pytest.fail)["traceEvents"]
    names = {(e["name"], e["tid"]): e["args"]["name"] for e in read if e["ph"] == "M"}
    assert names[("process_name", 0)] == "a title"
    assert [names[("thread_name", tid)] for tid in range(3)] == ["phases", "layers", "ops"]
    complete = [e for e in read if e["ph"] == "X"]
    assert len(complete) + len(names) == len(read)
    assert all(e["ts"] >= 0 and e["dur"] >= 0 and e["pid"] == 0 for e in complete)
    phases, layers, ops = ([e for e in complete if e["tid"] == tid] for tid in range(3))
    assert [e["name"] for e in phases] == ["forward", "backward", "update"]
    assert [e["name"] for e in ops] == [run.name for run in profile.runs]
    assert [e["name"] for e in layers[:3]] == ["encoder.1.1", "encoder.1.2", "encoder.2.1"]
    # Rows do not overlap, and every op lies within its layer and its phase.
    for row in (phases, layers, ops):
        ends = [0.0, *map(end_of, row)]
        assert all(e["ts"] >= end - 1e-6 for e, end in zip(row, ends, strict=False))
    for outer in (phases, layers):
        for op in ops:
            around = [e for e in outer if e["ts"] - 1e-6 <= op["ts"] and end_of(op) <= end_of(e) + 1e-6]
            assert around, op
            assert outer is phases or op["args"]["layer"] in {e["name"] for e in around}


def test_a_roofline_is_drawn_and_everything_is_written(segnet, quick, tmp_path):
    pytest.importorskip("matplotlib")
    files = {name: tmp_path / "new" / name for name in ("roofline.png", "trace.json", "profile.json")}
    finished = segnet(
        *("profile", "--device", "numpy", "--width", "0.0625", "--size", "32x48", "--batch", "2", "--passes", "2"),
        *("--roofline", files["roofline.png"], "--trace", files["trace.json"], "--json", files["profile.json"]),
    )
    assert finished.code == 0, finished.err
    assert "training step of segnet, decoder indices, width 0.0625, 2 images of 32x48, on numpy" in finished.out
    assert "conv2d_backward_weight" in finished.out
    assert "decoder.3.2" in finished.out
    assert "GFLOP/s" in finished.out
    with Image.open(files["roofline.png"]) as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 20
    assert json.loads(files["trace.json"].read_text())["traceEvents"]
    found = json.loads(files["profile.json"].read_text())
    assert found["total"]["flops"] == sum(run["flops"] for run in found["runs"])
    assert found["parameters"] > 0


@pytest.mark.parametrize(("option", "module"), [("--roofline", "matplotlib.figure"), ("--nvtx", "nvtx")])
def test_a_missing_library_is_named_with_its_extra(segnet, quick, monkeypatch, tmp_path, option, module):
    monkeypatch.setitem(sys.modules, module, None)
    value = [tmp_path / "r.png"] if option == "--roofline" else []
    arguments = ("profile", "relu", "--shape", "1,4,4,2", "--device", "numpy", "--passes", "1", option, *value)
    finished = segnet(*arguments)
    assert finished.code == 1
    assert finished.err.startswith(f"error: {option}: expected the library {module}")
    assert "segnet_scratch[profile]" in finished.err


def test_ranges_are_made_for_nsight(monkeypatch):
    open_now, seen = [], []

    @contextmanager
    def annotate(name, domain):
        open_now.append(name)
        yield
        seen.append((open_now.pop(), domain))

    monkeypatch.setitem(sys.modules, "nvtx", SimpleNamespace(annotate=annotate))
    recorder = How(1, nvtx=True).recorder(get_device("numpy"))
    step = Step(Workload("segnet-basic", "indices", 1 / 16, 1, (32, 32), inference=True), get_device("numpy"))
    step.run(recorder)
    first = "encoder.1.1 conv2d_forward", "encoder.1.1 batch_norm_evaluation_forward"
    assert seen[:2] == [(name, "segnet") for name in first]
    assert len(seen) == len(recorder.runs)


# The command line


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        ("conv3d", 2, "there is no op 'conv3d'; did you mean conv2d?"),
        ("zzz", 2, "expected one of add, argmax"),
        ("relu --rung fast", 2, "relu has no rung 'fast'; expected one of none"),
        ("conv2d --rung hoper", 2, "conv2d has no rung 'hoper'; expected one of bf16"),
        ("conv2d --rung hopper --shape 1,8,8,64 --counts", 0, "conv2d_hopper_backward_weight"),
        ("relu --shape 1,2,3", 2, "four numbers, N,H,W,C"),
        ("relu --shape 1,2,3,0", 2, "expected positive sizes"),
        ("--model unet", 2, "--model unet: expected one of segnet, segnet-basic"),
        ("--decoder unet --counts", 2, "--decoder unet: expected one of indices"),
        ("--size 16", 2, "at least 32"),
        ("--arch sm_70 --counts", 2, "--arch sm_70: expected one of all, sm_75"),
        ("--counts --trace t.json", 2, "--counts does not take"),
        ("max_unpool --device numpy --shape 1,4,4,1 --passes 1 --roofline r.png", 2, "choose another op"),
        ("conv2d --kernel 2 --shape 1,4,4,1 --counts", 0, "conv2d_forward_tiled"),
    ],
)
def test_what_a_user_may_get_wrong(segnet, quick, monkeypatch, tmp_path, arguments, code, part):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", SimpleNamespace())  # nothing here gets as far as a picture
    monkeypatch.chdir(tmp_path)
    finished = segnet("profile", *arguments.split())
    assert finished.code == code, finished.err
    assert part in finished.err + finished.out
    assert "Traceback" not in finished.err
    assert not list(Path().iterdir())


def test_counting_needs_no_compiler_and_no_gpu(segnet, monkeypatch):
    from segnet_scratch.runtime import host

    monkeypatch.setattr(host, "find_compiler", lambda: pytest.fail("no compiler is needed"))
    monkeypatch.setattr(kernels, "kernel_figures", lambda *_: ([], ""))
    monkeypatch.setattr(measure, "kernel_figures", lambda *_: ([], ""))
    finished = segnet("profile", "--counts", "--width", "0.0625", "--batch", "1", "--size", "64")
    assert finished.code == 0
    assert "counted, not computed" in finished.out
    memory = r"[\d,]+ parameters, weights, momenta and batch [\d.]+ MB, kept for backward [\d.]+ MB, peak"
    assert re.search(memory, finished.out)
