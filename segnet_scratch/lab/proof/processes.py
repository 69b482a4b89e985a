"""Spreads pieces of work over processes. A kernel that crashes or never ends takes its process along, and no more.

A few share a GPU, which waits for them most of the time: what they do to arrays around a launch takes far longer. Work
under AddressSanitizer goes to processes that were started with its library. Their reports end them, and are read from
what they wrote to stderr.
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
from dataclasses import asdict
from math import inf
from typing import Any

from segnet_scratch.errors import CompileError
from segnet_scratch.lab.proof.parts import PARTS
from segnet_scratch.lab.proof.parts.base import CASE_MARK
from segnet_scratch.lab.proof.work import Tally, Work
from segnet_scratch.lab.workbench.sanitizers import python_path, read_reports, sanitized_environment
from segnet_scratch.runtime.workers import worker_count

GPU_PROCESSES = 4  # at a time; each takes half a gigabyte of a GPU, and more for what it computes
GRACE = 30.0  # seconds after the time is over: what still runs then is ended, and counts as left out
WORKER = "segnet_scratch.lab.proof.processes"
BLAS_THREADS = "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"


class Process:
    """A worker process, started when it is needed, and again where a piece of work ended it."""

    def __init__(self, sanitized: bool, cores: int = 1) -> None:
        self.sanitized, self.cores = sanitized, cores
        self._process: Any = None
        self._stderr = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115

    def do(self, work: Work, until: float = inf) -> Tally | None:
        """What came of a piece of work; None where `until`, of time.monotonic(), was long over before it ended.

        A process that ends or is too slow is a failure; nothing is raised for it.
        """
        try:
            process = self._process or self._start()
        except CompileError as error:
            return Tally(skipped=str(error))
        begin = self._stderr.seek(0, os.SEEK_END)
        limit = max(0.0, min(work.limit, until + GRACE - time.monotonic()))
        try:
            process.stdin.write(json.dumps(asdict(work)) + "\n")
            process.stdin.flush()
            ready, _, _ = select.select([process.stdout], [], [], limit)
            answer = process.stdout.readline() if ready else ""
        except BrokenPipeError:
            ready, answer = [process.stdout], ""
        code = 0 if answer else self._end()
        tally = Tally.from_json(json.loads(answer)) if answer else Tally()
        self._stderr.seek(begin)
        text = self._stderr.read()
        reports = read_reports(text, work.target) if self.sanitized else []
        for report in reports:
            tally.fail(work, _last_case(work, text.partition("ERROR: AddressSanitizer")[0])[0], report)
        if not answer and not reports:
            if not ready and limit < work.limit:
                return None
            meaning = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            tally.ended = "crashed" if ready else "hung"
            how = f"the process ended with {meaning}" if ready else f"it did not end within {work.limit:.0f} s"
            case, said = _last_case(work, text)
            tally.fail(work, case, f"{tally.ended}: {how}\n{said.strip()[-2000:]}".strip())
        return tally

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._end()
        self._stderr.close()

    def _start(self) -> Any:
        environment = sanitized_environment() if self.sanitized else {**os.environ, "PYTHONPATH": python_path()}
        environment |= {**dict.fromkeys(BLAS_THREADS, "1"), "SEGNET_THREADS": str(self.cores)}
        options: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._stderr}
        options |= {"env": environment, "text": True, "start_new_session": True}  # it is ended with what it started
        self._process = subprocess.Popen([sys.executable, "-P", "-m", WORKER], **options)
        self._process.stdout.readline()  # it has come up, which may take long after the installation: now limits count
        return self._process

    def _end(self) -> int:
        """Kills the process unless it has ended, and what it started in any case; its exit code."""
        process, self._process = self._process, None
        for stream in (process.stdin, process.stdout):
            with suppress(BrokenPipeError):  # it had ended, and something was still to be written to it
                stream.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=1)  # its input has ended
        with suppress(ProcessLookupError):  # nothing is left
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # a driver may hold it back: it is none of ours any more
            return process.wait(timeout=30)
        return -signal.SIGKILL


def do_all(
    works: Sequence[Work],
    done: Callable[[Work, Tally], None],
    wanted: Callable[[Work], bool] = lambda work: True,
    lanes: int = 0,
    until: float = inf,
) -> None:
    """Does all the work, in order, on as many processes at a time as there are cores (or `lanes`), a GPU's on a few.

    `done` is told of each; calls take turns. What is not `wanted` when its turn comes is passed over. None begins after
    `until` (of time.monotonic()). After an exception, Ctrl-C among them, all processes are ended and it is raised.
    """
    lanes = lanes or worker_count()
    state, errors = threading.Condition(), list[BaseException]()
    processes: list[Process] = []

    def take(queue: list[Work], running: list[Work]) -> Work | None:
        """The next piece of work, when it can run beside the others; None where there is none left."""
        while queue and not errors and time.monotonic() < until:
            if running and (queue[0].alone or running[0].alone):
                state.wait(0.2)
            elif wanted(work := queue.pop(0)):
                running.append(work)
                return work
        return None

    def lane(queue: list[Work], running: list[Work], own: dict[bool, Process]) -> None:
        try:
            while True:
                with state:
                    work = take(queue, running)
                if work is None:
                    return
                tally = own[work.sanitize].do(work, until)
                with state:
                    running.remove(work)
                    if tally is not None:
                        done(work, tally)
                    state.notify_all()
        except BaseException as error:
            errors.append(error)

    threads = []
    for on_gpu in (True, False):
        queue = [work for work in works if (work.device == "cuda") == on_gpu]
        running, count = list[Work](), min(len(queue), lanes, GPU_PROCESSES if on_gpu else lanes)
        for _ in range(count):
            own = {sanitized: Process(sanitized, lanes // count) for sanitized in (False, True)}
            processes += own.values()
            threads.append(threading.Thread(target=lane, args=(queue, running, own), daemon=True))
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


def _last_case(work: Work, text: str) -> tuple[str, str]:
    """The case that was begun last, and what was said since."""
    if CASE_MARK not in text:
        return f"one of the {work.cases}", text
    case, _, said = text.rpartition(CASE_MARK)[2].partition("\n")
    return case, said


def _end_with(parent: int) -> None:
    """Ends this process and what it has started when whoever started it is gone, even in a kernel that never ends."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Ends when its input does."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever started this process
    os.environ.pop("LD_PRELOAD", None)  # a sanitizer's library is here by now, and not for the programs started here
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what kernels print is no answer
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        work = Work.from_json(json.loads(line))
        start = time.perf_counter()
        try:
            tally = PARTS[work.part].do(work)
        except Exception:  # of no kind that a part expects: the report has to show where
            if work.device == "cuda":  # after some errors of CUDA every later call fails: another process has to go on
                traceback.print_exc()
                os._exit(1)
            tally = Tally()
            tally.fail(work, work.cases, traceback.format_exc())
        tally.seconds = time.perf_counter() - start
        print(json.dumps(tally.to_json()), file=answers, flush=True)
    os._exit(0)  # Python's end under a sanitizer is slow


if __name__ == "__main__":
    main()
