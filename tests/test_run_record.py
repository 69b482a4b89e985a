"""The record of a run's sessions: what it says, through stops and resumes, and what is done about a damaged one."""

import json
import platform
import subprocess

import numpy as np
import pytest

from segnet_scratch import run_record
from segnet_scratch.config import Config
from segnet_scratch.errors import DataError
from segnet_scratch.run_record import RunRecord, read_sessions, revision
from segnet_scratch.train import Trainer

SETTINGS = {"model": "segnet-basic", "width": 0.0625, "size": 32, "batch": 4, "workers": 0, "checkpoint_every": 1}


def train(data, out, steps, resume=False):
    Trainer(Config(**SETTINGS, steps=steps), data, out, "numpy", resume=resume).run(RunRecord())


def test_a_session_says_where_and_how_long(sample, tmp_path):
    train(sample, tmp_path, 3)
    (session,) = read_sessions(tmp_path)
    assert session.data == str(sample.resolve())
    assert (session.device, session.first_step, session.last_step, session.batch) == ("numpy", 0, 3, 4)
    assert session.seconds > 0
    assert session.images_per_second == pytest.approx(12 / session.seconds)
    assert session.versions["numpy"] == np.__version__
    assert session.versions["python"] == platform.python_version()
    assert session.started.endswith("+00:00")
    assert session.revision == revision()


def test_resuming_adds_a_session(sample, tmp_path):
    train(sample, tmp_path, 2)
    train(sample, tmp_path, 5, resume=True)
    assert [(s.first_step, s.last_step) for s in read_sessions(tmp_path)] == [(0, 2), (2, 5)]


def test_sessions_whose_steps_were_lost_are_dropped(sample, tmp_path):
    train(sample, tmp_path, 2)
    entries = json.loads((tmp_path / "sessions.json").read_text())
    lost = {**entries[0], "first_step": 2, "last_step": 4}  # its checkpoint never reached the disk
    (tmp_path / "sessions.json").write_text(json.dumps([*entries, lost]))
    train(sample, tmp_path, 3, resume=True)
    assert [(s.first_step, s.last_step) for s in read_sessions(tmp_path)] == [(0, 2), (2, 3)]


def test_what_is_known_is_kept_when_training_dies(sample, tmp_path):
    class Dead(RunRecord):
        def ended(self, trainer):
            """Killed: nothing is written any more."""

    Trainer(Config(**SETTINGS, steps=5), sample, tmp_path, "numpy").run(Dead())
    assert read_sessions(tmp_path)[0].last_step == 5  # of the last validation


def test_a_session_without_a_step_has_no_speed(sample, tmp_path):
    record, trainer = RunRecord(), Trainer(Config(**SETTINGS, steps=5), sample, tmp_path, "numpy")
    record.started(trainer)
    record.ended(trainer)
    assert read_sessions(tmp_path)[0].images_per_second == 0


def test_no_record_is_no_session(tmp_path):
    assert read_sessions(tmp_path) == []


@pytest.mark.parametrize("content", ["", "{}", "[1]", "[{}]", "null", "[" * 100_000, '[{"data": "x"}]'])
def test_a_damaged_record_is_named(tmp_path, content):
    (tmp_path / "sessions.json").write_text(content)
    with pytest.raises(DataError, match=r"sessions\.json: expected the record .* delete the file"):
        read_sessions(tmp_path)


def test_a_damaged_record_is_named_when_the_run_goes_on_and_left_as_it_is(sample, tmp_path):
    train(sample, tmp_path, 1)
    (tmp_path / "sessions.json").write_text("{}")
    with pytest.raises(DataError, match=r"sessions\.json: expected the record"):
        train(sample, tmp_path, 2, resume=True)
    assert (tmp_path / "sessions.json").read_text() == "{}"


def test_the_revision_is_that_of_this_checkout(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", *identity, "-C", str(tmp_path), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    (tmp_path / "segnet_scratch").mkdir()
    monkeypatch.setattr(run_record, "__file__", str(tmp_path / "segnet_scratch" / "run_record.py"))
    assert revision() == ""  # no checkout
    try:
        git("init", "--quiet")
    except FileNotFoundError:
        pytest.skip("git is not installed")
    assert revision() == ""  # somebody's checkout, in which this package lies
    (tmp_path / "pyproject.toml").touch()
    assert revision() == ""  # without a commit
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    assert revision() == git("rev-parse", "HEAD")
    (tmp_path / "pyproject.toml").write_text("changed")
    assert revision() == git("rev-parse", "HEAD") + "+"
