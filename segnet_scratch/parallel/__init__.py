"""Several processes that train one network: one per GPU, or one per share of the cores.

    communicator.py   what a process knows of the others and asks of them; gradients summed as backward makes them
    mpi.py            processes of MPI: names, small values, sums of arrays of the CPU, and by NCCL between GPUs
    launch.py         `segnet train --ranks N`: starts the processes through mpirun

Whoever trains or evaluates asks its communicator, and has no case of its own for a process alone.
"""

from segnet_scratch.parallel.communicator import ALONE, Communicator, GradientSum, PeerError
from segnet_scratch.parallel.launch import start_ranks, world

__all__ = ["ALONE", "Communicator", "GradientSum", "PeerError", "start_ranks", "world"]
