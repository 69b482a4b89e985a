"""Kernels with a fault put in on purpose: a checker that passes them checks nothing."""

import shutil
from pathlib import Path

import numpy as np

from segnet_scratch.device import HostDevice
from segnet_scratch.kernels import ElementTypes
from segnet_scratch.kernels.host import HostOptions, build
from segnet_scratch.kernels.signature import parse_kernels
from segnet_scratch.kernels.source import cuda_directory, read_source


class MutantDevice(HostDevice):
    """A host device that runs other kernels in place of the shipped ones of the same name."""

    def __init__(self, kernels, options=None):
        super().__init__(options)
        self.kernels = kernels

    def execute(self, kernel, *arguments):
        super().execute(self.kernels.get(kernel.name, kernel), *arguments)

    def with_options(self, **options):
        return MutantDevice(self.kernels, HostOptions(**options))


def mutant_device(folder, monkeypatch, file, old, new, dtype=np.float64):
    """A device whose kernels come from a copy of `cuda/` with `old` replaced by `new` in one file (.cu or header)."""
    copy = Path(folder) / "cuda"
    shutil.copytree(cuda_directory(), copy)
    text = (copy / file).read_text()
    assert text.count(old) == 1, f"{file} has {text.count(old)} times {old!r}"
    (copy / file).write_text(text.replace(old, new))
    sources = [read_source(path) for path in sorted(copy.glob("*.cu")) if path.name == file or file in path.read_text()]
    assert sources
    with monkeypatch.context() as patch:  # keep mutants out of the user's cache of compiled kernels
        patch.setenv("SEGNET_CACHE", str(Path(folder) / "cache"))
        for source in sources:
            build(source, ElementTypes.of(np.dtype(dtype)))
    return MutantDevice({kernel.name: kernel for source in sources for kernel in parse_kernels(source)})
