"""compute-sanitizer's four tools over every kernel, each in a process of its own, all at once."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gpu_check.part import Outcome, Work, judged

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
CLEAN = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: 0 (?:errors|hazards)")
START = 90  # seconds that a tool may need beyond those of the cases


def sanitizers(work: Work) -> Outcome:
    """Memory outside arrays, races in shared memory, uninitialised reads, barriers that not all threads reach."""
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if program is None or not work.on_gpu:
        return Outcome(None, "not run: it takes a GPU and compute-sanitizer")
    with ThreadPoolExecutor(len(TOOLS)) as pool:
        results = dict(zip(TOOLS, pool.map(lambda tool: _run(program, tool, work.seconds), TOOLS), strict=True))
    problems = [problem for result in results.values() for problem in result.problems]
    return judged("; ".join(f"{tool} {result.summary}" for tool, result in results.items()), problems)


def _run(program: str, tool: str, seconds: float) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [program, "--tool", tool, "--error-exitcode", "7", "--log-file", str(log)]
        # Of errors that calls report, CuPy's own probing makes some; those of launches reach us as exceptions.
        command += ["--report-api-errors", "no"] if tool == "memcheck" else []
        child = [sys.executable, "-m", "gpu_check.sanitized", f"{seconds:.0f}"]
        try:
            result = subprocess.run(
                [*command, *child], capture_output=True, text=True, timeout=seconds + START, env=os.environ
            )
        except subprocess.TimeoutExpired:
            return Outcome(False, "did not end", [f"{tool}: did not end within {seconds + START:.0f} s"])
        found = log.read_text(errors="replace") if log.exists() else ""
        lines = [line for line in result.stdout.splitlines() if line.startswith("{")]
    if result.returncode == 0 and CLEAN.search(found) and lines:
        counts = json.loads(lines[-1])
        problems = [f"{tool}: {kernel} has not run" for kernel in counts["missing"]]
        return Outcome(None, f"{counts['cases']} cases of {counts['kernels']} kernels", problems)
    output = [line for line in (*found.splitlines(), *result.stderr.splitlines()) if line.strip()][:60]
    return Outcome(False, "FAILED", [f"{tool} (exit code {result.returncode}):", *output])
