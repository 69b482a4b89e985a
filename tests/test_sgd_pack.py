"""SGD that keeps copies of the weights, beyond what the templates over the op table check: several steps, copies
without a step, arrays that do not fit. Faults put into it: test_mutants.py.
"""

import numpy as np
import pytest
from support.kernels import DryDevice, needs_compiler

from segnet_scratch.errors import DeviceError, DTypeError, ShapeError
from segnet_scratch.ops.op import Buffers
from segnet_scratch.ops.optimiser.array_table import columns
from segnet_scratch.ops.optimiser.sgd_pack import TILE, SgdPackStep
from segnet_scratch.runtime.devices import CudaDevice, get_device
from segnet_scratch.runtime.precision import BFLOAT16

F32 = np.dtype(np.float32)
RATE, DECAY, MOMENTUM, UNTOUCHED = 2.0, 0.1, 0.9, 7.0
# Shapes of parameters, each with the outputs of its copies; None for a vector, which has none.
PARAMETERS = [
    ((21, 3, 3, 64), 24),  # the classifier
    ((21,), None),
    ((32, 3, 3, 32), 32),  # without padding
    ((33, 1, 1, 31), 40),  # one off a tile
    ((4, 7, 7, 3), 8),  # SegNet-Basic's kernel
    ((1024,), None),
    ((1025,), None),
]
each_device = pytest.mark.parametrize("device", ["numpy", "host"])
each_storage = pytest.mark.parametrize("storage", [F32, BFLOAT16], ids=str)
PLANES = {F32: 3, BFLOAT16: 1}  # of a copy, beside flipped ones of this type


