"""Spreads pieces of work over processes. A kernel that crashes or never ends takes its process along, and no more.

A GPU has one process for itself; what its results are compared with is computed ahead of it, in the others. Work under
AddressSanitizer goes to processes that were started with its library. Their reports end them, and are read from what
they wrote to stderr.
"""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from math import inf
from typing import Any

from segnet_scratch.errors import CompileError
from segnet_scratch.lab.proof.parts import PARTS
from segnet_scratch.lab.proof.parts.base import CASE_MARK
from segnet_scratch.lab.proof.work import Tally, Work
from segnet_scratch.lab.workbench.sanitizers import python_path, read_reports, sanitized_environment
from segnet_scratch.runtime.workers import worker_count

AHEAD = 4  # pieces of work for each core of the others that a GPU may be behind them: their results lie on the disk
WORKER = "segnet_scratch.lab.proof.processes"
THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "SEGNET_THREADS")


class Process:
    """A worker process, started when it is needed, and again where a piece of work ended it."""

    def __init__(self, sanitized: bool, alone: bool = False) -> None:
        self.sanitized, self.alone = sanitized, alone
        self._process: subprocess.Popen[str] | None = None
        self._stderr = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115

    def do(self, work: Work) -> Tally:
        """What came of a piece of work. A process that ends or is too slow is a failure; nothing is raised for it."""
        try:
            process = self._process or self._start()
        except CompileError as error:
            return Tally(skipped=str(error))
        assert process.stdin is not None
        assert process.stdout is not None
        begin = self._stderr.seek(0, os.SEEK_END)
        try:
            process.stdin.write(json.dumps(asdict(work)) + "\n")
            process.stdin.flush()
            ready, _, _ = select.select([process.stdout], [], [], work.limit)
            answer = process.stdout.readline() if ready else ""
        except BrokenPipeError:
            ready, answer = [process.stdout], ""
        code = 0 if answer else self._end()
        tally = Tally.from_json(json.loads(answer)) if answer else Tally()
        self._stderr.seek(begin)
        text = self._stderr.read()
        reports = read_reports(text, work.target) if self.sanitized else []
        for report in reports:
            tally.fail(work, _last_case(work, text.partition("ERROR: AddressSanitizer")[0]), report)
        if not answer and not reports:
            meaning = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            ended = f"ended with {meaning}" if ready else f"did not end within {work.limit:.0f} s"
            tally.fail(work, _last_case(work, text), f"the process {ended}:\n{text.strip()[-2000:]}")
        return tally

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._end()
        self._stderr.close()

    def _start(self) -> subprocess.Popen[str]:
        environment = sanitized_environment() if self.sanitized else {**os.environ, "PYTHONPATH": python_path()}
        # The processes share the cores; each has one for itself. That of a GPU compiles on all.
        environment |= dict.fromkeys(THREADS[: 3 if self.alone else 4], "1")
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._stderr}
        self._process = subprocess.Popen([sys.executable, "-P", "-m", WORKER], env=environment, text=True, **pipes)
        return self._process

    def _end(self) -> int:
        """Kills the process unless it has ended; its exit code."""
        assert self._process is not None
        process, self._process = self._process, None
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            with suppress(BrokenPipeError):  # it had ended, and something was still to be written to it
                stream.close()
        try:
            return process.wait(timeout=1)  # its input has ended
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


def do_all(
    works: Sequence[Work], done: Callable[[Work, Tally], None], lanes: int = 0, until: float = inf
) -> list[Work]:
    """Does all the work, in order, on as many processes at a time as there are cores (or `lanes`).

    `done` is told of each; calls take turns. Work on a GPU has one process for itself, and begins when what it names a
    folder for is there. None begins after `until` (of time.monotonic): what is left is returned. After an exception,
    Ctrl-C among them, all processes are ended and it is raised.
    """
    lanes = lanes or worker_count()
    on_gpu = [work for work in works if work.device == "cuda"]
    others = [replace(work, ahead=True) for work in on_gpu if work.folder]
    others += [work for work in works if work.device != "cuda"]
    waiting = {replace(work, ahead=False) for work in others if work.ahead}
    behind = 0  # pieces of work that are prepared, or being so, and that the GPU has not done
    state, errors = threading.Condition(), list[BaseException]()
    processes: list[Process] = []

    def take(gpu: bool) -> Work | None:
        """The next piece of work that can be done; None where there is none left."""
        nonlocal behind
        queue = on_gpu if gpu else others
        while queue and not errors and time.monotonic() < until:
            for place, work in enumerate(queue):
                if work not in waiting if gpu else not work.ahead or behind < AHEAD * lanes:
                    behind += work.ahead
                    return queue.pop(place)
            state.wait(0.2)
        return None

    def lane(gpu: bool) -> None:
        nonlocal behind
        own: dict[bool, Process] = {}
        try:
            while True:
                with state:
                    work = take(gpu)
                    if work is None:
                        return
                    if work.sanitize not in own:
                        own[work.sanitize] = Process(work.sanitize, alone=gpu)
                        processes.append(own[work.sanitize])
                tally = own[work.sanitize].do(work)
                with state:
                    if work.ahead:  # what went wrong there goes wrong once more, where it is told of
                        waiting.remove(replace(work, ahead=False))
                    else:
                        behind -= bool(work.folder)
                        done(work, tally)
                    state.notify_all()
        except BaseException as error:
            errors.append(error)

    kinds = [False] * min(lanes, len(others)) + [True] * bool(on_gpu)
    threads = [threading.Thread(target=lane, args=(gpu,), daemon=True) for gpu in kinds]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)  # in short waits, so that Ctrl-C gets through
    finally:
        for process in processes:
            process.close()
    if errors:
        raise errors[0]
    return [*on_gpu, *(work for work in others if not work.ahead)]


def _last_case(work: Work, text: str) -> str:
    """The case that was begun last."""
    if CASE_MARK in text:
        return text.rpartition(CASE_MARK)[2].partition("\n")[0]
    return f"one of the {work.cases}"


def main() -> None:
    """Ends when its input does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever started this process
    os.environ.pop("LD_PRELOAD", None)  # a sanitizer's library is here by now, and not for the programs started here
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what kernels print is no answer
    for line in sys.stdin:
        work = Work.from_json(json.loads(line))
        start = time.perf_counter()
        try:
            tally = PARTS[work.part].do(work)
        except Exception:  # of no kind that a part expects: the report has to show where
            tally = Tally()
            tally.fail(work, work.cases, traceback.format_exc())
        tally.seconds = time.perf_counter() - start
        answers.write(json.dumps(tally.to_json()) + "\n")
        answers.flush()
    answers.flush()
    os._exit(0)  # Python's end under a sanitizer is slow


if __name__ == "__main__":
    main()
