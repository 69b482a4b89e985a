"""Standard output as the commands write to it, and how far they say they have come."""

import io
import re
import sys

import numpy as np
import pytest
from rich.console import Console
from support.kernels import needs_compiler

from segnet_scratch import progress
from segnet_scratch.cli.common import Output
from segnet_scratch.cli.data import statistics_table
from segnet_scratch.cli.kernels import _arrays
from segnet_scratch.cli.profile import _memory_table
from segnet_scratch.data import VOC_CLASSES, VOCDataset, class_statistics
from segnet_scratch.display import scores_table
from segnet_scratch.engine.ledger import accounts
from segnet_scratch.engine.network import Network
from segnet_scratch.evaluate import Evaluation
from segnet_scratch.lab.profile.measure import How, Workload, profile_step
from segnet_scratch.lab.profile.tables import show
from segnet_scratch.lab.workbench import run_kernel
from segnet_scratch.metrics import scores
from segnet_scratch.runtime.devices import get_device
from segnet_scratch.segnet import SegNet


class Broken(io.StringIO):
    def __init__(self, error):
        super().__init__()
        self.error, self.tries = error, 0

    def write(self, text):
        self.tries += 1
        raise self.error


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(5, "EIO"), ValueError("closed file")])
def test_a_stream_that_fails_is_silenced_and_remembered(monkeypatch, error):
    output, stream = Output("stdout"), Broken(error)
    monkeypatch.setattr(sys, "stdout", stream)
    for _ in range(3):
        assert output.write("text") == 4
    output.flush()
    assert stream.tries == 1
    assert isinstance(output.fault, OSError)
    assert not output.isatty()


def test_without_a_stream(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    output = Output("stdout")
    output.write("text")
    assert (output.fault, output.isatty(), output.encoding) == (None, False, "utf-8")


@pytest.mark.parametrize(
    ("encoding", "text", "shown"),
    [
        ("utf-8", "2_\udcdf.jpg", "2_\\udcdf.jpg"),
        ("ascii", "caf\u00e9", "caf\\xe9"),
        ("utf-8", "caf\u00e9", "caf\u00e9"),
    ],
)
def test_names_that_the_encoding_lacks_are_escaped(monkeypatch, encoding, text, shown):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding, "strict"))
    Console(file=Output("stdout"), width=80).print(text)
    assert raw.getvalue().decode(encoding).strip() == shown


def test_without_a_terminal_a_line_comes_now_and_then(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress, "perf_counter", lambda: clock[0])
    out = io.StringIO()
    with progress.watched(Console(file=out), "evaluate", 400) as watch:
        for second in range(1, 101):
            clock[0] = float(second)
            watch.advance(1)
    assert out.getvalue().splitlines() == [
        "evaluate 30/400  0:06:10 left",
        "evaluate 60/400  0:05:40 left",
        "evaluate 90/400  0:05:10 left",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0:00:00 left"), (59.7, "0:01:00 left"), (36_000, "10:00:00 left"), (float("nan"), "")]
)
def test_the_remaining_time(seconds, text):
    assert progress.remaining(seconds) == text


@pytest.mark.parametrize("width", [60, 80])
def test_tables_keep_their_numbers_in_a_narrow_terminal(sample, width):
    classes = len(VOC_CLASSES)
    matrix = np.full((classes, classes), 1_234_567)
    found = Evaluation(scores(matrix), 0.5, 1449, VOC_CLASSES, 0.25)
    out = io.StringIO()
    console = Console(file=out, width=width)
    console.print(scores_table(found))
    console.print(statistics_table(class_statistics(VOCDataset(sample, "train")), "train"))
    console.print(
        _memory_table(accounts(Network(SegNet.blocks_of(1.0), 21, 16, (224, 224)), get_device("numpy"), "bf16"), "MiB")
    )
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "\u2026" not in text
    assert text.count("4.8") >= classes  # the share of every class, whole


def test_a_profile_goes_on_below_where_a_terminal_is_too_narrow():
    found = profile_step(Workload("segnet-basic", width=0.0625, size=(32, 32)), get_device("numpy"), How(1))

    def lines(width):
        out = io.StringIO()
        show(Console(file=out, width=width), found, by_layer=True)
        # Sentences are broken by the terminal.
        return [line for line in out.getvalue().splitlines() if not re.search("[,;:] ", line)]

    def numbers(width):
        return sorted(re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])", "\n".join(lines(width))))

    assert len(numbers(300)) > 100
    assert max(map(len, lines(300))) > 80
    for width in (60, 80):
        assert max(map(len, lines(width))) <= width
        assert "\u2026" not in "".join(lines(width))
        assert numbers(width) == numbers(300)


@needs_compiler
def test_the_arrays_of_a_kernel_fit_60_columns():
    out = io.StringIO()
    result = run_kernel("relu_forward", shapes={"x": (2, 1000), "y": (2, 1000)}, arguments={"count": 2000})
    Console(file=out, width=60).print(_arrays(result))
    assert "\u2026" not in out.getvalue()
    assert max(map(len, out.getvalue().splitlines())) <= 60


def test_colons_stay_colons(monkeypatch):
    from segnet_scratch.cli.common import console

    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    console.print("photos/:smiley:.jpg [bold]x[/bold]")
    assert out.getvalue() == "photos/:smiley:.jpg [bold]x[/bold]\n"
