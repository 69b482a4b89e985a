"""The training step: what a failed one leaves behind, on every engine and device, and what a GPU is waited for."""

import json

import numpy as np
import pytest
from support.fake_cupy import FakeCupy
from support.kernels import needs_compiler

from segnet_scratch.config import Config
from segnet_scratch.errors import ConfigError, DataError, DTypeError, ShapeError, TrainingError
from segnet_scratch.ops.convolution.conv2d import Conv2dBackwardBias
from segnet_scratch.run_folder import RunFolder
from segnet_scratch.runtime.devices import CudaDevice, HostDevice
from segnet_scratch.segnet import SegNetBasic
from segnet_scratch.step import TrainingStep, resolve
from segnet_scratch.train import AHEAD, Listener, Trainer

CLASSES = 5
ENGINES = [("layers", "float32"), ("fused", "float32"), ("fused", "bf16")]


def training(engine, precision, device):
    return TrainingStep(SegNetBasic(CLASSES, 0.125, device, seed=1), engine, precision, Config(clip_norm=1.0))


def batch(seed, poison=None):
    rng = np.random.default_rng(seed)
    images, labels = rng.standard_normal((2, 17, 24, 3)).astype(np.float32), rng.integers(0, CLASSES, (2, 17, 24))
    if poison is not None:
        images[0, 3, 4, 1] = poison
    return images, labels.astype(np.uint8)


def state(step):
    """Everything that a later step depends on."""
    held = {name: step.device.download(array) for name, array in step.optimiser._moved.items()}
    momenta = {f"momentum of {name}": array for name, array in step.optimiser.state_dict().items()}
    return {**step.model.state_dict(), **momenta, **held}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name].astype(np.float64), b[name].astype(np.float64), err_msg=name)


@pytest.mark.parametrize(("poison", "device"), [(np.nan, "numpy"), (np.inf, "numpy"), (np.nan, "host")])
@pytest.mark.parametrize(("engine", "precision"), ENGINES)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_step_that_is_not_finite_leaves_no_trace_and_neither_do_those_after_it(device, engine, precision, poison):
    step = training(engine, precision, device)
    step(*batch(0), 0.1)
    before = {name: array.copy() for name, array in state(step).items()}
    step(*batch(1, poison), 0.1)
    assert not np.isfinite(step.read().get()[1])
    assert_same(state(step), before)
    step(*batch(2), 0.1)
    assert np.isfinite(step.read().get()).all()
    assert_same(state(step), before)
    step.optimiser.refresh()
    step(*batch(2), 0.1)
    other = training(engine, precision, device)
    for seed in (0, 2):
        other(*batch(seed), 0.1)
    assert_same(state(step), state(other))


@pytest.mark.parametrize("way", ["run", "run_eagerly", "gradients"])
@pytest.mark.parametrize(("engine", "precision"), ENGINES[:2])
def test_a_step_that_fails_halfway_leaves_no_trace(engine, precision, way, monkeypatch):
    step = training(engine, precision, "numpy")
    step(*batch(0), 0.1)
    before = {name: array.copy() for name, array in state(step).items()}

    def no_memory(*arguments):
        raise MemoryError

    monkeypatch.setattr(Conv2dBackwardBias, "run", no_memory)  # of the classifier, after the whole forward pass
    step.write(*batch(1), 0.1)
    ways = {"run": step.run, "run_eagerly": step.run_eagerly, "gradients": lambda: step.gradients(*batch(1))}
    with pytest.raises(MemoryError):
        ways[way]()
    assert_same(state(step), before)


@pytest.mark.parametrize(("engine", "precision"), ENGINES[:2])
def test_eager_and_replayed_steps_are_the_same(engine, precision):
    eager, run = (training(engine, precision, "host") for _ in range(2))
    phases = []
    for seed in (0, 1):
        eager.write(*batch(seed), 0.1)
        eager.run_eagerly(phases.append)
        run(*batch(seed), 0.1)
    assert phases == ["forward", "backward", "update"] * 2
    assert_same(state(eager), state(run))


@needs_compiler
@pytest.mark.usefixtures("multiply_adds")
def test_loss_and_gradients_are_those_of_the_step_whatever_came_between(cupy):
    """On a GPU later steps are replayed into arrays of the graph, and other steps leave theirs in the same place."""
    (cuda, ours), (host, expected) = ((where, []) for where in (CudaDevice(), HostDevice()))
    batches = [tuple(array[:, :8, :9] for array in batch(seed)) for seed in range(9)]
    for device, found in ((cuda, ours), (host, expected)):
        step = TrainingStep(SegNetBasic(CLASSES, 1 / 32, device, seed=1))
        bias = step.model.named_parameters()["classifier.bias"]
        for kind in ("run", "run", "run_eagerly", "run", "small", "small", "run", "gradients", "run"):
            images, labels = (array[:1] if kind == "small" else array for array in batches[len(found)])
            if kind == "gradients":
                step.gradients(images, labels)
            else:
                step.write(images, labels, 0.1)
                step.run_eagerly() if kind == "run_eagerly" else step.run()
            found.append((kind, *step.read().get(), *device.download(bias.grad)))
    assert ours == expected


def test_gradients_make_no_second_pass():
    """Its arrays would come beside those of the first one."""
    step = training("fused", "float32", "numpy")
    step(*batch(0), 0.1)
    planned = step._pass
    step.gradients(*batch(1))
    step(*batch(2), 0.1)
    assert step._pass is planned