class Step:
    """A step over these parameters; what lies beyond a weight's outputs in its copies holds UNTOUCHED."""

    def __init__(self, device, storage, parameters=PARAMETERS):
        self.device, rng = get_device(device) if isinstance(device, str) else device, np.random.default_rng(0)
        upload = self.device.upload
        self.w = [upload(rng.standard_normal(shape).astype(F32)) for shape, _ in parameters]
        self.m = [upload(rng.standard_normal(shape).astype(F32)) for shape, _ in parameters]
        self.copies, self.flipped = [], []
        for shape, outputs in parameters:
            copy = flipped = None
            if outputs is not None:
                _, kh, kw, c = shape
                copy = upload(np.full((outputs, kh, kw, PLANES[storage] * c), UNTOUCHED, BFLOAT16))
                flipped = upload(np.full((c, kh, kw, outputs), UNTOUCHED, storage))
            self.copies.append(copy)
            self.flipped.append(flipped)
        self.moved = columns(parameter=self.w, momentum=self.m, copy=self.copies, flipped=self.flipped)
        self.plan = [s for s, _ in parameters], [RATE] * len(parameters), [DECAY] * len(parameters), MOMENTUM
        of_copies = ([getattr(a, "shape", None) for a in arrays] for arrays in (self.copies, self.flipped))
        self.plan = *self.plan, *of_copies, storage, PLANES[storage]
        self.op, self.copy = SgdPackStep(*self.plan), SgdPackStep(*self.plan, update=False)

    def step(self, gradients, lr, scale):
        self.op.run(self.device, Buffers(**self.moved, **columns(gradient=gradients), lr=lr, scale=scale))

    def refresh(self):
        self.copy.run(
            self.device,
            Buffers(**self.moved, lr=self.device.zeros((1,), np.float64), scale=self.device.zeros((1,), np.float64)),
        )

    def gradients(self, seed):
        rng = np.random.default_rng(seed)
        return [self.device.upload(rng.standard_normal(w.shape).astype(F32)) for w in self.w]

    def assert_copies_are_those_of_the_weights(self):
        for index, (w, copy, flipped) in enumerate(zip(self.w, self.copies, self.flipped, strict=True)):
            if copy is None:
                continue
            o, kh, kw, c = w.shape
            left = w
            for plane in np.split(copy[:o], copy.shape[3] // c, axis=3):
                np.testing.assert_array_equal(plane, left.astype(BFLOAT16), err_msg=f"copy {index}")
                left = left - plane.astype(F32)
            assert copy.shape[3] == c or not left.any(), "three planes are all of a float32"
            for y in range(kh):
                for x in range(kw):
                    turned = flipped[:, kh - 1 - y, kw - 1 - x]
                    np.testing.assert_array_equal(turned[:, :o].T, w[:, y, x].astype(flipped.dtype), err_msg=f"{index}")
            assert (copy[o:] == UNTOUCHED).all()
            assert (flipped[..., o:] == UNTOUCHED).all()


@each_device
@each_storage
def test_steps_are_those_of_the_formula_and_copies_follow(device, storage):
    s = Step(device, storage)
    w, m = ([a.astype(np.float64) for a in arrays] for arrays in (s.w, s.m))
    numbers = {name: s.device.upload(np.zeros(1)) for name in ("lr", "scale")}
    for seed, (lr, scale) in enumerate(((0.1, 1.0), (0.03, 0.5), (0.01, 0.25))):
        # Written into arrays that stay where they are, as between launches of a captured graph.
        s.device.write(numbers["lr"], np.array([lr]))
        s.device.write(numbers["scale"], np.array([scale]))
        gradients = s.gradients(seed)
        s.step(gradients, **numbers)
        for i, g in enumerate(gradients):
            m[i] = MOMENTUM * m[i] + scale * g.astype(np.float64) + DECAY * w[i]
            w[i] = w[i] - RATE * lr * m[i]
            np.testing.assert_allclose(s.m[i], m[i], rtol=1e-5, atol=1e-5, err_msg=f"momentum {i}")
            np.testing.assert_allclose(s.w[i], w[i], rtol=1e-5, atol=1e-5, err_msg=f"parameter {i}")
        s.assert_copies_are_those_of_the_weights()


@each_device
@each_storage
def test_refresh_writes_copies_and_nothing_else(device, storage):
    s = Step(device, storage)
    before = [[a.copy() for a in arrays] for arrays in (s.w, s.m)]
    s.refresh()
    s.assert_copies_are_those_of_the_weights()
    for arrays, kept in zip((s.w, s.m), before, strict=True):
        assert all(a.tobytes() == b.tobytes() for a, b in zip(arrays, kept, strict=True))
    # As after a checkpoint has been loaded.
    for w in s.w:
        s.device.write(w, np.random.default_rng(1).standard_normal(w.shape).astype(F32))
    s.refresh()
    s.assert_copies_are_those_of_the_weights()


@needs_compiler
def test_a_graph_of_steps_stays_whole_after_a_refresh(cupy):
    """The first step, op by op, made the table of addresses that the graph reads."""
    device = CudaDevice()
    s, host = (Step(where, F32, [((33, 1, 1, 31), 40), ((21,), None)]) for where in (device, "host"))
    lr, scale = (np.full(1, value) for value in (0.1, 1.0))
    for step in (s, host):
        step.numbers = [step.device.upload(number) for number in (lr, scale)]
        step.held = step.gradients(0)
    s.step(s.held, *s.numbers)
    replay = device.capture(lambda: s.step(s.held, *s.numbers))
    for again in (replay, s.refresh, replay):
        again()
    for _ in range(3):
        host.step(host.held, *host.numbers)
    for ours, theirs in zip(s.w, host.w, strict=True):
        np.testing.assert_array_equal(device.download(ours), theirs)


def test_a_parameter_may_have_either_copy():
    s = Step("host", BFLOAT16, [((5, 3, 3, 8), 8)] * 2)
    *plan, copies, flipped, storage, planes = s.plan
    s.copy = SgdPackStep(*plan, [copies[0], None], [None, flipped[1]], storage, planes, update=False)
    s.moved = columns(parameter=s.w, copy=[s.copies[0]], flipped=[None, s.flipped[1]])
    s.refresh()
    assert (s.copies[1] == UNTOUCHED).all()
    assert (s.flipped[0] == UNTOUCHED).all()
    np.testing.assert_array_equal(s.copies[0][:5], s.w[0].astype(BFLOAT16))
    np.testing.assert_array_equal(s.flipped[1][:, 0, 2, :5].T, s.w[1][:, 2, 0].astype(BFLOAT16))


@pytest.mark.parametrize(
    ("shape", "blocks"),
    [
        ((TILE * TILE,), 1),  # as full as a tile of a weight
        ((64,), 1),
        ((48,), 1),
        ((21,), 1),
        ((64, 3, 3, 64), 36),
        ((33, 3, 3, 31), 18),
        ((64, 3, 3, 3), 18),
    ],
    ids=str,
)
def test_blocks_of_a_parameter(shape, blocks):
    recorder = DryDevice()
    Step(recorder, F32, [(shape, None)]).refresh()
    (launched,) = recorder.launches
    assert (launched.kernel.name, launched.grid[0], launched.block[:2]) == ("sgd_pack_step", blocks, (32, 8))


WEIGHT = (5, 3, 3, 4)
GOOD = {"copies": [(8, 3, 3, 4)], "flipped": [(4, 3, 3, 8)]}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"copies": []}, ShapeError, "0 of copy for 1 parameters"),
        ({"flipped": [None, None]}, ShapeError, "2 of flipped for 1 parameters"),
        ({"copies": [(4, 3, 3, 4)]}, ShapeError, r"copy 0 has shape \(4, 3, 3, 4\); expected \(5, 3, 3, 4\)"),
        ({"planes": 2}, ShapeError, r"copy 0 has shape \(8, 3, 3, 4\); expected \(8, 3, 3, 8\)"),
        ({"copies": [(8, 36)]}, ShapeError, r"copy 0 has shape \(8, 36\)"),
        ({"flipped": [(4, 3, 3, 5)]}, ShapeError, r"flipped 0 has shape \(4, 3, 3, 5\); expected \(4, 3, 3, 8\)"),
        ({"flipped": [(8, 3, 3, 4)]}, ShapeError, r"flipped 0 .* for a weight \(5, 3, 3, 4\)"),
        ({"parameter": (5,)}, ShapeError, r"parameter 0 has shape \(5,\); only a weight"),
        ({"storage": np.float64}, DTypeError, "copies of element type float64; expected float32 or bfloat16"),
        ({"dtype": np.float64}, DTypeError, "parameters have element type float64; expected float32"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_does_not_fit_is_refused_by_name(change, error, message):
    options = {"parameter": WEIGHT, "storage": F32, "planes": 1, "dtype": F32, **GOOD, **change}
    plan = [options["parameter"]], [1.0], [0.0], 0.9, options["copies"], options["flipped"]
    with pytest.raises(error, match=message):
        SgdPackStep(*plan, np.dtype(options["storage"]), options["planes"], dtype=options["dtype"])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a: a.astype(BFLOAT16), DTypeError, "flipped0 has element type bfloat16, expected float32"),
        (lambda a: np.repeat(a, 2, -1)[..., ::2], ShapeError, "flipped0 is a view .* C-contiguous"),
        (memoryview, DeviceError, "flipped0 is a memoryview, no array of the"),
        (lambda a: a[:3], ShapeError, r"flipped0 has shape \(3, 3, 3, 8\), expected \(4, 3, 3, 8\)"),
    ],
    ids=["type", "view", "library", "shape"],
)
@each_device
def test_an_array_unlike_the_plan_is_refused_by_name(device, change, error, message):
    s = Step(device, F32, [(WEIGHT, 8)])
    s.moved["flipped0"] = change(s.moved["flipped0"])
    with pytest.raises(error, match=message):
        s.refresh()
    with pytest.raises(error, match=message):
        s.step(s.gradients(0), s.device.zeros((1,), np.float64), s.device.zeros((1,), np.float64))
