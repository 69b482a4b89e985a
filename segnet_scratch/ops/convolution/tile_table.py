"""Which tile a tensor-core convolution takes on a GPU: measured by `segnet tune`, else the one its shape suggests.

A tile changes no bit of a convolution: each result is one sum in the order of the depth. What the fused and Hopper's
kernels sum up over a tile's rows for batch norm, they add in an order of the tile; so another table can change the last
bits of a training run, as another version of the kernels can.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from weakref import WeakKeyDictionary

from segnet_scratch.files import reason
from segnet_scratch.ops.convolution.conv2d_geometry import Geometry
from segnet_scratch.runtime.cache import cache_directory, cache_key, publish
from segnet_scratch.runtime.devices import Device
from segnet_scratch.runtime.launch import find_kernel

log = logging.getLogger(__name__)
# A kernel of each source that has tiles.
MEASURED = [f"conv2d_{way}_128x128" for way in ("forward_mma", "fused_forward")]
MEASURED += [f"conv2d_hopper_{way}_halo_256x64" for way in ("forward", "backward_data")]


def key_of(kind: str, rung: str, g: Geometry) -> str:
    """What a choice belongs to. `kind` is that of the kernels: "fused_forward"."""
    return f"{kind} {rung} {g.n}x{g.h}x{g.w} {g.c}->{g.o} {g.kh}x{g.kw}"


@dataclass
class TileTable:
    """Names of tiles ("128x64") by `key_of`: those that were fastest."""

    choices: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def path(gpu: str) -> Path:
        """Where the choices for a GPU are kept, for the kernels as they are now."""
        digests = (find_kernel(name).source.digest for name in MEASURED)
        return cache_directory() / "tiles" / f"{cache_key(gpu, *digests)}.json"

    @classmethod
    def load(cls, gpu: str) -> "TileTable":
        """What was measured for this GPU; empty, with a message, where the file cannot be read."""
        path = cls.path(gpu)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            choices = content["choices"]
            if content["gpu"] != gpu or not all(isinstance(s, str) for pair in choices.items() for s in pair):
                raise ValueError("it is of something else")
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            found = reason(error) if isinstance(error, OSError) else error
            log.warning("%s: expected the choices of segnet tune, got: %s; tiles go by shape; tune again", path, found)
            return cls()
        return cls(choices)

    def save(self, gpu: str, choices: Mapping[str, str]) -> Path:
        """Adds choices and writes the file, whole or not at all."""
        self.choices |= choices
        path = self.path(gpu)
        publish(path, json.dumps({"gpu": gpu, "choices": self.choices}, indent=1, sort_keys=True).encode())
        return path


_tables: WeakKeyDictionary[Device, TileTable] = WeakKeyDictionary()


def table_of(device: Device) -> TileTable:
    """The table of a device, read once; empty for a device that is no GPU."""
    if device not in _tables:
        _tables[device] = TileTable.load(device.gpu) if device.gpu else TileTable()
    return _tables[device]
