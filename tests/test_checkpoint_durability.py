"""Saves that are killed, refused by the system or interrupted: a complete checkpoint stays, and no leftovers.

By default 25 kills at random moments and four faults of a training run; with SEGNET_TEST_FULL=1 the 500 kills of the
list of proofs, and a fault of every call.
"""

import errno
import itertools
import os
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support import ROOT, count
from support.checkpoints import assert_same_tensors, names_in, some_metadata, some_tensors

from segnet_scratch import checkpoint, files, run_record
from segnet_scratch.errors import CheckpointError

KILLS = count(25, 500)
ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES)


class Calls:
    """Records the system calls of a save; lets one of them fail or end the process, or every write fall short."""

    NAMES = ("open", "write", "fsync", "close", "replace")

    def __init__(self, monkeypatch, fail_at=None, error=errno.EIO, longest_write=None, kill=(None, None)):
        self.log = []
        self.fail_at, self.error, self.longest_write, self.kill = fail_at, error, longest_write, kill
        # Those of the module alone: other parts of a run start programs and close files, too.
        watched = SimpleNamespace(**vars(os) | {name: self._wrap(name, getattr(os, name)) for name in self.NAMES})
        monkeypatch.setattr(files, "os", watched)
        monkeypatch.setattr(os, "replace", watched.replace)  # through pathlib

    def _wrap(self, name, call):
        def wrapped(*arguments, **keywords):
            number = len(self.log)
            self.log.append((name, self._target(name, arguments)))
            if number == self.fail_at:
                if name == "close":
                    call(*arguments)  # the descriptor is gone even where close reports an error
                raise OSError(self.error, os.strerror(self.error))
            if name == "write" and self.longest_write:
                arguments = (arguments[0], arguments[1][: self.longest_write])
            if self.kill == ("before", number):
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*arguments, **keywords)
            if self.kill == ("after", number):
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    @staticmethod
    def _target(name, arguments):
        if name in ("open", "replace"):
            return "directory" if os.path.isdir(arguments[0]) else "file"  # noqa: PTH112
        return "directory" if stat.S_ISDIR(os.fstat(arguments[0]).st_mode) else "file"


