"""The fast NumPy versions of ops and the threads that share their work.

Their results are those of the op table's references (test_ops.py), here in chunks so small that every array is cut
into many: the borders between chunks are where such code errs.
"""

import ast
import contextlib
import math
import multiprocessing
import threading
import time

import numpy as np
import pytest
import threadpoolctl
from support.commands import process

from segnet_scratch.errors import ConfigError
from segnet_scratch.lab.proof.compare import examine, same_bits
from segnet_scratch.lab.proof.table import ROWS, row_named
from segnet_scratch.nn.autograd import tensor
from segnet_scratch.nn.functions import cross_entropy
from segnet_scratch.ops.convolution import fast as conv2d
from segnet_scratch.ops.convolution import winograd
from segnet_scratch.ops.elementwise import fast as activation
from segnet_scratch.ops.loss import fast as loss
from segnet_scratch.ops.normalisation import fast as batch_norm
from segnet_scratch.ops.normalisation.batch_norm import BatchNormTrainingForward
from segnet_scratch.ops.op import Op, spec_of
from segnet_scratch.ops.pooling import fast as pooling
from segnet_scratch.ops.resampling import fast as resampling
from segnet_scratch.runtime import workers
from segnet_scratch.runtime.devices import get_device
from segnet_scratch.segnet import SegNetBasic

# A row for each op that has a fast NumPy; Hopper's take that of the ops that they stand for.
FAST = {row.op: row.name for row in reversed(ROWS) if row.op.numpy is not Op.numpy and "hopper" not in row.name}


@pytest.fixture
def tiny_chunks(monkeypatch):
    for module in (activation, batch_norm, loss, pooling, resampling):
        monkeypatch.setattr(module, "CHUNK_VALUES", 24)
    monkeypatch.setattr(conv2d, "_PATCH_BYTES", 3000)
    monkeypatch.setattr(conv2d, "_BIAS_PIXELS", 5)
    monkeypatch.setattr(winograd, "_BYTES_TOGETHER", 1 << 16)
    monkeypatch.setattr(winograd, "_TILES_ALONE", 3)
    monkeypatch.setattr(winograd, "_FILTER_BLOCK", 5)


@pytest.fixture(params=["much_to_multiply", "little_to_multiply"])
def way(request, monkeypatch):
    """Runs a test with Winograd wherever it can go, as for large maps, and without it, as for small ones."""
    monkeypatch.setattr(winograd, "_LEAST_PRODUCTS", 0 if request.param == "much_to_multiply" else 1 << 62)


@pytest.mark.usefixtures("tiny_chunks")
@pytest.mark.parametrize("name", FAST.values())
def test_in_chunks_of_a_few_values(name, monkeypatch):
    row, problems = row_named(name), []
    cases = [
        case for case in row.cases() if sum(s.size for s in row.plan(case, row.elements[0]).inputs.values()) < 30_000
    ]
    assert len(cases) > 3
    for least in (0, 1 << 62) if "conv2d" in name else (0,):
        monkeypatch.setattr(winograd, "_LEAST_PRODUCTS", least)
        for index, case in enumerate(cases + [row.random_case(row.generator(9, k)) for k in range(4)]):
            for integers in (False, True) if row.exact else (False,):
                for dtype in row.elements:
                    generator = row.generator(8, index)
                    problems += examine(row, case, get_device("numpy"), generator, dtype, integers).defects
    assert problems == []


def test_convolution_carries_nan_to_every_output_that_sees_it(monkeypatch):
    monkeypatch.setattr(winograd, "_LEAST_PRODUCTS", 0)
    rng = np.random.default_rng(3)
    for channels, reach in ((3, 1), (32, 2)):  # Winograd may carry it one pixel further, within a tile
        x = rng.standard_normal((1, 9, 9, channels)).astype(np.float32)
        x[0, 4, 4, 1] = np.nan
        weight = rng.standard_normal((32, 3, 3, channels)).astype(np.float32)
        y = np.full((1, 9, 9, 32), np.nan, np.float32)
        conv2d.forward(x, weight, None, y, 1, 1)
        assert np.isnan(y[0, 3:6, 3:6]).all()
        y[0, 4 - reach : 5 + reach, 4 - reach : 5 + reach] = 0
        assert np.isfinite(y).all()


