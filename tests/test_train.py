"""Training: it learns, it logs, it stops and goes on with the same bits, and it keeps the last good state."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image
from support import FULL, real
from support.training import FILES, TINY, At, assert_same_run, losses, rows, start, steps, train

from segnet_scratch import weights
from segnet_scratch.config import Config, load_config
from segnet_scratch.data import Loader, VOCDataset, class_statistics, write_sample
from segnet_scratch.errors import CheckpointError, ConfigError, TrainingError
from segnet_scratch.evaluate import Evaluation
from segnet_scratch.metrics import scores
from segnet_scratch.optim import learning_rate
from segnet_scratch.run_folder import RunFolder
from segnet_scratch.train import Listener


class Crash(BaseException):
    pass


def crash():
    raise Crash


def interrupt():
    signal.raise_signal(signal.SIGINT)


# Learning


@pytest.mark.parametrize(("model", "count"), [("segnet", 24), ("segnet-basic", 40)])
def test_the_loss_falls(sample, tmp_path, model, count):
    _, finished = train(sample, tmp_path / "run", model=model, steps=count, schedule="poly", validate_every=count)
    assert finished
    found = losses(tmp_path / "run")
    assert np.mean(found[-5:]) < 0.85 * np.mean(found[:5])


def test_what_a_run_leaves(sample, tmp_path):
    out = tmp_path / "runs" / "a"  # folders on the way are made
    settings = {"steps": 6, "schedule": "poly", "warmup": 2, "validate_every": 3}
    trainer, finished = train(sample, out, **settings)
    assert finished
    assert trainer.step == trainer.total_steps == 6
    assert {path.name for path in out.iterdir()} == FILES
    assert load_config(out / "config.toml") == Config(**TINY | settings, engine="layers", precision="float32")
    found = rows(out)
    assert [row["step"] for row in found] == [1, 2, 3, 3, 4, 5, 6, 6]
    for row in found:
        assert set(row) == ({"step", "val_loss", "miou"} if "miou" in row else {"step", "loss", "lr"})
    poly = Config(lr=0.05, schedule="poly", warmup=2)
    assert [row["lr"] for row in found if "lr" in row] == [learning_rate(k, 6, poly) for k in range(6)]
    validations = {row["step"]: row["miou"] for row in found if "miou" in row}
    assert all(0 <= miou <= 1 for miou in validations.values())
    _, momenta, metadata = weights.read(out / "best.safetensors")
    assert metadata["step"] == max(validations, key=validations.get)
    assert metadata["miou"] == max(validations.values()) == trainer.best_miou
    assert not momenta
    assert weights.read(out / "last.safetensors")[2]["step"] == 6


def test_best_is_the_best_validation_and_not_the_last(sample, tmp_path, monkeypatch):
    judge_as(monkeypatch, 0.3, 0.5, 0.4, 0.5)
    trainer, _ = train(sample, tmp_path, steps=4, validate_every=1)
    assert trainer.best_miou == 0.5
    assert weights.read(tmp_path / "best.safetensors")[2]["step"] == 2
    assert weights.read(tmp_path / "last.safetensors")[2]["miou"] == 0.5


def test_an_epoch_is_validated_and_the_last_step_too(sample, tmp_path):
    train(sample, tmp_path / "run", epochs=2, batch=3)  # 8 images make 2 batches of 3
    assert [row["step"] for row in rows(tmp_path / "run") if "miou" in row] == [2, 4]
    train(sample, tmp_path / "other", steps=5)
    assert [row["step"] for row in rows(tmp_path / "other") if "miou" in row] == [4, 5]


def test_a_batch_larger_than_the_data_set_takes_what_there_is(sample, tmp_path):
    trainer, _ = train(sample, tmp_path / "run", batch=20, epochs=2)
    assert trainer.step == 2


def test_the_same_seed_gives_the_same_run_and_another_seed_another(sample, tmp_path):
    for name, seed, workers in (("a", 0, 0), ("b", 0, 3), ("c", 1, 0)):
        train(sample, tmp_path / name, steps=3, seed=seed, workers=workers)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


def test_every_step_has_dropout_masks_of_its_own(sample, tmp_path):
    states = []

    class Watch(Listener):
        def stepped(self, trainer, loss, lr):
            states.append(trainer.model.random_state.tolist())

    train(sample, tmp_path / "run", Watch(), steps=3, dropout=True, seed=7)
    assert states == [[7, 0], [7, 1], [7, 2]]


def test_class_weights_weigh_and_must_be_one_a_class(sample, tmp_path):
    train(sample, tmp_path / "plain", steps=1)
    train(sample, tmp_path / "weighted", steps=1, class_weights=[1, 0, 0, 0, 0, 0])
    assert losses(tmp_path / "plain") != losses(tmp_path / "weighted")
    with pytest.raises(ConfigError, match="class_weights: 2 numbers for 6 classes"):
        start(sample, tmp_path / "x", class_weights=[1, 2])
    assert not (tmp_path / "x").exists()


def test_initial_weights_come_from_a_checkpoint_but_not_on_resume(sample, tmp_path):
    first, _ = train(sample, tmp_path / "first", steps=2)
    second = start(sample, tmp_path / "second", steps=1, init=str(tmp_path / "first" / "best.safetensors"))
    assert "first" in second.initialised
    for name, array in second.model.state_dict().items():
        np.testing.assert_array_equal(array, first.model.state_dict()[name])
    second.run()
    again = start(sample, tmp_path / "second", steps=1, init=str(tmp_path / "none.safetensors"), resume=True)
    assert again.step == 1


def test_a_validation_split_of_void_alone_has_no_best(sample, tmp_path):
    shutil.copytree(sample, tmp_path / "data")
    dataset = VOCDataset(tmp_path / "data", "val")
    for index in range(len(dataset)):
        Image.fromarray(np.full((48, 64), 255, np.uint8)).save(dataset.mask_path(index))
    trainer, finished = train(tmp_path / "data", tmp_path / "run", steps=2, validate_every=1)
    assert finished
    assert trainer.best_miou is None
    assert [row["miou"] for row in rows(tmp_path / "run") if "miou" in row] == [None, None]
    assert not (tmp_path / "run" / "best.safetensors").exists()


# Stopping and going on


@pytest.fixture(scope="module")
def unbroken(sample, tmp_path_factory):
    """Runs of nine steps that nobody stopped, by settings."""
    made = {}

    def get(**settings):
        key = tuple(sorted(settings.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("unbroken") / "run"
            train(sample, made[key], steps=9, **settings)
        return made[key]

    return get


VARIANTS = {
    "segnet-basic": {},
    "segnet": {"model": "segnet"},
    "bayesian": {"model": "segnet", "dropout": True},
    "bilinear": {"decoder": "bilinear"},
    "deconv": {"decoder": "deconv"},
    "poly": {"schedule": "poly", "warmup": 3, "workers": 2, "bias_lr": 2.0},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_crash_costs_the_steps_since_the_checkpoint_and_changes_nothing_else(sample, tmp_path, unbroken, variant):
    settings = VARIANTS[variant]
    with pytest.raises(Crash):
        train(sample, tmp_path, At(8, crash), steps=9, checkpoint_every=3, **settings)
    assert steps(tmp_path) == list(range(1, 9))
    resumed = start(sample, tmp_path, steps=9, resume=True, **settings)
    assert resumed.step == 6
    assert steps(tmp_path) == list(range(1, 7))  # the rows past the checkpoint are gone
    assert resumed.run()
    assert_same_run(unbroken(**settings), tmp_path)


@pytest.fixture
def order(monkeypatch):
    """The images that training has been given since, batch by batch."""
    seen = []
    epoch = Loader.epoch

    def watched(self, *arguments, **keywords):
        for batch in epoch(self, *arguments, **keywords):
            seen.append(batch.ids)
            yield batch

    monkeypatch.setattr(Loader, "epoch", watched)
    return seen


def test_a_stop_at_each_step(tmp_path, order):
    """By default at three of twenty steps, one of them the end of an epoch; with SEGNET_TEST_FULL=1 at all of them."""
    data = write_sample(tmp_path / "sample", train=20, val=2, size=(48, 64))  # ten steps an epoch
    settings = {"model": "segnet", "width": 1 / 32, "dropout": True, "epochs": 2}
    train(data, tmp_path / "unbroken", **settings)
    unbroken, order[:] = list(order), []
    assert len(unbroken) == 20
    assert sorted(sum(unbroken[:10], ())) == sorted(sum(unbroken[10:], ()))  # two epochs
    assert unbroken[:10] != unbroken[10:]
    for stop in range(1, 21) if FULL else (1, 10, 17):
        out = tmp_path / str(stop)
        assert not train(data, out, At(stop, interrupt), **settings)[1]  # nor at the last one: its validation is due
        assert len(order) == stop
        assert train(data, out, resume=True, **settings)[1]
        assert order == unbroken, stop
        order.clear()
        assert_same_run(tmp_path / "unbroken", out)


@pytest.mark.parametrize("stop", [4, 9], ids=["in training", "at the end"])
def test_a_validation_that_is_stopped_is_made_up_for(sample, tmp_path, unbroken, stop):
    trainer, finished = train(sample, tmp_path, At(stop, interrupt, validating=True), steps=9)
    assert not finished
    assert trainer.model.training
    assert "loss" in rows(tmp_path)[-1]  # no row of a validation that was not finished
    resumed = start(sample, tmp_path, steps=9, resume=True)
    assert resumed.step == stop
    assert resumed.run()
    assert_same_run(unbroken(), tmp_path)


def test_the_second_ctrl_c_ends_at_once(sample, tmp_path):
    def twice():
        interrupt()
        interrupt()

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        train(sample, tmp_path, At(2, twice), steps=9)
    assert not (tmp_path / "last.safetensors").exists()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_training_works_in_a_thread_where_signals_do_not(sample, tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(train(sample, tmp_path, steps=2)[1]))
    thread.start()
    thread.join()
    assert results == [True]


def test_resume_without_a_checkpoint_starts_at_step_0(sample, tmp_path, unbroken):
    with pytest.raises(Crash):
        train(sample, tmp_path, At(3, crash), steps=9)
    assert not (tmp_path / "last.safetensors").exists()
    resumed = start(sample, tmp_path, steps=9, resume=True)
    assert resumed.step == 0
    assert rows(tmp_path) == []
    assert resumed.run()
    assert_same_run(unbroken(), tmp_path)


def test_a_finished_run_can_be_resumed_and_made_longer(sample, tmp_path, unbroken):
    train(sample, tmp_path, steps=8)
    again, finished = train(sample, tmp_path, steps=8, resume=True)
    assert finished
    assert again.step == 8
    assert steps(tmp_path) == list(range(1, 9))
    train(sample, tmp_path, steps=9, resume=True)
    assert_same_run(unbroken(), tmp_path)


def test_leftovers_of_a_killed_save_are_swept(sample, tmp_path):
    train(sample, tmp_path, steps=1)
    (tmp_path / ".last.safetensors.0123456789abcdef.segnet-tmp").write_bytes(b"half")
    start(sample, tmp_path, steps=1, resume=True)
    assert {path.name for path in tmp_path.iterdir()} == FILES


# Settings of a run


def test_a_run_is_not_overwritten(tmp_path, sample):
    folder = RunFolder(tmp_path / "run")
    folder.resolve_config([], [], resume=False)
    train(sample, tmp_path / "run", steps=1)
    with pytest.raises(TrainingError, match=r"run already holds a run.*--resume"):
        folder.resolve_config([], [], resume=False)


@pytest.mark.parametrize("left", sorted(FILES))
def test_what_is_left_of_a_run_is_not_overwritten_if_it_has_weights(tmp_path, left):
    (tmp_path / left).touch()
    if left.endswith(".safetensors"):
        with pytest.raises(TrainingError, match="already holds a run"):
            RunFolder(tmp_path).resolve_config([], [], resume=False)
    else:  # a run that failed before its first checkpoint
        RunFolder(tmp_path).resolve_config([], [], resume=False)


@pytest.mark.parametrize(
    ("setting", "named"),
    [("lr=0.1", "lr"), ("seed=1", "seed"), ("size=64", "size"), ("width=0.5", "width"), ("dropout=true", "dropout")],
)
def test_resume_with_another_setting_names_it(sample, tmp_path, setting, named):
    start(sample, tmp_path, steps=2)
    with pytest.raises(ConfigError, match=rf"resume: .*\b{named} \(was .*, now .*\)"):
        RunFolder(tmp_path).resolve_config([], [setting], resume=True)


def test_resume_takes_the_settings_of_the_run(sample, tmp_path):
    config = start(sample, tmp_path, steps=2).config
    folder = RunFolder(tmp_path)
    assert folder.resolve_config([], [], resume=True) == config
    assert folder.resolve_config([], ["lr=0.05"], resume=True) == config
    changed = folder.resolve_config([], ["workers=7", "steps=5", "checkpoint_every=1"], resume=True)
    assert (changed.workers, changed.steps, changed.checkpoint_every) == (7, 5, 1)
    (tmp_path / "given.toml").write_text("lr = 0.7\n")
    with pytest.raises(ConfigError, match="lr"):
        folder.resolve_config([tmp_path / "given.toml"], [], resume=True)


def other_names(data):
    names = (data / "labels.txt").read_text().split()
    (data / "labels.txt").write_text("\n".join(["ground", *names[1:]]))


def fewer_images(data):
    split = data / "ImageSets" / "Segmentation" / "train.txt"
    split.write_text("\n".join(split.read_text().split()[1:]))


def other_images(data):
    split = data / "ImageSets" / "Segmentation" / "train.txt"
    split.write_text("\n".join([*split.read_text().split()[1:], "sample_00011"]))


@pytest.mark.parametrize(
    ("change", "part"), [(other_names, "classes"), (fewer_images, "7 images"), (other_images, "8 images")]
)
def test_resume_with_other_data_is_refused(sample, tmp_path, change, part):
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(sample, data)
    train(data, out, steps=1)
    before = (out / "metrics.jsonl").read_bytes()
    start(data, out, steps=2, resume=True)
    change(data)
    with pytest.raises(CheckpointError, match=rf"last\.safetensors.*{part}.*same --data"):
        start(data, out, steps=2, resume=True)
    assert (out / "metrics.jsonl").read_bytes() == before


def test_resume_from_a_damaged_checkpoint_names_it_and_touches_nothing(sample, tmp_path):
    train(sample, tmp_path, steps=2)
    last, metrics = tmp_path / "last.safetensors", (tmp_path / "metrics.jsonl").read_bytes()
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"last\.safetensors.*best\.safetensors"):
        start(sample, tmp_path, steps=2, resume=True)
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics


def test_resume_from_a_checkpoint_without_momenta_names_it(sample, tmp_path):
    train(sample, tmp_path, steps=1)
    shutil.copy(tmp_path / "best.safetensors", tmp_path / "last.safetensors")
    with pytest.raises(CheckpointError, match=r"last\.safetensors: the momentum of encoder"):
        start(sample, tmp_path, steps=2, resume=True)


# Losses that are not finite


class Poison(Listener):
    def __init__(self, step):
        self.step = step

    def stepped(self, trainer, loss, lr):
        if trainer.step == self.step:
            trainer.model.decoder[2][1].conv.weight.data[0, 0, 0, 0] = np.nan


@pytest.mark.parametrize(
    ("poisoned", "error", "part"),
    [
        (4, TrainingError, r"^the loss is nan at step 5 .*sample_.*last\.safetensors.*smaller lr"),
        (6, CheckpointError, "NaN"),
    ],
    ids=["between two checkpoints", "as one is due"],
)
def test_a_loss_of_nan_stops_and_keeps_the_last_good_checkpoint(sample, tmp_path, poisoned, error, part):
    settings = {"steps": 9, "checkpoint_every": 3, "validate_every": 9}
    with pytest.raises(error, match=part):
        train(sample, tmp_path, Poison(poisoned), **settings)
    state, momenta, metadata = weights.read(tmp_path / "last.safetensors")
    assert metadata["step"] == 3
    assert all(np.isfinite(array).all() for array in (*state.values(), *momenta.values()))
    assert all(np.isfinite(losses(tmp_path)))
    _, finished = train(sample, tmp_path, resume=True, **settings)  # without the poison
    assert finished
    assert steps(tmp_path) == list(range(1, 10))


# What a step is made of


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the overflow that this is about
def test_a_learning_rate_that_is_too_large_says_so(sample, tmp_path):
    with pytest.raises(TrainingError, match=r"step 2 .*there is no checkpoint; train with a smaller lr than 1e\+30"):
        train(sample, tmp_path, steps=9, lr=1e30)


def test_a_batch_in_parts_makes_the_step_of_the_whole(sample, tmp_path):
    """With running statistics in batch norm, which alone sees the parts; double, so that only rounding differs."""
    found = {}
    for normalisation in ("weights", "valid"):
        for parts in (1, 2, 3):
            settings = {"class_weights": [1, 2, 3, 0.5, 4, 0.1], "label_smoothing": 0.1, "dtype": "float64"}
            trainer = start(
                *(sample, tmp_path / f"{normalisation}{parts}"),
                **settings | {"batch": 4, "accumulate": parts, "loss_normalisation": normalisation},
            )
            batch = next(iter(trainer.loader.epoch(0)))
            batch.labels[0, :20] = 255  # so that the shares are not those of the images
            step, model = trainer.training, trainer.model
            step.write(batch.images.astype(np.float64), batch.labels, 0.0)
            model.eval()
            step._pass.run()
            shares = step._pass.shares
            assert len(set(shares)) == len(shares) == parts
            found[normalisation, parts] = [step.read().get()[0], *(p.grad for p in model.parameters())]
    for (normalisation, _), values in found.items():
        for got, whole in zip(values, found[normalisation, 1], strict=True):
            np.testing.assert_allclose(got, whole, rtol=1e-9, atol=1e-12)
    assert found["weights", 1][0] != found["valid", 1][0]


def test_the_parts_of_a_step_have_dropout_masks_of_their_own(sample, tmp_path, monkeypatch):
    states = []
    trainer = start(sample, tmp_path, steps=2, model="segnet", dropout=True, accumulate=2, validate_every=9)
    monkeypatch.setattr(trainer.model, "set_random_state", lambda *state: states.append(state))
    trainer.run()
    assert states == [(0, k) for k in range(4)]


@pytest.mark.parametrize(
    "settings",
    [
        {"clip_norm": 0.01},
        {"label_smoothing": 0.2},
        {"class_weights": "median-frequency"},
        {"accumulate": 2},
        {"schedule": "step", "lr_steps": [1]},
        {"short_side": [40, 48]},
        *({name: 0.5} for name in ("brightness", "contrast", "saturation", "hue")),
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_a_setting_changes_the_run(sample, tmp_path, settings):
    for name, given in (("default", {}), ("changed", settings)):
        train(sample, tmp_path / name, steps=2, validate_every=2, **given)
    first, second = (weights.read(tmp_path / name / "last.safetensors")[0] for name in ("default", "changed"))
    assert any((first[name] != second[name]).any() for name in first)


def test_the_rates_of_the_step_schedule(sample, tmp_path):
    train(sample, tmp_path, steps=4, schedule="step", lr_steps=[0.5, 0.75], lr_gamma=0.5, warmup=1, validate_every=4)
    assert [row["lr"] for row in rows(tmp_path) if "lr" in row] == [0.025, 0.05, 0.025, 0.0125]


def test_median_frequency_weights_are_counted_and_kept(sample, tmp_path, monkeypatch):
    trainer, _ = train(sample, tmp_path, steps=1, class_weights="median-frequency")
    expected = class_statistics(VOCDataset(sample, "train")).weights
    assert trainer.class_weights == expected.tolist()
    assert weights.read(tmp_path / "last.safetensors")[2]["class_weights"] == expected.tolist()
    train(sample, tmp_path / "numbers", steps=1, class_weights=expected.tolist())
    assert losses(tmp_path) == losses(tmp_path / "numbers")
    monkeypatch.setattr("segnet_scratch.train.class_statistics", crash)  # a resumed run does not count again
    assert start(sample, tmp_path, steps=2, resume=True, class_weights="median-frequency").class_weights == list(
        expected
    )


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_a_cache_changes_nothing(sample, tmp_path, cache):
    data = shutil.copytree(sample, tmp_path / "data")
    for name, mode in (("a", "none"), ("b", cache)):
        trainer, _ = train(data, tmp_path / name, steps=6, cache=mode)
    assert type(trainer.train_set) is not VOCDataset
    assert type(trainer.val_set) is not VOCDataset
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_gradients_that_are_not_finite_stop_before_the_step(sample, tmp_path, monkeypatch):
    trainer = start(sample, tmp_path, steps=2)
    before, optimiser = trainer.model.state_dict(), trainer.training.optimiser
    update = optimiser.update

    def poisoned():
        trainer.model.named_parameters()["classifier.bias"].grad[0] = np.inf
        update()

    monkeypatch.setattr(optimiser, "update", poisoned)
    with pytest.raises(TrainingError, match=r"norm of the gradients is inf: .*step 1"):
        trainer.run()
    for name, array in trainer.model.state_dict().items():
        np.testing.assert_array_equal(array, before[name], err_msg=name)


# Giving up


def judge_as(monkeypatch, *mious):
    """Validations with these mIoUs in turn."""
    left = iter(mious)

    def judged(*arguments, **options):
        return Evaluation(replace(scores(np.eye(6, dtype=int)), miou=next(left)), 1.0, 4, ("",) * 6)

    monkeypatch.setattr("segnet_scratch.train.evaluate", judged)


def test_patience_ends_a_run_and_a_larger_one_goes_on(sample, tmp_path, monkeypatch):
    settings = {"steps": 8, "validate_every": 1}
    judge_as(monkeypatch, 0.2, 0.5, 0.4, 0.3, 0.9)
    trainer, finished = train(sample, tmp_path, patience=2, **settings)
    assert finished
    assert trainer.stopped_early
    assert trainer.step == 4
    again, _ = train(sample, tmp_path, patience=2, resume=True, **settings)
    assert again.step == 4  # as if it had never stopped
    judge_as(monkeypatch, 0.3, 0.9, 0.8, 0.7)
    more, _ = train(sample, tmp_path, patience=4, resume=True, **settings)
    assert more.step == 8
    assert not more.stopped_early


def test_validations_may_be_some_epochs_apart(sample, tmp_path):
    train(sample, tmp_path, epochs=3, validate_epochs=2)
    assert [row["step"] for row in rows(tmp_path) if "miou" in row] == [8, 12]


# Processes


def command(data, out, *more):
    settings = [
        part for key, value in (TINY | {"validate_every": 10**6}).items() for part in ("--set", f"{key}={value}")
    ]
    arguments = ["train", "--data", data, "--out", out, "--device", "numpy", *settings, *more]
    return [sys.executable, "-m", "segnet_scratch", *map(str, arguments)]


def launch_until(out, wanted, *arguments):
    """Starts a run and waits until so many steps are logged."""
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not (out / "metrics.jsonl").exists() or len(rows(out)) < wanted:
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"ended early or hung: {process.communicate()}")
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_saves_and_says_how_to_go_on(sample, tmp_path, number):
    out = tmp_path / "run"
    process = launch_until(out, 5, *command(sample, out, "--set", "steps=100000"))
    process.send_signal(number)
    printed, problems = process.communicate(timeout=300)
    assert process.returncode == 130, problems
    made = weights.read(out / "last.safetensors")[2]["step"]
    assert made == steps(out)[-1] >= 5
    assert f"stopped at step {made} of 100000, saved; go on with the same command and --resume" in printed
    assert problems == ""
    total = made + 2
    ended = subprocess.run(
        command(sample, out, "--set", f"steps={total}", "--resume"), capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert "resumed" in ended.stdout
    train(sample, tmp_path / "unbroken", steps=total, validate_every=10**6)
    assert_same_run(tmp_path / "unbroken", out)


# Devices


@pytest.mark.parametrize(
    ("model", "dtype", "lr", "tolerance"),
    # In float32 SegNet's losses part after some steps on any two implementations: one argmax that rounding flips
    # moves a value to a neighbour. SegNet-Basic is shallow enough for twenty steps. At larger rates than the default
    # a network as narrow as this multiplies any difference by ten in each step, float64 or not.
    [("segnet", "float64", 1e-3, 1e-9), ("segnet-basic", "float32", 0.01, 1e-4)],
)
def test_host_and_numpy_train_alike(sample, tmp_path, model, dtype, lr, tolerance):
    settings = {"model": model, "dtype": dtype, "lr": lr, "steps": 20, "validate_every": 20}
    for device in ("numpy", "host"):
        train(sample, tmp_path / device, device=device, **settings)
    a, b = losses(tmp_path / "numpy"), losses(tmp_path / "host")
    assert len(a) == len(b) == 20
    assert np.ptp(a) > 0.1
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)
    assert rows(tmp_path / "numpy")[-1]["miou"] == pytest.approx(rows(tmp_path / "host")[-1]["miou"], abs=1e-3)


# Real images


@pytest.mark.parametrize(("name", "classes"), [("VOCdevkit/VOC2012", 21), ("CamVid", 11)])
def test_real_images_train(tmp_path, name, classes):
    root = real("data", name)
    small = tmp_path / "data"
    lists = small / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for folder in ("JPEGImages", "SegmentationClass"):
        (small / folder).symlink_to(root / folder)
    if (root / "labels.txt").exists():
        shutil.copy(root / "labels.txt", small)
    for split in ("train", "val"):
        ids = (root / "ImageSets" / "Segmentation" / f"{split}.txt").read_text().split()
        (lists / f"{split}.txt").write_text("\n".join(ids[:6]))
    trainer, finished = train(small, tmp_path / "run", model="segnet", size=64, steps=3, batch=4)
    assert finished
    assert trainer.model.classes == classes
    assert len(losses(tmp_path / "run")) == 3
    # An untrained network is about as good as guessing among the classes.
    assert all(0.5 * np.log(classes) < loss < 2 * np.log(classes) for loss in losses(tmp_path / "run"))
    assert all(a["step"] <= b["step"] for a, b in pairwise(rows(tmp_path / "run")))
    assert 0 <= trainer.best_miou < 0.5


def test_a_killed_run_goes_on(sample, tmp_path):
    out, settings = tmp_path / "run", ("--set", "steps=100000", "--set", "checkpoint_every=5")
    process = launch_until(out, 17, *command(sample, out, *settings))
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    made, logged = weights.read(out / "last.safetensors")[2]["step"], len(rows(out))
    assert made % 5 == 0
    assert logged >= 17
    total = made + 1  # fewer than the rows logged where the kill fell between two checkpoints
    ended = subprocess.run(
        command(sample, out, "--set", f"steps={total}", "--resume"), capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    train(sample, tmp_path / "unbroken", steps=total, validate_every=10**6)
    assert_same_run(tmp_path / "unbroken", out)
