"""Every contender of a case, on batches that both sides share in memory."""

from collections.abc import Callable, Sequence

import cupy
import torch

from bench_gpu.cases import Case
from bench_gpu.gate import data_of, initial_state
from bench_gpu.ours import OURS
from bench_gpu.peers import FORMATS, Peer, peers_of
from bench_gpu.run import INPUTS, Maker
from segnet_scratch.runtime.devices import Device


def makers_of(case: Case, device: Device, right: Sequence[str], thorough: bool) -> dict[str, Maker]:
    """Makers by name; of ours those that are right. Bytes are what a contender takes of the GPU, its model included."""
    training = case.task == "training"
    state = initial_state(0, 1.0)
    ours, theirs = [], {name: [] for name in FORMATS}
    for seed in range(INPUTS):
        images, labels = (torch.from_numpy(array).cuda() for array in data_of(case, seed))
        ours.append((device.from_dlpack(images), device.from_dlpack(labels) if training else None))
        for name, batches in theirs.items():
            nchw = images.permute(0, 3, 1, 2).contiguous(memory_format=getattr(torch, name))
            batches.append((nchw, labels.long() if training else None))

    def of_ours(name: str) -> Maker:
        def make() -> tuple[Callable[[int], object], int]:
            cupy.get_default_memory_pool().free_all_blocks()
            before = torch.cuda.mem_get_info()[0]
            contender = OURS[name](case, device, state)
            for batch in ours[:2]:  # the second is recorded
                contender.call(*batch)
            torch.cuda.synchronize()
            return (lambda number: contender.call(*ours[number])), before - torch.cuda.mem_get_info()[0]

        return make

    def of_torch(name: str, make_peer: Callable[..., Peer]) -> Maker:
        batches = theirs[next(f for f in FORMATS if f.removesuffix("_format") in name)]

        def make() -> tuple[Callable[[int], object], int]:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            peer = make_peer(state)
            for batch in batches[:2]:
                peer.call(*batch)
            torch.cuda.synchronize()
            return (lambda number: peer.call(*batches[number])), torch.cuda.max_memory_allocated() - before

        return make

    makers = {name: of_ours(name) for name in right}
    return makers | {name: of_torch(name, make) for name, make in peers_of(case, thorough).items()}
