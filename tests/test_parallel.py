"""What several ranks need before they run: who they are, what each takes, how they are started. No MPI is needed."""

import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from support.commands import assert_error
from support.training import start

from segnet_scratch.data import EvalTransform, Loader, VOCDataset
from segnet_scratch.errors import ConfigError, DataError, DeviceError, MissingLibraryError
from segnet_scratch.parallel import ALONE, launch, start_ranks, world
from segnet_scratch.parallel.communicator import shares


class Others:
    """mpi4py's communicator, of ranks that say what this one says."""

    def __init__(self, size):
        self.size = size

    def Dup(self):
        return self

    def Get_rank(self):
        return 1

    def Get_size(self):
        return self.size

    def allgather(self, value):
        return [value] * self.size


@pytest.fixture(autouse=True)
def unstarted(monkeypatch):
    """Nobody has started this process, whoever runs the tests; its environment is its own."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    for name in (*launch.LAUNCHED, *launch.SIZES):
        os.environ.pop(name, None)
    world.cache_clear()
    yield
    world.cache_clear()


def started(monkeypatch, size, seen=None):
    os.environ |= {"PMI_RANK": "1", "PMI_SIZE": str(size)}
    comm, names = (
        Others(seen or size),
        {"Get_processor_name": lambda: "here", "Get_library_version": lambda: "An MPI\n"},
    )
    monkeypatch.setattr(
        launch,
        "require",
        lambda module, *_: SimpleNamespace(COMM_WORLD=comm, **names, threadpool_limits=lambda threads: None),
    )


def test_a_process_that_nobody_started_is_alone():
    assert world() is ALONE
    assert (ALONE.size, ALONE.leads, ALONE.label, ALONE.all_gather(3), ALONE.all_reduce(0.5)) == (1, True, "", [3], 0.5)
    start_ranks(None)
    start_ranks(1)


def test_ranks_of_a_machine_share_its_cores_and_take_a_gpu_each(monkeypatch):
    started(monkeypatch, 2)
    monkeypatch.delenv("SEGNET_THREADS", raising=False)
    os.environ["CUDA_VISIBLE_DEVICES"] = "4,7"
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)), raising=False)
    ranks = world()
    assert (ranks.rank, ranks.size, ranks.local_size, ranks.label) == (1, 2, 2, "rank 1 on here: ")
    assert os.environ["SEGNET_THREADS"] == "3"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"
    assert all(member.endswith(", GPU 7") for member in ranks.members)


def test_an_mpirun_of_another_mpi_is_named(monkeypatch):
    started(monkeypatch, 4, seen=1)
    with pytest.raises(DeviceError, match=r"mpirun has started 4 processes, the .* mpi4py \(An MPI\) sees 1"):
        world()


def test_without_mpi4py(monkeypatch, segnet, sample, tmp_path):
    os.environ["PMI_RANK"] = "0"
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(MissingLibraryError, match=r"pip install 'segnet_scratch\[parallel\]'"):
        world()
    assert_error(segnet("train", "--data", sample, "--out", tmp_path), 1, "several ranks: expected the library mpi4py")


def test_the_command_is_started_again_by_mpirun(monkeypatch, tmp_path):
    commands = []
    monkeypatch.setattr(launch, "_replace_process", commands.append)
    monkeypatch.setattr(sys, "argv", ["segnet", "train", "--ranks", "3"])
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    (tmp_path / "mpirun").touch()
    start_ranks(3)
    again = [sys.executable, "-m", "segnet_scratch", "train", "--ranks", "3"]
    assert commands == [[str(tmp_path / "mpirun"), "-n", "3", *again]]
    started(monkeypatch, 2)
    start_ranks(2)  # as one of them
    with pytest.raises(ConfigError, match="--ranks 3: mpirun has started 2; leave --ranks out"):
        start_ranks(3)
    assert len(commands) == 1


def test_without_mpirun(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    os.environ["PATH"] = str(tmp_path)
    with pytest.raises(MissingLibraryError, match=r"--ranks 2: .*pip install 'segnet_scratch\[parallel\]'"):
        start_ranks(2)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_image_of_an_epoch_is_read_once_whoever_reads_it(sample, ranks):
    dataset, transform = VOCDataset(sample, "train"), EvalTransform((32, 32))
    whole = list(Loader(dataset, transform, 5, seed=3, workers=0).epoch(2))
    parts = [list(Loader(dataset, transform, 5, seed=3, workers=0, share=(r, ranks)).epoch(2)) for r in range(ranks)]
    for number, batch in enumerate(whole):
        of_ranks = [part[number] for part in parts]
        assert [len(part.ids) for part in of_ranks] == list(shares(len(batch.ids), ranks))
        for rank, part in enumerate(of_ranks):
            assert part.ids == batch.ids[rank::ranks]
            np.testing.assert_array_equal(part.images, batch.images[rank::ranks])


def test_a_batch_gives_each_rank_an_image_and_each_part_one(sample, tmp_path, monkeypatch):
    dataset = VOCDataset(sample, "train")
    with pytest.raises(DataError, match="a batch of 3 of 8 samples does not give each of 4 ranks one"):
        Loader(dataset, EvalTransform((32, 32)), 5, share=(0, 4))
    started(monkeypatch, 2)
    with pytest.raises(ConfigError, match=r"batch: 4 images do not give each of 2 ranks 3 parts; raise it to 6"):
        start(sample, tmp_path, batch=4, accumulate=3, ranks=world())
    with pytest.raises(ConfigError, match="it takes a batch whole, and batch norm by rank"):
        start(sample, tmp_path, batch=4, engine="fused", width=1 / 8, sync_bn=True, ranks=world())