@pytest.mark.parametrize(
    ("kernel", "stride", "channels_in", "y", "suits"),
    [
        ((3, 3), 1, 64, (4, 224, 224, 64), True),
        ((3, 3), 1, 512, (4, 14, 14, 512), True),
        ((3, 3), 1, 128, (2, 32, 32, 128), True),
        ((3, 3), 1, 128, (2, 32, 30, 128), False),  # 480 tiles
        ((3, 3), 1, 128, (2, 4, 4, 128), False),
        ((3, 3), 1, 31, (4, 224, 224, 64), False),
        ((3, 3), 2, 64, (4, 224, 224, 64), False),
        ((7, 7), 1, 64, (4, 224, 224, 64), False),
    ],
)
def test_winograd_is_taken_where_it_gains(kernel, stride, channels_in, y, suits):
    assert winograd.suits(kernel, stride, channels_in, y) is suits


def test_batch_norm_of_infinity_is_nan_without_a_warning():
    x = np.ones((1, 2, 2, 2), np.float32)
    x[0, 0, 0, 0] = np.inf
    one, zero = np.ones(2, np.float32), np.zeros(2, np.float32)
    op, device = BatchNormTrainingForward.plan(spec_of(x)), get_device("numpy")
    out = op(device, x=x, weight=one, bias=one, running_mean=zero.copy(), running_var=one.copy())
    back = op.gradient()[0](device, x=x, dy=x, mean=out.mean, inv_std=out.inv_std, weight=one)
    assert np.isnan(out.y[..., 0]).all()
    assert np.isnan(back.dx[..., 0]).all()
    assert (out.y[..., 1] == 1).all()


def test_cross_entropy_of_extreme_logits():
    logits = np.array([[3e38, -3e38, 0], [-np.inf, 0, 0], [np.nan, np.inf, 0], [-200, -200, -200]], np.float32)
    z = tensor(logits, "numpy", requires_grad=True)
    total = cross_entropy(z, np.array([0, 1, 255, 2], np.uint8), reduction="sum")
    total.backward()
    assert total.item() == pytest.approx(math.log(2) + math.log(3), rel=1e-6)
    third = 1 / 3
    expected = [[0, 0, 0], [0, -0.5, 0.5], [0, 0, 0], [third, third, third - 1]]
    np.testing.assert_allclose(z.grad, expected, rtol=0, atol=1e-6)


# --- workers -----------------------------------------------------------------------------------------------------


def one_of_everything():
    """What a training pass leaves, on maps large enough for several chunks of every function."""
    rng = np.random.default_rng(8)
    model = SegNetBasic(20, 0.625, "numpy", seed=1)  # 40 channels
    model.set_random_state(0, 0)
    loss = cross_entropy(model(rng.standard_normal((1, 72, 70, 3), np.float32)), rng.integers(0, 20, (1, 72, 70)))
    loss.backward()
    return [loss.numpy(), *(p.grad for p in model.parameters()), *(b.data for b in model.named_buffers().values())]


def assert_all_same_bits(actual, expected):
    assert all(same_bits(one, other) for one, other in zip(actual, expected, strict=True))


@pytest.mark.usefixtures("way")
def test_results_do_not_depend_on_the_number_of_workers(monkeypatch):
    monkeypatch.setattr(winograd, "_BYTES_TOGETHER", 1 << 20)
    monkeypatch.setenv("SEGNET_THREADS", "1")
    alone = one_of_everything()
    for array in alone:
        assert not np.isnan(array).any()
    for count in ("2", "3"):
        monkeypatch.setenv("SEGNET_THREADS", count)
        assert_all_same_bits(one_of_everything(), alone)


def test_calls_from_several_threads_do_not_disturb_each_other():
    alone = one_of_everything()
    results = {}
    threads = [threading.Thread(target=lambda k=k: results.update({k: one_of_everything()})) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in range(3):
        assert_all_same_bits(results[k], alone)


def test_calls_from_several_threads_take_turns():
    begun = threading.Event()
    other = threading.Thread(target=workers.parallel_for, args=(1, lambda index: begun.set()))
    with workers.single_threaded_blas():
        other.start()
        assert not begun.wait(0.2)
    other.join(30)
    assert begun.is_set()


def send_one_of_everything(connection):
    connection.send(one_of_everything())


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_child_forked_during_an_operation_works():
    alone = one_of_everything()
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=send_one_of_everything, args=(sender,))
    inside, may_leave = threading.Event(), threading.Event()

    def operation(index):
        inside.set()
        may_leave.wait(60)

    other = threading.Thread(target=workers.parallel_for, args=(1, operation))
    other.start()
    try:
        assert inside.wait(30)
        child.start()
        assert receiver.poll(30), "the child hangs"
        assert_all_same_bits(receiver.recv(), alone)
    finally:
        may_leave.set()
        other.join()
        child.kill()
        child.join()


