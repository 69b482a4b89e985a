"""One step on a time line, for Perfetto (ui.perfetto.dev) or chrome://tracing: Chrome's trace event format."""

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from segnet_scratch.files import write_durably
from segnet_scratch.lab.profile.record import Span

ROWS = ("phases", "layers", "ops")  # one below the other, as threads of one process


def events(spans: Sequence[Span], title: str) -> list[dict[str, Any]]:
    """Complete events ("X") of phases, layers and ops, in microseconds from the start of the step."""
    found: list[dict[str, Any]] = [_name("process_name", title, 0)]
    found += [_name("thread_name", row, number) for number, row in enumerate(ROWS)]
    for row, key in enumerate((lambda span: span[0].phase, lambda span: (span[0].phase, span[0].layer))):
        for _, group in groupby(spans, key):
            first, *_, last = [*group] * 2  # also where there is but one
            found.append(_event(first[0].layer if row else first[0].phase, ROWS[row], row, first[1], last[2], {}))
    for run, begin, end in spans:
        arguments = {"layer": run.layer, "flop": run.flops, "bytes": run.bytes, "launches": len(run.launches)}
        if end > begin:
            arguments |= {"GFLOP/s": run.flops / (end - begin) / 1e9, "GB/s": run.bytes / (end - begin) / 1e9}
        found.append(_event(run.name, "op", 2, begin, end, arguments))
    return found


def _name(what: str, name: str, thread: int) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": 0, "tid": thread, "args": {"name": name}}


def _event(
    name: str, category: str, thread: int, begin: float, end: float, arguments: dict[str, Any]
) -> dict[str, Any]:
    times = {"ts": 1e6 * begin, "dur": 1e6 * (end - begin)}
    return {"name": name, "cat": category, "ph": "X", "pid": 0, "tid": thread, **times, "args": arguments}


def write(path: Path, spans: Sequence[Span], title: str) -> None:
    """Writes the file, whole or not at all."""
    text = json.dumps({"traceEvents": events(spans, title), "displayTimeUnit": "ms"}, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, [text.encode()])
