"""How a run begins and ends: what it starts from, who else is in its folder, what an error leaves of it."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
from support.training import At, steps

from segnet_scratch import weights
from segnet_scratch.config import load_config
from segnet_scratch.errors import CheckpointError, ConfigError, DataError, TrainingError
from segnet_scratch.run_folder import RunFolder
from segnet_scratch.train import STOP_SIGNALS, Trainer

TINY = {"model": "segnet-basic", "width": 0.0625, "size": 32, "batch": 2, "workers": 0, "lr": 0.01}


def settings(**more):
    return [f"{key}={value}" for key, value in (TINY | more).items()]


def trainer(data, out, resume=False, init=None, **more):
    folder = RunFolder(out)
    return Trainer(folder.resolve_config([], settings(**more), resume, init), data, out, "numpy", resume=resume)


def options(**more):
    return [part for setting in settings(**more) for part in ("--set", setting)]


@pytest.fixture
def data(sample, tmp_path):
    """A copy of the sample with one training image cut off; its mask is whole."""
    shutil.copytree(sample, tmp_path / "data")
    image = tmp_path / "data/JPEGImages/sample_00003.jpg"
    image.write_bytes(image.read_bytes()[:200])
    return tmp_path / "data"


# Errors


def test_an_image_that_cannot_be_read_saves_first_and_can_be_left_out(data, tmp_path, segnet, caplog):
    out = tmp_path / "run"
    arguments = ["train", "--data", data, "--out", out, "--device", "numpy", *options(epochs=3, seed=1)]
    ended = segnet(*arguments)
    assert ended.code == 1
    assert "sample_00003.jpg" in ended.err
    made = weights.read(out / "last.safetensors")[2]["step"]
    assert made == steps(out)[-1] >= 1
    assert f"saved at step {made}" in caplog.text
    ended = segnet(*arguments, "--set", "bad_samples=skip", "--resume")
    assert ended.code == 0, ended.err
    assert caplog.text.count("left out (1 so far)") == 1
    assert "1 training images could not be read and were left out: sample_00003" in ended.out
    assert steps(out) == list(range(1, 13))


def test_a_validation_image_that_cannot_be_read_can_be_left_out(sample, tmp_path, caplog):
    shutil.copytree(sample, tmp_path / "data")
    for line in (tmp_path / "data/ImageSets/Segmentation/val.txt").read_text().split()[1:]:
        (tmp_path / f"data/SegmentationClass/{line}.png").write_bytes(b"no PNG")
    with pytest.raises(DataError, match="SegmentationClass"):
        trainer(tmp_path / "data", tmp_path / "a", steps=2).run()
    assert trainer(tmp_path / "data", tmp_path / "b", steps=2, bad_samples='"skip"').run()
    assert f"left out of val: {tmp_path / 'data'}" in caplog.text
    for path in (tmp_path / "data/SegmentationClass").glob("*.png"):
        if path.stem in (tmp_path / "data/ImageSets/Segmentation/val.txt").read_text().split():
            path.write_bytes(b"no PNG")
    with pytest.raises(DataError, match="not one image of split 'val' can be read"):
        trainer(tmp_path / "data", tmp_path / "c", steps=2, bad_samples='"skip"').run()


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError(5, "Input/output error"), ZeroDivisionError(), DataError("x")]
)
def test_whatever_ends_a_run_saves_first(sample, tmp_path, error):
    def act():
        raise error

    with pytest.raises(type(error)):
        trainer(sample, tmp_path, steps=9).run(At(3, act))
    assert weights.read(tmp_path / "last.safetensors")[2]["step"] == 3
    trainer(sample, tmp_path, resume=True, steps=9).run()
    assert steps(tmp_path) == list(range(1, 10))


def test_a_state_that_cannot_be_saved_either_leaves_the_error_that_came_first(sample, tmp_path, monkeypatch, caplog):
    run = trainer(sample, tmp_path, steps=9)

    def act():
        monkeypatch.setattr(run, "_write_checkpoint", lambda: (_ for _ in ()).throw(CheckpointError("no room")))
        raise DataError("the first")

    with pytest.raises(DataError, match="the first"):
        run.run(At(2, act))
    assert "could not be saved: no room" in caplog.text


def test_rows_that_cannot_be_written_cost_no_training(sample, tmp_path, caplog):
    def act():
        (tmp_path / "metrics.jsonl").unlink()
        (tmp_path / "metrics.jsonl").mkdir()

    with pytest.raises(TrainingError, match=r"metrics\.jsonl: could not be written"):
        trainer(sample, tmp_path, steps=9).run(At(3, act))
    assert weights.read(tmp_path / "last.safetensors")[2]["step"] == 4
    assert "step 4 has no row" in caplog.text
    assert "saved at step 4" in caplog.text


def test_a_run_without_a_checkpoint_does_not_block_its_folder(sample, tmp_path):
    def act():
        raise SystemExit

    with pytest.raises(SystemExit):
        trainer(sample, tmp_path, steps=9).run(At(2, act))
    assert not (tmp_path / "last.safetensors").exists()
    trainer(sample, tmp_path, steps=3, lr=0.02).run()
    assert steps(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize("number", STOP_SIGNALS[1:])
def test_signals_that_come_twice_save_all_the_same(sample, tmp_path, number):
    def act():
        signal.raise_signal(number)
        signal.raise_signal(number)

    assert not trainer(sample, tmp_path, steps=9).run(At(2, act))
    assert weights.read(tmp_path / "last.safetensors")[2]["step"] == 2


def test_a_signal_that_is_ignored_stays_so(sample, tmp_path):
    """As behind nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert trainer(sample, tmp_path, steps=3).run(At(2, lambda: signal.raise_signal(signal.SIGHUP)))
    finally:
        signal.signal(signal.SIGHUP, before)