def blas_threads():
    return {library["num_threads"] for library in threadpoolctl.threadpool_info() if library["user_api"] == "blas"}


def test_parallel_for_runs_each_index_once_with_one_blas_thread(monkeypatch):
    monkeypatch.setenv("SEGNET_THREADS", "3")
    before = blas_threads()
    seen, inside = [], []

    def body(index):
        seen.append(index)
        inside.append(blas_threads())

    workers.parallel_for(20, body)
    assert sorted(seen) == list(range(20))
    assert all(threads <= {1} for threads in inside)
    assert blas_threads() == before
    workers.parallel_for(0, body)
    assert len(seen) == 20


LATER = """
import sys
import threadpoolctl
from segnet_scratch.runtime import workers

def threads(index):
    found.append([i["num_threads"] for i in threadpoolctl.threadpool_info() if i["user_api"] == "blas"])

found = []
workers.parallel_for(1, threads)
assert "scipy.linalg" not in sys.modules
import scipy.linalg
workers.parallel_for(1, threads)
print(found)
"""


def test_a_blas_that_was_loaded_later_is_limited_too():
    finished = process(code=LATER, OPENBLAS_NUM_THREADS="2")
    assert finished.returncode == 0, finished.stderr
    before, after = ast.literal_eval(finished.stdout)
    assert len(after) >= len(before) >= 1
    assert set(before + after) == {1}


def test_parallel_for_uses_several_threads(monkeypatch):
    monkeypatch.setenv("SEGNET_THREADS", "3")
    together = threading.Barrier(3, timeout=60)
    workers.parallel_for(3, lambda index: together.wait())


def test_every_thread_limits_blas_itself(monkeypatch):
    # Where BLAS uses OpenMP, a limit holds for the thread that sets it.
    limited = set()

    class Recorder:
        def limited(self):
            limited.add(threading.get_ident())
            return contextlib.nullcontext()

    monkeypatch.setattr(workers, "_blas", Recorder())
    monkeypatch.setenv("SEGNET_THREADS", "3")
    together = threading.Barrier(3, timeout=60)
    working = set()

    def body(index):
        together.wait()
        working.add(threading.get_ident())

    workers.parallel_for(3, body)
    assert len(working) == 3
    assert limited == working


def test_parallel_for_nests_inline(monkeypatch):
    monkeypatch.setenv("SEGNET_THREADS", "2")
    seen = []

    def body(index):
        thread = threading.get_ident()
        workers.parallel_for(3, lambda inner: seen.append((index, inner, threading.get_ident() == thread)))

    workers.parallel_for(4, body)
    assert sorted(seen) == [(index, inner, True) for index in range(4) for inner in range(3)]


def test_parallel_for_raises_the_first_exception_and_recovers(monkeypatch):
    monkeypatch.setenv("SEGNET_THREADS", "2")
    before = blas_threads()
    begun = []
    together = threading.Barrier(2, timeout=60)

    def body(index):
        begun.append(index)
        if index < 2:
            together.wait()  # by now both threads are at work
        if index == 3:
            raise ValueError("index 3")
        time.sleep(0.001)

    with pytest.raises(ValueError, match="index 3"):
        workers.parallel_for(1000, body)
    assert len(begun) < 1000
    assert blas_threads() == before
    total = []
    workers.parallel_for(5, total.append)
    assert sorted(total) == list(range(5))


@pytest.mark.parametrize("text", ["0", "-1", "two", "", "1.5"])
def test_worker_count_refuses_nonsense(text, monkeypatch):
    monkeypatch.setenv("SEGNET_THREADS", text)
    with pytest.raises(ConfigError, match="SEGNET_THREADS"):
        workers.worker_count()


def test_worker_count_defaults_to_the_usable_cores(monkeypatch):
    monkeypatch.delenv("SEGNET_THREADS", raising=False)
    assert workers.worker_count() >= 1