class TestDurability:
    def test_the_order_of_the_calls(self, tmp_path, monkeypatch):
        calls = Calls(monkeypatch)
        checkpoint.save(tmp_path / "last.safetensors", some_tensors(), some_metadata())
        monkeypatch.undo()
        assert [call for call, _ in itertools.groupby(calls.log)] == [
            ("open", "directory"),
            ("open", "file"),
            ("write", "file"),
            ("fsync", "file"),
            ("close", "file"),
            ("replace", "file"),
            ("fsync", "directory"),
            ("close", "directory"),
        ]

    @pytest.mark.parametrize("error", ERRORS, ids=errno.errorcode.get)
    def test_whichever_call_fails_a_complete_file_stays(self, tmp_path, monkeypatch, error):
        path = tmp_path / "last.safetensors"
        with monkeypatch.context() as patch:
            calls = Calls(patch, longest_write=500).log  # several writes, so that later ones fail too
            checkpoint.save(path, some_tensors(1), some_metadata(1))
        assert len(calls) >= 10
        for failing, call in enumerate(calls):
            checkpoint.save(path, some_tensors(0), some_metadata(0))
            with monkeypatch.context() as patch:
                Calls(patch, fail_at=failing, error=error, longest_write=500)
                message = rf"last\.safetensors: could not be saved: {os.strerror(error)}"
                with pytest.raises(CheckpointError, match=message):
                    checkpoint.save(path, some_tensors(1), some_metadata(1))
            replaced = call in (("fsync", "directory"), ("close", "directory"))
            assert checkpoint.load(path).metadata == some_metadata(1 if replaced else 0)
            assert names_in(tmp_path) == ["last.safetensors"]

    def test_short_writes_are_continued(self, tmp_path, monkeypatch):
        with monkeypatch.context() as patch:
            calls = Calls(patch, longest_write=7)
            checkpoint.save(tmp_path / "a", some_tensors(), some_metadata())
        assert len(calls.log) > 100
        assert_same_tensors(checkpoint.load(tmp_path / "a").tensors, some_tensors())

    def test_a_write_of_nothing_is_an_error_and_no_endless_loop(self, tmp_path, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr(files.os, "write", lambda descriptor, data: 0)
            with pytest.raises(CheckpointError, match="could not be saved"):
                checkpoint.save(tmp_path / "a", some_tensors(), {})
        assert names_in(tmp_path) == []

    def test_a_directory_that_cannot_be_synced_at_all_is_accepted(self, tmp_path, monkeypatch):
        sync = os.fsync

        def fsync(descriptor):
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            sync(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(files.os, "fsync", fsync)
            checkpoint.save(tmp_path / "a", {}, {"step": 3})
        assert checkpoint.load(tmp_path / "a").metadata == {"step": 3}

    def test_an_interrupt_leaves_no_temporary(self, tmp_path, monkeypatch):
        def interrupted(descriptor):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(files.os, "fsync", interrupted)
            with pytest.raises(KeyboardInterrupt):
                checkpoint.save(tmp_path / "a", some_tensors(), {})
        assert names_in(tmp_path) == []

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and resource limits")
    def test_a_full_disk(self, tmp_path):
        """A limit on the size of a file stands for the full disk: the write itself is refused half way."""
        path = tmp_path / "last.safetensors"
        checkpoint.save(path, {"w": np.zeros(10)}, {"step": 1})
        code = (
            "import resource, signal, sys, numpy; from segnet_scratch import checkpoint\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
            "checkpoint.save(sys.argv[1], {'w': numpy.zeros(100_000)}, {'step': 2})\n"
        )
        ended = subprocess.run([sys.executable, "-B", "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True)
        assert ended.returncode != 0
        assert "last.safetensors: could not be saved" in ended.stderr
        assert checkpoint.load(path).metadata == {"step": 1}
        assert names_in(tmp_path) == ["last.safetensors"]

    def test_missing_directory(self, tmp_path):
        with pytest.raises(CheckpointError, match="No such file or directory"):
            checkpoint.save(tmp_path / "nowhere" / "a", {}, {})

    def test_target_is_a_directory(self, tmp_path):
        (tmp_path / "a").mkdir()
        with pytest.raises(CheckpointError, match="directory"):
            checkpoint.save(tmp_path / "a", {}, {})
        assert names_in(tmp_path) == ["a"]
        with pytest.raises(CheckpointError, match="could not be saved"):
            checkpoint.save("/", {}, {})


def save_step(path, step):
    checkpoint.save(path, {"w": np.full(300_000, step, "f4")}, {"step": step})


def expect_step(path, acknowledged):
    """The file loads, whole, and is no older than the last save that returned; gives its step."""
    loaded = checkpoint.load(path)
    step = loaded.metadata["step"]
    assert step in (acknowledged, acknowledged + 1)
    assert (loaded.tensors["w"] == step).all()
    return step


def save_for_ever(path, step, acknowledge):
    """Saves the step and those after it, and writes the number of each to a pipe once its save has returned."""
    write = os.write
    # Slow writes: most kills then fall into a save rather than between two.
    os.write = lambda file, data: (write(file, data), time.sleep(0.005))[0]
    for number in itertools.count(step):
        save_step(path, number)
        write(acknowledge, b"%d\n" % number)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
class TestKill:
    def test_at_random_moments(self, tmp_path):
        path = tmp_path / "last.safetensors"
        save_step(path, 0)
        chooser = random.Random(3)
        reached, orphans = 0, 0
        for _ in range(KILLS):
            ours, theirs = os.pipe()
            child = os.fork()
            if child == 0:
                try:
                    save_for_ever(path, reached + 1, theirs)
                finally:
                    os._exit(1)
            os.close(theirs)
            with os.fdopen(ours) as pipe:
                assert pipe.readline() == f"{reached + 1}\n"  # it is up, and in the middle of saving
                time.sleep(chooser.uniform(0, 0.02))
                os.kill(child, signal.SIGKILL)
                acknowledged = [reached + 1, *map(int, pipe.read().split())][-1]
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
            reached = expect_step(path, acknowledged)
            orphans += len(files.sweep_temporaries(tmp_path))
            assert names_in(tmp_path) == ["last.safetensors"]
        assert orphans > 0  # else every kill fell between two saves and showed nothing

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_at_each_system_call(self, tmp_path, monkeypatch, when):
        path = tmp_path / "last.safetensors"
        with monkeypatch.context() as patch:
            calls = Calls(patch, longest_write=500_000).log
            save_step(path, 0)
        assert [call for call, _ in calls].count("write") == 3
        reached, orphans = 0, 0
        for number in range(len(calls)):
            child = os.fork()
            if child == 0:
                Calls(monkeypatch, longest_write=500_000, kill=(when, number))
                save_step(path, reached + 1)
                os._exit(0)  # not reached
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
            reached = expect_step(path, reached)
            orphans += len(files.sweep_temporaries(tmp_path))
            assert names_in(tmp_path) == ["last.safetensors"]
        renamed = calls.index(("replace", "file"))
        assert reached == len(calls) - renamed - (when == "before")
        assert orphans == renamed - calls.index(("open", "file"))


class TestSweep:
    def test_only_our_own_temporaries_go(self, tmp_path):
        ours = [tmp_path / f".{name}.0123456789abcdef.segnet-tmp" for name in ("best.safetensors", "last")]
        others = [
            ".last.safetensors.tmp",
            "last.safetensors.0123456789abcdef.segnet-tmp",
            ".last.safetensors.0123456789ABCDEF.segnet-tmp",
            ".last.safetensors.0123456789abcdef.segnet-tmp.txt",
            "last.safetensors",
        ]
        for name in [*ours, *others]:
            (tmp_path / name).write_bytes(b"x")
        (tmp_path / ".folder.0123456789abcdef.segnet-tmp").mkdir()
        (tmp_path / ".link.0123456789abcdef.segnet-tmp").symlink_to(tmp_path / "last.safetensors")
        assert files.sweep_temporaries(tmp_path) == ours
        left = set(names_in(tmp_path))
        assert left == {*others, ".folder.0123456789abcdef.segnet-tmp", ".link.0123456789abcdef.segnet-tmp"}

    def test_it_knows_the_name_that_a_save_uses(self, tmp_path, monkeypatch):
        names = []

        def replace(source, target):
            names.append(Path(source))
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        with monkeypatch.context() as patch:
            patch.setattr(files.os, "replace", replace)
            with pytest.raises(CheckpointError):
                checkpoint.save(tmp_path / "last.safetensors", {}, {})
        names[0].write_bytes(b"left by a kill")
        assert names[0].parent == tmp_path
        assert files.sweep_temporaries(tmp_path) == names

    def test_missing_directory(self, tmp_path):
        with pytest.raises(OSError, match="nowhere"):
            files.sweep_temporaries(tmp_path / "nowhere")


def test_whichever_call_of_a_training_run_fails(sample, tmp_path, segnet, monkeypatch):
    """A message and an exit code; the checkpoints that are there load, and the run goes on to the same end."""
    settings = ("model=segnet-basic", "width=0.0625", "size=32", "batch=2", "steps=2", "validate_every=1", "workers=0")

    def train(out, *more):
        chosen = [part for setting in settings for part in ("--set", setting)]
        return segnet("train", "--data", sample, "--out", out, "--device", "numpy", *chosen, *more)

    with monkeypatch.context() as patch:
        calls = Calls(patch).log
        assert train(tmp_path / "whole").code == 0
    assert [call for call, _ in calls].count("replace") >= 3  # the settings, and two checkpoints at least
    chooser = random.Random(5)
    for number in chooser.sample(range(len(calls)), min(count(4, len(calls)), len(calls))):
        error, out = chooser.choice(ERRORS), tmp_path / str(number)
        with monkeypatch.context() as patch:
            Calls(patch, fail_at=number, error=error)
            finished = train(out)
        assert finished.code == 1, finished
        assert os.strerror(error) in finished.err
        assert "Traceback" not in finished.err
        for file in out.glob("*.safetensors"):
            checkpoint.load(file)
        begun = (out / "config.toml").exists()  # else there is no run to resume
        assert train(out, *(["--resume"] if begun else [])).code == 0
        assert names_in(out) == names_in(tmp_path / "whole")
        for name in set(names_in(out)) - {run_record.FILE}:  # which tells the time
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