def test_nothing_is_planned_for_a_batch_that_is_refused():
    step = training("fused", "float32", "numpy")
    images, labels = batch(0)
    with pytest.raises(DataError, match="label 77"):
        step(images, np.full_like(labels, 77), 0.1)
    with pytest.raises(DTypeError):
        step(images.astype(np.float64), labels, 0.1)
    assert step._passes == {}


def test_the_fused_engine_takes_no_parts():
    with pytest.raises(ConfigError, match="takes a batch whole, got 2 parts"):
        TrainingStep(SegNetBasic(CLASSES, 0.125, "numpy"), "fused", settings=Config(accumulate=2))


def test_a_batch_that_does_not_fit_is_refused():
    step = training("layers", "float32", "numpy")
    images, labels = batch(0)
    with pytest.raises(ShapeError, match=r"images \(2, 17, 24, 3\) and labels \(1, 17, 24\)"):
        step(images, labels[:1], 0.1)
    with pytest.raises(DTypeError, match=r"images of float64 .* expected float32"):
        step(images.astype(np.float64), labels, 0.1)


class TestAuto:
    @pytest.mark.parametrize(
        ("settings", "options", "expected"),
        [
            (("auto", "auto"), {}, ("fused", "bf16")),
            (("auto", "tf32"), {}, ("fused", "tf32")),
            (("auto", "float32"), {}, ("fused", "float32")),
            (("layers", "auto"), {}, ("layers", "float32")),
            (("auto", "auto"), {"dropout": True}, ("layers", "float32")),
            (("auto", "auto"), {"width": 0.1}, ("layers", "float32")),
            (("auto", "auto", 2), {}, ("layers", "float32")),
        ],
    )
    def test_on_a_gpu(self, dry_cupy, settings, options, expected):
        model = SegNetBasic(CLASSES, **{"width": 0.125, "device": CudaDevice()} | options)
        assert resolve(model, *settings) == expected

    def test_on_an_old_gpu(self, monkeypatch, tmp_path):
        FakeCupy("75", dry=True).install(monkeypatch, tmp_path)
        assert resolve(SegNetBasic(CLASSES, 0.125, CudaDevice()), "auto", "auto") == ("layers", "float32")

    @pytest.mark.parametrize("device", ["numpy", "host"])
    def test_on_a_cpu(self, device):
        model = SegNetBasic(CLASSES, 0.125, device)
        assert resolve(model, "auto", "auto") == ("layers", "float32")
        assert resolve(model, "fused", "auto") == ("fused", "float32")
        assert resolve(model, "auto", "bf16") == ("fused", "bf16")

    def test_a_resumed_run_keeps_what_it_began_with(self, sample, tmp_path):
        run(sample, tmp_path, "numpy", steps=1, engine="fused", precision="bf16")
        folder = RunFolder(tmp_path)
        for given in ([], ["engine=auto", "precision=auto"]):
            config = folder.resolve_config([], given, resume=True)
            assert (config.engine, config.precision) == ("fused", "bf16")
        (tmp_path / "recipe.toml").write_text(
            'engine = "auto"\n' + "".join(f"{k} = {v!r}\n" for k, v in SETTINGS.items())
        )
        config = folder.resolve_config([tmp_path / "recipe.toml"], ["steps=1"], resume=True)
        assert (config.engine, config.precision) == ("fused", "bf16")


SETTINGS = {"model": "segnet-basic", "width": 1 / 8, "size": 32, "batch": 2, "lr": 0.05, "workers": 0}


class Look(Listener):
    """Notes how many steps are open whenever one is settled, and may do something then."""

    def __init__(self, act=lambda trainer: None):
        self.open, self.act = [], act

    def stepped(self, trainer, loss, lr):
        self.open.append(len(trainer._pending))
        self.act(trainer)


def run(data, out, device, listener=None, **settings):
    trainer = Trainer(Config(**SETTINGS | settings), data, out, device)
    trainer.run(listener or Look())
    return trainer


class TestAheadOfTheHost:
    """On the stand-in for a GPU, where a result has come only when somebody waits for it."""

    @pytest.mark.usefixtures("multiply_adds")
    @pytest.mark.parametrize(("engine", "precision"), ENGINES[::2])
    def test_the_run_is_that_of_the_host_device(self, sample, tmp_path, cupy, engine, precision):
        settings = {"engine": engine, "precision": precision, "steps": 5, "validate_every": 5, "checkpoint_every": 4}
        look = Look()
        run(sample, tmp_path / "cuda", CudaDevice(), look, **settings)
        run(sample, tmp_path / "host", HostDevice(), **settings)
        assert 1 < max(look.open) <= AHEAD
        for name in ("metrics.jsonl", "last.safetensors"):
            assert (tmp_path / "cuda" / name).read_bytes() == (tmp_path / "host" / name).read_bytes()

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    def test_a_step_that_fails_is_named_though_others_have_followed(self, sample, tmp_path, cupy):
        def poison(trainer):
            if trainer.step == 1:
                bias = trainer.model.named_parameters()["decoder.2.1.bn.bias"].data
                trainer.model.device.write(bias, np.full(bias.shape, np.nan, np.float32))

        settings = {"engine": "layers", "precision": "float32", "steps": 30, "checkpoint_every": 1000}
        trainer = Trainer(Config(**SETTINGS | settings | {"validate_every": 1000}), sample, tmp_path, CudaDevice())
        with pytest.raises(TrainingError, match=r"loss is nan at step (\d+) .*first in: decoder\.2\.1\.bn\.bias"):
            trainer.run(Look(poison))
        rows = [json.loads(row) for row in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(1, trainer.step + 1))
        assert 1 < trainer.step <= AHEAD + 1
        assert len(trainer._pending) > 1