# One process in a folder


def test_a_folder_in_use_is_refused_and_a_killed_process_is_no_use(sample, tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from segnet_scratch.run_folder import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).in_use(): print('in', flush=True); time.sleep(60)"
    )
    trainer(sample, tmp_path, steps=1).run()
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "in\n"
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(TrainingError, match="another process trains in this folder"):
            trainer(sample, tmp_path, resume=True, steps=3)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
        other.kill()
    trainer(sample, tmp_path, resume=True, steps=3).run()
    assert steps(tmp_path) == [1, 2, 3]


def test_a_folder_is_in_use_while_it_is_trained_in(sample, tmp_path):
    def act():
        trainer(sample, tmp_path, resume=True, steps=9)

    with pytest.raises(TrainingError, match="another process"):
        trainer(sample, tmp_path, steps=9).run(At(2, act))


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_another_has_gone_on_with_is_not_cut_back(sample, tmp_path, monkeypatch, resume):
    """Between the look at the folder and its lock, and between the lock of the constructor and that of `run`."""
    if resume:
        trainer(sample, tmp_path, steps=2).run()
    early = trainer(sample, tmp_path, resume, steps=2 if resume else 4)
    in_use = RunFolder.in_use

    def after_another(folder):
        monkeypatch.setattr(RunFolder, "in_use", in_use)
        trainer(sample, tmp_path, resume, steps=4).run()
        return in_use(folder)

    monkeypatch.setattr(RunFolder, "in_use", after_another)
    with pytest.raises(TrainingError, match="another run has been taken up in this folder meanwhile"):
        trainer(sample, tmp_path, resume, steps=4)
    with pytest.raises(TrainingError, match="another run has been taken up in this folder meanwhile"):
        early.run()
    assert steps(tmp_path) == [1, 2, 3, 4]
    assert weights.read(tmp_path / "last.safetensors")[2]["step"] == 4


def test_a_run_is_not_begun_over_another(sample, tmp_path):
    """Also where it came to a checkpoint after the settings were looked at."""
    first = trainer(sample, tmp_path, steps=2)
    first.run()
    with pytest.raises(TrainingError, match="already holds a run"):
        Trainer(first.config, sample, tmp_path, "numpy")


# What a run starts from


def test_a_resumed_run_remembers_what_it_started_from(sample, tmp_path, monkeypatch):
    trainer(sample, tmp_path / "first", steps=2).run()
    start = tmp_path / "first" / "last.safetensors"
    out = tmp_path / "run"
    monkeypatch.chdir(tmp_path)

    def act():
        raise SystemExit  # before the first checkpoint

    with pytest.raises(SystemExit):
        trainer(sample, out, steps=4, init=start.relative_to(tmp_path)).run(At(2, act))
    monkeypatch.chdir(sample)  # a relative path would be another file now
    resumed = trainer(sample, out, resume=True, steps=4)
    assert str(start) in resumed.initialised
    assert load_config(out / "config.toml").init == str(start)
    resumed.run()
    for name in ("last.safetensors", "best.safetensors"):
        assert str(start) in weights.read(out / name)[2]["init"]
    trainer(sample, tmp_path / "straight", steps=4, init=start).run()
    assert (out / "last.safetensors").read_bytes() == (tmp_path / "straight/last.safetensors").read_bytes()
    trainer(sample, out, resume=True, steps=5).run()  # with a checkpoint the file is not needed any more
    assert str(start) in weights.read(out / "last.safetensors")[2]["init"]
    with pytest.raises(ConfigError, match=r"init \(was "):
        trainer(sample, out, resume=True, steps=6, init=tmp_path / "other.safetensors")


