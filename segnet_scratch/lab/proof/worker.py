"""A process that does pieces of work, one a line of its input, and writes what each came to, one a line: JSON."""

import json
import os
import signal
import sys
import time
import traceback

from segnet_scratch.lab.proof.parts import PARTS
from segnet_scratch.lab.proof.work import Tally, Work


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
