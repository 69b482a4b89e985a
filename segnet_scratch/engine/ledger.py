"""What a training step keeps in memory, counted before it runs: the fused engine against the layers and PyTorch.

Counted are maps, indices and workspaces. Parameters and momenta are left out: everybody has them. Gradients of
parameters count where they lie among the maps (fused); layers and PyTorch have none yet at the fullest moment.
"""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from math import prod

from segnet_scratch.engine.arena import Arena
from segnet_scratch.engine.convolutions import Convolutions
from segnet_scratch.engine.network import PLANES_OF, Network, storage
from segnet_scratch.engine.training import RECOMPUTED, Objective, TrainingProgram, two_branches
from segnet_scratch.runtime.devices import Device


@dataclass(frozen=True)
class Account:
    """Bytes of one way to compute a training step, by what they hold; `peak` is what must exist at one time."""

    name: str
    entries: dict[str, int]

    @property
    def peak(self) -> int:
        """Bytes at the fullest moment."""
        return sum(self.entries.values())


_OF_LAYER = {"y": "convolution outputs", "codes": "indices", "z": "transient maps", "unpooled": "transient maps"}
_OF_LAYER |= dict.fromkeys(("pooled", "chosen"), "pooled maps")
_OTHER = dict.fromkeys(("r", "y", "dlogits"), "gradients of maps")
_OTHER |= dict.fromkeys(("weight", "bias"), "gradients of parameters")


def _kind(array: str, layers: Collection[str]) -> str:
    """What an array of the training program is, for whoever reads the ledger."""
    layer, _, what = array.removesuffix(PLANES_OF).removesuffix(RECOMPUTED).rpartition(".")
    kinds = _OF_LAYER if layer in layers else _OTHER
    return "workspace" if array.startswith("workspace.") else kinds.get(what, "logits, statistics, sums")


def fused_account(network: Network, kernels: Convolutions, branches: bool) -> Account:
    """The fused engine at the fullest step of its program; what the arena cannot fill counts as such.

    ShapeError where that engine cannot compute the network.
    """
    program = TrainingProgram(network, kernels, Objective(), branches)
    arena = Arena.plan(program.lifetimes(program.kept))
    fullest = max(range(len(program.steps)), key=lambda step: sum(arena.alive(step).values()))
    entries: Counter[str] = Counter()
    for array, nbytes in arena.alive(fullest).items():
        entries[_kind(array, program.y)] += nbytes
    entries["gaps between arrays"] = arena.nbytes - sum(entries.values())
    return Account("fused", dict(entries))


def layers_account(network: Network, itemsize: int = 4, index: int = 1, name: str = "layers") -> Account:
    """An engine that keeps what every layer's backward asks for, as the layers of this project do, whatever the widths.

    y for batch norm, z for the next convolution and ReLU, pooled and unpooled maps, of `itemsize` bytes an element; an
    index of `index` bytes for each pooled value; and two maps of gradients at a time.
    """
    layers = network.layers
    maps = sum(prod(layer.full) for layer in layers) * itemsize
    pooled = sum(prod(layer.out) for layer in layers if layer.block.pool)
    unpooled = sum(layer.full[0] * prod(layer.unpool) * layer.block.in_channels for layer in layers if layer.unpool)
    entries = {
        "convolution outputs": maps,
        "activations": maps,
        "pooled maps": pooled * itemsize,
        "unpooled maps": unpooled * itemsize,
        "indices": pooled * index,
        "gradients of maps": 2 * max(prod(layer.full) for layer in layers) * itemsize,
    }
    return Account(name, entries)


def accounts(network: Network, device: Device, rung: str) -> list[Account]:
    """The fused engine as the device has it, the layers in float32, PyTorch with maps as wide as the rung's.

    PyTorch on paper: no workspace of cuDNN, no copy that automatic mixed precision makes, ReLU in place.
    """
    torch = layers_account(network, storage(rung).itemsize, 8, "PyTorch")
    branches = two_branches(device, rung)
    return [fused_account(network, Convolutions.on(device, rung), branches), layers_account(network), torch]
