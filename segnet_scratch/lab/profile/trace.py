"""One step on a time line, for Perfetto (ui.perfetto.dev) or chrome://tracing: Chrome's trace event format."""

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from segnet_scratch.files import write_durably
from segnet_scratch.lab.profile.record import Span

LINES = ("phases", "layers", "ops")  # one below the other, as threads of one process


def events(spans: Sequence[Span], title: str) -> list[dict[str, Any]]:
    """Complete events ("X") of phases, layers and ops, in microseconds from the start of the step."""
    found: list[dict[str, Any]] = [_event("M", "process_name", 0, args={"name": title})]
    found += [_event("M", "thread_name", number, args={"name": row}) for number, row in enumerate(LINES)]

    def add(name: str, thread: int, begin: float, end: float, args: dict[str, Any]) -> None:
        times = {"ts": 1e6 * begin, "dur": 1e6 * (end - begin)}
        found.append(_event("X", name, thread, cat=LINES[thread], args=args, **times))

    for row, key in enumerate((lambda span: span[0].phase, lambda span: (span[0].phase, span[0].layer))):
        for _, group in groupby(spans, key):
            first, *_, last = [*group] * 2  # also where there is but one
            add(first[0].layer if row else first[0].phase, row, first[1], last[2], {})
    for run, begin, end in spans:
        arguments = {"layer": run.layer, "flop": run.flops, "bytes": run.bytes, "launches": len(run.launches)}
        if end > begin:
            arguments |= {"GFLOP/s": run.flops / (end - begin) / 1e9, "GB/s": run.bytes / (end - begin) / 1e9}
        add(run.name, 2, begin, end, arguments)
    return found


def _event(kind: str, name: str, thread: int, **more: Any) -> dict[str, Any]:
    return {"name": name, "ph": kind, "pid": 0, "tid": thread, **more}


def write(path: Path, spans: Sequence[Span], title: str) -> None:
    """Writes the file, whole or not at all."""
    text = json.dumps({"traceEvents": events(spans, title), "displayTimeUnit": "ms"}, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, [text.encode()])
