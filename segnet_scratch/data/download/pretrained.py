"""The weights that `init` knows by name: torchvision's VGG16, trained on ImageNet, in the user's cache folder."""

from pathlib import Path

from segnet_scratch.config import PRETRAINED
from segnet_scratch.data.download.fetch import Progress, fetch, silent
from segnet_scratch.runtime.cache import cache_directory

_ADDRESS = "https://download.pytorch.org/models/"


def pretrained_file(init: str, progress: Progress = silent) -> Path:
    """The file that the setting `init` means, downloaded and verified if it is one of PRETRAINED and not there yet.

    DataError, with the addresses and the place to put the file, where it cannot be had.
    """
    if init not in PRETRAINED:
        return Path(init)
    name, size = PRETRAINED[init]
    target = cache_directory() / "weights" / name
    digits = name.removesuffix(".pth").rpartition("-")[2]
    fetch([_ADDRESS + name], target, f"sha256:{digits}", size, progress, fix="start from another file: --init FILE")
    return target
