"""The memory of this machine, and switches of its environment."""

import contextlib
import os
from pathlib import Path

from segnet_scratch.errors import ConfigError

_VERSION_1 = "/sys/fs/cgroup/memory/memory"
_CGROUPS = (  # limit and use, of version 2 and 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "inactive_file"),
    (f"{_VERSION_1}.limit_in_bytes", f"{_VERSION_1}.usage_in_bytes", "total_inactive_file"),
)


def switch(name: str, default: bool, on: str, off: str) -> bool:
    """What an environment variable says, 1 or 0, for `on` and `off`. ConfigError for anything else."""
    asked = os.environ.get(name, "")
    if asked not in ("", "0", "1"):
        raise ConfigError(f"{name} is {asked!r}; expected 1 ({on}), 0 ({off}) or nothing")
    return asked == "1" if asked else default


def available_memory() -> int | None:
    """Bytes that this process may still take: of the machine, or of its container if that has less; None: unknown."""
    found = []
    with contextlib.suppress(OSError, ValueError, KeyError):
        facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(1024 * int(facts["MemAvailable"].split()[0]))
    for limit, usage, reclaimable in _CGROUPS:
        with contextlib.suppress(OSError, ValueError, StopIteration):
            free = int(Path(limit).read_text()) - int(Path(usage).read_text())  # "max": ValueError, no limit
            lines = Path(limit).with_name("memory.stat").read_text().splitlines()
            files = next(int(line.split()[1]) for line in lines if line.startswith(f"{reclaimable} "))
            found.append(max(0, free + files))
    if not found:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(found, default=None)