def test_there_must_be_a_run_to_resume(sample, tmp_path):
    with pytest.raises(TrainingError, match="no run to resume"):
        trainer(sample, tmp_path / "nowhere", resume=True)
    assert not (tmp_path / "nowhere").exists()


def test_a_finished_run_can_be_extended_but_not_shortened(sample, tmp_path):
    trainer(sample, tmp_path, steps=3).run()
    with pytest.raises(ConfigError, match="3 steps have been made, 2 are asked for"):
        trainer(sample, tmp_path, resume=True, steps=2)
    trainer(sample, tmp_path, resume=True, steps=5).run()
    assert steps(tmp_path) == [1, 2, 3, 4, 5]


def test_a_schedule_over_the_whole_length_says_why_it_cannot_be_extended(sample, tmp_path):
    trainer(sample, tmp_path, steps=2, schedule="poly").run()
    with pytest.raises(ConfigError, match=r'steps .was 2, now 4.*learning rates.*"poly" goes by shares'):
        trainer(sample, tmp_path, resume=True, steps=4, schedule="poly")


# Splits and settings


def test_the_splits_are_chosen(sample, tmp_path, segnet):
    out = tmp_path / "run"
    more = options(steps=4, train_split="trainval", val_split="none")
    ended = segnet("train", "--data", sample, "--out", out, "--device", "numpy", *more)
    assert ended.code == 0, ended.err
    assert "12 training and no validation images" in ended.out
    assert sorted(path.name for path in out.iterdir()) == [
        "config.toml",
        "last.safetensors",
        "metrics.jsonl",
        "sessions.json",
    ]
    assert steps(out) == [1, 2, 3, 4]
    with pytest.raises(ConfigError, match="train_split"):
        trainer(sample, out, resume=True, steps=4, train_split="train")


def test_later_files_of_settings_win(tmp_path):
    (tmp_path / "a.toml").write_text("lr = 0.5\nepochs = 3\nbatch = 7\n")
    (tmp_path / "b.toml").write_text("lr = 0.25\nsteps = 9\n")
    found = load_config([tmp_path / "a.toml", tmp_path / "b.toml"], ["batch=5"])
    assert (found.lr, found.epochs, found.steps, found.batch) == (0.25, None, 9, 5)
    (tmp_path / "b.toml").write_text("rl = 0.25\n")
    with pytest.raises(ConfigError, match=r"b\.toml: unknown setting 'rl'"):
        load_config([tmp_path / "a.toml", tmp_path / "b.toml"])


# What only shows

SHOW = (sys.executable, "-m", "segnet_scratch")


def command(sample, out, **more):
    return [*SHOW, "train", "--data", str(sample), "--out", str(out), "--device", "numpy", *options(**more)]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")  # noqa: PTH110
def test_a_full_disk_under_the_output_does_not_end_a_run(sample, tmp_path):
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        ended = subprocess.run(command(sample, tmp_path / "r", epochs=2), stdout=full, stderr=full, check=False)
        assert ended.returncode == 0
        assert steps(tmp_path / "r") == list(range(1, 9))
        # What is nowhere else is not lost without a word.
        shown = subprocess.run([*SHOW, "recipes"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (shown.returncode, "No space left" in shown.stderr) == (1, True)


def test_a_reader_that_goes_away_does_not_end_a_run(sample, tmp_path):
    process = subprocess.Popen(
        command(sample, tmp_path / "r", epochs=2), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=300) == 0
    assert process.stderr.read() == b""
    process.stderr.close()
    assert steps(tmp_path / "r") == list(range(1, 9))
    assert (tmp_path / "r" / "best.safetensors").exists()


def test_output_that_was_closed_from_the_start(sample, tmp_path):
    arguments = " ".join(f"'{part}'" for part in command(sample, tmp_path / "r", steps=2))
    assert subprocess.run(["sh", "-c", f"{arguments} >&- 2>&-"], check=False).returncode == 0
    assert steps(tmp_path / "r") == [1, 2]
