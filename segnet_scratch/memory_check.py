"""Checks before the first step that a training step fits the free memory, instead of "Killed" during it."""

from math import prod

import numpy as np

from segnet_scratch.config import Config
from segnet_scratch.engine.convolutions import Convolutions
from segnet_scratch.engine.ledger import fused_account, layers_account
from segnet_scratch.engine.network import RUNG_OF_PRECISION, Network
from segnet_scratch.engine.training import two_branches
from segnet_scratch.errors import DeviceMemoryError
from segnet_scratch.parallel import ALONE, Communicator
from segnet_scratch.segnet import SegNet

_PREPARED = 4  # batches that the loader and the device hold besides that of the step
_PLANNED = 64  # images that a step is planned for at most; a larger batch is extrapolated
# Of every parameter: itself, momentum, what an update or a checkpoint makes of it, and the gradient, which the fused
# engine has among its maps.
_COPIES = {"layers": 4, "fused": 3}


def check_memory(model: SegNet, config: Config, ranks: Communicator = ALONE) -> None:
    """DeviceMemoryError where a step of this run needs more than its device has free, with a batch that would fit.

    An estimate from the ledger, on the low side: what it refuses could only have failed.
    """
    free = model.device.free_memory()
    if free is None:
        return
    if model.device.gpu is None:
        free //= ranks.local_size
    parameters = sum(prod(parameter.shape) for parameter in model.parameters())
    fixed = _COPIES[config.engine] * parameters * np.dtype(config.dtype).itemsize
    at_once = ranks.size * config.accumulate
    images = -(-config.batch // at_once)  # that go through the network together
    planned = min(images, _PLANNED)
    held = _bytes_of_step(model, config, ranks, planned)
    of_image, needed = held // planned, fixed + held
    if images > planned:  # by how it grows: gradients of parameters and partial sums do not
        needed += (images - planned) * (held - _bytes_of_step(model, config, ranks, _PLANNED // 2)) // (_PLANNED // 2)
    if needed <= free:
        return
    fitting = int(0.9 * free - fixed) // of_image * at_once
    height, width = config.image_size
    hint = f"try --set batch={fitting}" if fitting > 0 else "try a smaller size or width"
    if fitting > 0 and config.engine == "layers":
        hint += f", or --set accumulate={-(-config.batch * config.accumulate // fitting)}"
    need, have = (f"{count / 1e9:.{1 if count < 1e10 else 0}f}" for count in (needed, free))
    problem = f"batch = {config.batch} at {height}x{width} needs about {need} GB on the {model.device.name} device"
    raise DeviceMemoryError(f"{problem}, {have} are free; {hint}", needed, free)


def _bytes_of_step(model: SegNet, config: Config, ranks: Communicator, images: int) -> int:
    """Bytes of a step with so many images: maps, indices and workspaces, and the images in each batch held."""
    pixels, itemsize = prod(config.image_size), np.dtype(config.dtype).itemsize
    network = Network.of(model, images, config.image_size)
    if config.engine == "fused":
        rung = RUNG_OF_PRECISION[config.precision]
        branches = ranks.size == 1 and two_branches(model.device, rung)
        maps = fused_account(network, Convolutions.on(model.device, rung), branches).peak
    else:
        maps = layers_account(network, itemsize).peak + 2 * images * pixels * model.classes * itemsize  # and logits
    return maps + images * _PREPARED * pixels * (3 * itemsize + 1)
