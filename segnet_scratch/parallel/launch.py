"""Who started this process, and how several of it are started on one machine."""

import functools
import os
import shutil
import sys
from pathlib import Path
from typing import NoReturn

from segnet_scratch.errors import ConfigError, DeviceError, MissingLibraryError, require
from segnet_scratch.parallel.communicator import ALONE, Communicator
from segnet_scratch.parallel.mpi import MpiCommunicator

# What process managers tell each process that they start: MPICH and srun --mpi=pmi2, PMIx, Open MPI.
LAUNCHED = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK")
SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")  # the last where PMIx names none
INSTALL = "pip install 'segnet_scratch[parallel]'"


@functools.cache
def world() -> Communicator:
    """The ranks that this process was started with by mpirun or srun; without them it is alone.

    On a machine with several of them each takes its share of the cores, and the GPU of its local rank. Before anything
    computes. MissingLibraryError where mpi4py or an MPI library is missing, DeviceError where they are not mpirun's.
    """
    if not any(name in os.environ for name in LAUNCHED):
        return ALONE
    try:
        mpi = require("mpi4py.MPI", "parallel", "several ranks")
    except RuntimeError as error:  # mpi4py finds no MPI library
        raise MissingLibraryError(f"several ranks: mpi4py finds no MPI library ({error}); {INSTALL}") from error
    comm = mpi.COMM_WORLD
    expected = next((int(os.environ[name]) for name in SIZES if name in os.environ), comm.Get_size())
    if comm.Get_size() != expected:
        library, other = mpi.Get_library_version().splitlines()[0], mpirun() or "the mpirun of that library"
        raise DeviceError(
            f"mpirun has started {expected} processes, the MPI library of mpi4py ({library}) sees {comm.Get_size()}: "
            f"they are of different MPI; start with {other}"
        )
    if comm.Get_size() == 1:
        return ALONE
    ranks = MpiCommunicator(comm, mpi.Get_processor_name())
    _share_machine(ranks)
    return ranks


def _share_machine(ranks: Communicator) -> None:
    mine = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    sharing = ranks.all_gather((ranks.host, mine)).count((ranks.host, mine))  # srun may have given each its own
    threads = max(1, len(mine) // sharing)
    os.environ.setdefault("SEGNET_THREADS", str(threads))
    require("threadpoolctl", "parallel", "several ranks").threadpool_limits(int(os.environ["SEGNET_THREADS"]))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if visible == [""]:
        folder = Path("/proc/driver/nvidia/gpus")
        visible = [str(index) for index in range(len(list(folder.iterdir())))] if folder.is_dir() else []
    own = visible[ranks.local_rank % len(visible)] if visible else ""
    if own:
        os.environ["CUDA_VISIBLE_DEVICES"] = own
    gpus = ranks.all_gather(f", GPU {own}" if own else "")
    ranks.members = [f"{text}{gpu}" for text, gpu in zip(ranks.members, gpus, strict=True)]


def mpirun() -> str | None:
    """The mpirun of this Python's environment, or that of the path."""
    beside = Path(sys.executable).parent / "mpirun"
    return str(beside) if beside.exists() else shutil.which("mpirun") or shutil.which("mpiexec")


def start_ranks(count: int | None) -> None:
    """This command again, as so many ranks on this machine; returns where this process is one of them already.

    ConfigError where it is one of another number, MissingLibraryError without mpirun or mpi4py.
    """
    if any(name in os.environ for name in LAUNCHED):
        if count not in (None, world().size):
            raise ConfigError(f"--ranks {count}: mpirun has started {world().size}; leave --ranks out")
        return
    if count is None or count == 1:
        return
    program = mpirun()
    if program is None:
        raise MissingLibraryError(f"--ranks {count}: expected mpirun, which is not in the path; {INSTALL}")
    _replace_process([program, "-n", str(count), sys.executable, "-m", "segnet_scratch", *sys.argv[1:]])


def _replace_process(command: list[str]) -> NoReturn:
    sys.stdout.flush()
    os.execv(command[0], command)  # signals go to mpirun, which passes them on
