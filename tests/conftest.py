"""What several test files share: a small data set, the command line called in this process, a stand-in for CuPy."""

import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.data import write_voc
from support.fake_cupy import FakeCupy
from support.local_server import Server

from segnet_scratch import cli
from segnet_scratch.data import write_sample
from segnet_scratch.runtime.workers import worker_count

# Processes that test side by side share the cores; so do those that they start.
if side_by_side := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("SEGNET_THREADS", str(max(1, worker_count() // int(side_by_side))))

# Whoever starts the tests behind nohup or in the background has these ignored, and a run leaves ignored signals alone.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    """A synthetic data set of 8 training and 4 validation images of 48 x 64, six classes. Not to be changed."""
    return write_sample(tmp_path_factory.mktemp("data") / "sample", train=8, val=4, size=(48, 64))


@pytest.fixture
def cupy(monkeypatch, tmp_path) -> Iterator[FakeCupy]:
    """The stand-in in CuPy's place."""
    fake = FakeCupy().install(monkeypatch, tmp_path)
    yield fake
    fake.timeline.finish()


@pytest.fixture
def multiply_adds(monkeypatch):
    """float32 without tensor cores on a GPU, so that its layers have the bits of the host device's."""
    monkeypatch.setenv("SEGNET_FMA", "1")


@pytest.fixture
def dry_cupy(monkeypatch, tmp_path) -> Iterator[FakeCupy]:
    """One that validates and notes launches without compiling and executing them."""
    fake = FakeCupy(dry=True).install(monkeypatch, tmp_path)
    yield fake
    fake.timeline.finish()


@pytest.fixture
def voc(tmp_path):
    """A healthy data set in VOC layout, to be changed at will: see `write_voc`."""
    return write_voc(tmp_path / "set")


@pytest.fixture
def server():
    """An HTTP server on this machine: see `local_server`."""
    server = Server()
    yield server
    server.close()


@dataclass(frozen=True)
class Finished:
    """How a command ended, and what it wrote."""

    code: int
    out: str
    err: str


@pytest.fixture
def segnet(monkeypatch, capfd):
    """`segnet("eval", path, ...)` runs the command in this process; much faster than a process of its own."""

    def run(*arguments: str | Path) -> Finished:
        monkeypatch.setattr(sys, "argv", ["segnet", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Finished(int(ended.value.code or 0), *capfd.readouterr())

    return run
