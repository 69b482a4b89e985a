"""One thread is not to notice what another does with the same program: recording, observing, sampling, devices."""

import ast
import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from support.evaluation import segment

import segnet_scratch
from segnet_scratch.inference import Inference
from segnet_scratch.nn import autograd
from segnet_scratch.nn.autograd import no_grad, tensor
from segnet_scratch.nn.functions import cross_entropy, relu
from segnet_scratch.runtime import devices, observe
from segnet_scratch.segnet import SegNet

SIZE = 32, 32
PACKAGE = Path(segnet_scratch.__file__).parent


def picture(seed):
    return np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def network(**options):
    return SegNet(classes=3, width=0.0625, device="numpy", **options)


def elsewhere(body):
    """Runs `body` in another thread, to its end."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(body).result()


def test_one_thread_trains_while_another_predicts():
    with no_grad():  # as in a server that predicts all the time
        assert elsewhere(lambda: relu(tensor(np.ones((1, 1, 1, 2)), "numpy", requires_grad=True)).requires_grad)
    inside, leave = threading.Event(), threading.Event()

    def predict():
        with no_grad():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=predict)
    thread.start()
    assert inside.wait(10)
    model = network().train()
    x, labels = np.random.default_rng(0).standard_normal((2, *SIZE, 3)).astype("f"), np.zeros((2, *SIZE), np.uint8)
    cross_entropy(model(x), labels).backward()
    with no_grad():
        leave.set()
        thread.join()
        assert not relu(tensor(np.ones((1, 1, 1, 2)), "numpy", requires_grad=True)).requires_grad
    assert autograd._recording.get()


def test_a_observer_is_told_of_its_own_thread_alone():
    class Names(observe.Observer):
        def __init__(self):
            self.seen = []

        def op(self, op, run):
            self.seen.append(op.name)
            run()

    def compute():
        with observe.scope("elsewhere"):
            relu(tensor(np.ones((1, 1, 1, 2)), "numpy"))

    observer = Names()
    with observe.observe(observer), observe.scope("here"):
        elsewhere(compute)
        assert observer.seen == []
        assert observe.current_scope() == "here"
        compute()
        assert observer.seen == ["relu_forward"]


def test_several_threads_sample_from_one_network():
    model, inference = network(dropout=True).eval(), Inference(samples=3)
    images = [picture(seed) for seed in range(6)]
    alone = [segment(model, image, SIZE, inference, with_logits=True).logits for image in images]
    plain = segment(model, images[0], SIZE, with_logits=True).logits
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(segment, model, image, SIZE, inference, True) for image in images]
        between = [pool.submit(segment, model, images[0], SIZE, None, True) for _ in images]
    for expected, job in zip(alone, jobs, strict=True):
        np.testing.assert_array_equal(job.result().logits, expected)
    for job in between:  # dropout that another thread wants is none of theirs
        np.testing.assert_array_equal(job.result().logits, plain)


def test_threads_that_ask_first_get_one_device(monkeypatch):
    made, together = [], threading.Barrier(4, timeout=60)

    class Slow(devices.NumpyDevice):
        def __init__(self):
            made.append(self)
            threading.Event().wait(0.02)

    monkeypatch.setattr(devices, "NumpyDevice", Slow)
    monkeypatch.setattr(devices, "_shared_device", functools.cache(devices._shared_device.__wrapped__))
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(lambda: (together.wait(), devices.get_device("numpy"))[1]) for _ in range(4)]
    assert len({id(job.result()) for job in jobs}) == len(made) == 1


def test_no_function_rebinds_what_a_module_holds():
    """Such state is of all threads at once; of one thread it is a ContextVar. (A forked child makes its pool anew.)"""
    found = {
        path.relative_to(PACKAGE).name
        for path in PACKAGE.rglob("*.py")
        if any(isinstance(node, ast.Global) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    }
    assert found == {"workers.py"}
