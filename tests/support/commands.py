"""The command line in a process of its own, and how its messages must be."""

import os
import re
import subprocess
import sys

TINY = ["model=segnet-basic", "width=0.0625", "size=32", "batch=2", "steps=2", "workers=0"]


def train_arguments(data, out, *more, settings=TINY):
    return [
        "train",
        "--data",
        data,
        "--out",
        out,
        "--device",
        "numpy",
        *(p for s in settings for p in ("--set", s)),
        *more,
    ]


def plain(text):
    """Without colours, without the frames and line breaks of help: words with single blanks."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", " ", text).split())


def process(*arguments, code="from segnet_scratch.cli import main; main()", cwd=None, **environment):
    """A process of its own, its output a pipe."""
    clean = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS", "COLUMNS")}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={name: value for name, value in {**clean, **environment}.items() if value is not None},
    )


def assert_error(finished, code, *parts):
    """An error as it should be: exit code, one message on stderr, and no traceback."""
    assert finished.code == code, finished.err
    assert finished.err.startswith("error: " if code == 1 or "error: " in finished.err else "Usage: ")
    assert "Traceback" not in finished.err
    for part in parts:
        assert str(part) in finished.err
