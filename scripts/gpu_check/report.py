"""The report: what ran where, and what came of each part, as JSON and as a table."""

import datetime
import json
import platform
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from gpu_check.part import Outcome
from segnet_scratch.runtime.devices import Device, cupy_facts

ROOT = Path(__file__).resolve().parents[2]
MARKS = {True: "passed", False: "FAILED", None: "-"}
Results = dict[str, tuple[Outcome, float]]  # by part: what came of it, and in how many seconds


def environment(device: Device) -> dict[str, Any]:
    """What ran where."""
    facts: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "device": device.name,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "commit": _commit(),
    }
    if device.name == "cuda":
        cupy = cupy_facts()
        facts |= {"gpu": cupy["gpus"][0]["name"], "cupy": cupy["version"]}
        facts |= {"driver": cupy["driver"], "runtime": cupy["runtime"]}
    return facts


def _commit() -> str:
    """Empty where the tree is no repository or there is no git."""
    try:
        command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def write(folder: Path, facts: dict[str, Any], results: Results) -> Path:
    """Both files, named by date and GPU; the path of the table."""
    folder.mkdir(parents=True, exist_ok=True)
    where = facts.get("gpu", facts["device"])
    name = f"{facts['date']}-{where.lower().replace(' ', '-')}"
    parts = {part: {**asdict(outcome), "seconds": round(seconds, 1)} for part, (outcome, seconds) in results.items()}
    (folder / f"{name}.json").write_text(json.dumps({"environment": facts, "parts": parts}, indent=2) + "\n")
    lines = [f"# {where}, {facts['date']}", "", f"`{json.dumps(facts)}`", ""]
    lines += ["| part | | result | seconds |", "| --- | --- | --- | --- |"]
    lines += [f"| {part} | {MARKS[o.passed]} | {o.summary} | {seconds:.0f} |" for part, (o, seconds) in results.items()]
    for part, (outcome, _) in results.items():
        if outcome.problems:
            lines += ["", f"## {part}", "", "```", *outcome.problems, "```"]
    path = folder / f"{name}.md"
    path.write_text("\n".join([*lines, ""]))
    return path


def closing_line(facts: dict[str, Any], results: Results) -> str:
    """What passed, what failed, what could not run, in one line."""
    groups = {mark: [part for part, (o, _) in results.items() if MARKS[o.passed] == mark] for mark in MARKS.values()}
    seconds = sum(seconds for _, seconds in results.values())
    text = f"gpu_check, {facts.get('gpu', facts['device'])}, {seconds:.0f} s: "
    text += f"{len(groups['passed'])} passed ({', '.join(groups['passed']) or 'none'})"
    for mark, name in (("FAILED", "FAILED"), ("-", "not judged")):
        if groups[mark]:
            text += f"; {len(groups[mark])} {name} ({', '.join(groups[mark])})"
    return text
