"""Gradients between GPUs, on the stand-in for CuPy with one for NCCL: order, streams, buffers, counts, graphs."""

import numpy as np
import pytest
from support.fake_nccl import Mirrors
from support.fake_streams import Race
from support.kernels import needs_compiler

from segnet_scratch.config import Config
from segnet_scratch.errors import MissingLibraryError
from segnet_scratch.parallel import communicator
from segnet_scratch.parallel.mpi import HostCollectives, MpiCommunicator, NcclCollectives
from segnet_scratch.runtime.devices import CudaDevice
from segnet_scratch.runtime.precision import BFLOAT16
from segnet_scratch.segnet import SegNetBasic
from segnet_scratch.step import TrainingStep

CLASSES, SHAPE = 5, (2, 32, 32)
pytestmark = needs_compiler
ENGINES = [("layers", "float32", False), ("layers", "float32", True), ("fused", "bf16", False)]


def steps(engine, precision, ranks=None, sync_bn=False, count=3, rounded=False, **options):
    """The losses and norms of so many steps, the last of them replays of a graph; and the parameters then."""
    rng, device = np.random.default_rng(0), CudaDevice()
    model = SegNetBasic(CLASSES, 0.125, device, seed=1)
    if ranks is not None:
        options["ranks"] = ranks.on(device)
        if sync_bn:
            model.synchronise_batch_norm(ranks)
    settings = Config(clip_norm=1.0, gradient_sum="bf16" if rounded else "float32")
    step = TrainingStep(model, engine, precision, settings, np.arange(1, 6.0), **options)
    found = []
    for _ in range(count):
        labels = rng.integers(0, CLASSES, SHAPE).astype(np.uint8)
        labels[rng.random(SHAPE) < 0.3] = 255
        step(rng.standard_normal((*SHAPE, 3)).astype(np.float32), labels, 0.1)
        found.append(step.read().get())
    return found, {name: p.numpy() for name, p in model.named_parameters().items()}


@pytest.fixture
def small_buckets(monkeypatch):
    """Several buckets for a network of a few kilobytes, the last of them not full."""
    monkeypatch.setattr(communicator, "BUCKET", 30_000)


@pytest.mark.usefixtures("small_buckets")
@pytest.mark.parametrize(("engine", "precision", "sync_bn"), ENGINES)
def test_ranks_with_the_same_images_make_the_step_of_one(cupy, engine, precision, sync_bn):
    """Bit for bit: shares of a half, and sums of two. Eager, recorded, and replayed."""
    expected, parameters = steps(engine, precision)
    nccl, ranks = cupy.cuda.nccl, Mirrors(2)
    found, got = steps(engine, precision, ranks, sync_bn)
    assert found == expected
    for name, values in parameters.items():
        np.testing.assert_array_equal(got[name], values, err_msg=name)
    assert nccl.made == [(2, 0)]
    assert ranks.exchanged == 3, "one value a step: the normaliser"
    calls = nccl.calls[: len(nccl.calls) // 2]  # of the step that ran; the others are those of the recording
    assert [(call.what, call.count) for call in calls] == [(c.what, c.count) for c in nccl.calls[len(calls) :]]
    sums = [call for call in calls if call.what == "allReduce"]
    assert sorted(call.count for call in sums) == sorted([1, *(values.size for values in parameters.values())])
    assert {(call.stream != 0, call.in_group) for call in sums} == {(True, True)}, "beside the work, buckets at once"
    assert sums[-1].count == 1, "the loss, at last"
    launches = [call.launches for call in sums]
    assert launches[0] < launches[-1] - 10, "the first bucket goes while backward goes on"
    assert len(set(launches)) > 1
    norms = len([name for name in parameters if name.endswith("bn.weight")])
    gathers = [call for call in calls if call.what == "allGather"]
    assert [(call.stream, call.in_group) for call in gathers] == [(0, False)] * (2 * norms * sync_bn)


@pytest.mark.usefixtures("small_buckets")
def test_the_update_waits_for_the_sums(cupy, monkeypatch):
    monkeypatch.setattr(CudaDevice, "join", lambda self: None)
    with pytest.raises(Race, match="may still be using"):
        steps("layers", "float32", Mirrors(2), count=1)


def test_a_gradient_that_is_still_read_is_not_summed(cupy, monkeypatch):
    """Those of batch norm, which the fused engine's backward reads after they are made."""
    from segnet_scratch.engine.program import Program

    def first_touch(self, array):
        return next(number for number, step in enumerate(self.steps) if array in step.arrays.values())

    monkeypatch.setattr(communicator, "BUCKET", 1)
    monkeypatch.setattr(Program, "last_touch", first_touch)
    with pytest.raises(Race, match="may still be using"):
        steps("fused", "bf16", Mirrors(2), count=1)


def test_rounded_gradients(cupy):
    """Of two mirrors the sum is the rounded gradient itself, in bfloat16's bytes; the loss is not rounded."""
    (loss, norm), *_ = steps("layers", "float32", count=1)[0]
    (got, rounded), *_ = steps("layers", "float32", Mirrors(2), count=1, rounded=True)[0]
    assert got == loss
    assert rounded != norm
    assert rounded == pytest.approx(norm, rel=2**-8)
    assert {call.dtype for call in cupy.cuda.nccl.calls if call.count > 1} == {BFLOAT16}


class Comm:
    """mpi4py's, of ranks that all give the same answer, but for what a test says."""

    def __init__(self, answers=()):
        self.answers = list(answers)

    def Dup(self):
        return self

    def Get_rank(self):
        return 0

    def Get_size(self):
        return 2

    def allgather(self, value):
        return [value, self.answers.pop(0) if self.answers else value]

    def bcast(self, value):
        return value


def test_nccl_has_a_gpu_for_each_rank(cupy):
    """Where two share one their arrays go by way of the CPU, and a step is no graph."""
    device = CudaDevice()
    apart = MpiCommunicator(Comm([("here", 2), ("here", "0000:01:00.0")]), "here").on(device)
    assert isinstance(apart.collectives, NcclCollectives)
    shared = MpiCommunicator(Comm(), "here").on(device)
    assert isinstance(shared.collectives, HostCollectives)
    assert not shared.collectives.capturable
    for hide in (lambda: setattr(cupy.cuda.nccl, "available", False), lambda: delattr(cupy.cuda, "nccl")):
        hide()
        with pytest.raises(MissingLibraryError, match=r"CuPy finds no NCCL; pip install 'segnet_scratch\[nccl13\]'"):
            MpiCommunicator(Comm([("there", 2), ("there", "0000:00:00.0")]), "here").on(device)
