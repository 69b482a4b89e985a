"""A line of the doctor's report, the report, and the commands that install things."""

import importlib.util
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[2]
STYLES = {"ok": "green", "missing": "yellow", "broken": "bold red"}


@dataclass(frozen=True)
class Finding:
    """One thing that was examined."""

    name: str
    status: str  # one of STYLES
    text: str
    fix: str = ""  # the command that makes it ok


@dataclass(frozen=True)
class Diagnosis:
    """Everything found on a machine."""

    findings: list[Finding]
    devices: dict[str, bool] = field(default_factory=dict)  # which of numpy, host and cuda work

    @property
    def passed(self) -> bool:
        """Can at least one device train?"""
        return any(self.devices.values())

    def lines(self) -> list[tuple[str, str]]:
        """The report as (line, style)."""
        lines = []
        for finding in self.findings:
            lines.append((f"{finding.status:8} {finding.name:13} {finding.text}", STYLES[finding.status]))
            if finding.fix:
                lines.append((f"{'':22} fix: {finding.fix}", "bold"))
        return lines

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return {"passed": self.passed, "devices": self.devices, "findings": [asdict(f) for f in self.findings]}


def guarded(name: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    """The findings of a check; one that fails in a way that nobody thought of is a finding as well."""
    try:
        return check()
    except Exception as error:
        return [Finding(name, "broken", last_line(f"{type(error).__name__}: {error}"))]


def pip(command: str, *arguments: str) -> str:
    """The command line of pip for this Python: `pip("install", "numpy>=1.26")`."""
    python = shlex.quote(sys.executable)
    program = f"{python} -m pip {command}"
    if importlib.util.find_spec("pip") is None:  # as in environments that uv made
        uv = shutil.which("uv") is not None
        program = f"uv pip {command} --python {python}" if uv else f"{python} -m ensurepip && {program}"
    return " ".join([program, *map(shlex.quote, arguments)])


def install_extra(extra: str) -> str:
    """The command that installs what an extra of this project needs."""
    # A source tree need not be installed, and where it is, pip knows the extras of that day.
    packages = source_tree().get("optional-dependencies", {}).get(extra, [f"segnet_scratch[{extra}]"])
    return pip("install", *packages)


def source_tree() -> dict[str, Any]:
    """The table `project` of the source tree's pyproject.toml; {} for an installed package, which has none."""
    try:
        return tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    except (OSError, KeyError):
        return {}


def last_line(text: str) -> str:
    """The last line that has words: CuPy and the driver frame their messages in rules."""
    lines = [line.strip() for line in text.splitlines() if re.search(r"\w", line)]
    return lines[-1] if lines else "no message"


def first_lines(text: str, count: int = 2) -> str:
    """The first lines as one: of a compiler's report, what does not compile and the first error."""
    return " ".join(line.strip() for line in text.splitlines()[:count])
