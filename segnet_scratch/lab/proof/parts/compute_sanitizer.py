"""compute-sanitizer's four tools over every kernel, each in a process of its own, all at once.

`python -m segnet_scratch.lab.proof.parts.compute_sanitizer` is that process: fixed cases of the op table, each row and
each kernel at least once. Arrays come from cudaMalloc itself and are as large as they must be: in a pool, or between
guard zones, an access beyond an array would be no error to the tool. Outputs and workspace are not filled with
anything, so that initcheck has something to find.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic

from segnet_scratch.lab.proof.launches import kernels_of, noting_launches, rows_on
from segnet_scratch.lab.proof.parts.base import Part, kernels_on
from segnet_scratch.lab.proof.table import ROWS
from segnet_scratch.lab.proof.work import Tally, Work
from segnet_scratch.ops.cases import Case, Row
from segnet_scratch.runtime.devices import CudaDevice, Device
from segnet_scratch.runtime.launch import shipped_kernels

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
CLEAN = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: 0 (?:errors|hazards)")
SECONDS, LIMIT = 30.0, 240.0  # of cases beyond those that must be; of a tool


class ComputeSanitizer(Part):
    """Memory outside arrays, races in shared memory, uninitialised reads, barriers that not all threads reach."""

    name = "compute-sanitizer"
    proves = "memcheck, racecheck, initcheck and synccheck find nothing in any kernel"
    devices = ("cuda",)
    long = True

    def unavailable(self) -> str:
        return "" if _program() else "compute-sanitizer, a part of the CUDA toolkit, is not in PATH"

    def problems(self, work: Work, device: Device, tally: Tally) -> Iterator[str]:
        with ThreadPoolExecutor(len(TOOLS)) as pool:
            for tool, (counts, problems) in zip(TOOLS, pool.map(_run, TOOLS), strict=True):
                tally.notes.append(f"{tool} {counts.get('cases', 0)} cases of {counts.get('kernels', 0)} kernels")
                tally.counts["tools"] += 1
                yield from problems


def _program() -> str | None:
    return shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")


def _run(tool: str) -> tuple[dict[str, int], list[str]]:
    """What a tool's process counted, and what is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [str(_program()), "--tool", tool, "--error-exitcode", "7", "--log-file", str(log)]
        # Of errors that calls report, CuPy's own probing makes some; those of launches reach us as exceptions.
        command += ["--report-api-errors", "no"] if tool == "memcheck" else []
        try:
            command += [sys.executable, "-m", __name__]
            result = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
        except subprocess.TimeoutExpired:
            return {}, [f"{tool}: did not end within {LIMIT:.0f} s"]
        found = log.read_text(errors="replace") if log.exists() else ""
    lines = [line for line in result.stdout.splitlines() if line.startswith("{")]
    counts = json.loads(lines[-1]) if lines else {}
    if result.returncode == 0 and CLEAN.search(found) and counts:
        return counts, [f"{tool}: {kernel} has not run" for kernel in counts["missing"]]
    output = [line for line in (*found.splitlines(), *result.stderr.splitlines()) if line.strip()][:60]
    return counts, ["\n".join([f"{tool} (exit code {result.returncode}):", *output])]


def cases_for(table: tuple[Row, ...]) -> Iterator[tuple[Row, Case]]:
    """Of each row the last fixed case, which is a map of SegNet or near to one; then those that launch kernels which
    these do not; then the rest, rows in turn."""
    rest, missing = [], set(shipped_kernels())
    for turn in range(1, max(len(row.cases()) for row in table) + 1):
        for row in (row for row in table if turn <= len(row.cases())):
            case = row.cases()[-turn]
            found = kernels_of(row, [case]) & missing if missing else set()
            missing -= found
            if found or turn == 1:
                yield row, case
            else:
                rest.append((row, case))
    yield from rest


def main(device: CudaDevice, seconds: float) -> dict[str, object]:
    """Runs cases until each row and each kernel has run and the time is over; how many."""
    device.without_pool()
    table = rows_on(device, ROWS)
    able = kernels_on(device)
    began, cases = monotonic(), 0
    with noting_launches() as launched:
        for row, case in cases_for(table):
            if cases >= len(table) and able <= set(launched) and monotonic() - began > seconds:
                break
            op = row.plan(case, row.elements[0])
            inputs = row.inputs(op, case, row.generator(9, 0))
            op(device, **{name: None if a is None else device.upload(a) for name, a in inputs.items()})
            device.synchronise()
            cases += 1
    return {"cases": cases, "kernels": len(set(launched)), "missing": sorted(able - set(launched))}


if __name__ == "__main__":
    print(json.dumps(main(CudaDevice(), SECONDS)))
