"""One op in all its forms: forward and gradients, and every rung of its ladder, each a row of the op table."""

from collections.abc import Mapping
from typing import Any

from segnet_scratch.errors import ConfigError
from segnet_scratch.lab.profile.record import Recorder
from segnet_scratch.lab.proof.table import ROWS, unknown_op
from segnet_scratch.ops.cases import Case, Row
from segnet_scratch.runtime.devices import Device
from segnet_scratch.runtime.observe import observe, scope

# A map of SegNet's third stage; on the host device a smaller one.
SHAPES = dict.fromkeys(("cuda", "counting"), (16, 56, 56, 256)) | {"numpy": (1, 56, 56, 256), "host": (1, 28, 28, 64)}
DIRECTIONS = ("_training_forward", "_evaluation_forward", "_forward", "_backward", "_accumulate", "_step")


def op_names() -> list[str]:
    """What can be profiled: the ops of the table without their directions and rungs."""
    return sorted({_family(row) for row in ROWS})


def _family(row: Row) -> str:
    """`conv2d` of `conv2d_backward_weight_tiled`."""
    cuts = [row.op.name.find(direction) for direction in DIRECTIONS]
    return row.op.name[: min((cut for cut in cuts if cut > 0), default=None)]


def rows_of(op: str, device: Device, rung: str | None = None) -> list[Row]:
    """The rows of an op, or of one rung, such as "bf16" or "hopper"; one of each rung only where kernels run.

    ConfigError for an unknown op or rung.
    """
    rows = [row for row in ROWS if _family(row) == op]
    if not rows:
        raise unknown_op("profile", op, op_names())
    if rung is not None:
        of_rung = {row: getattr(row, "rung", None) for row in rows}
        of_rung |= {row: rung for row in ROWS if _family(row) == f"{op}_{rung}"}
        rows = [row for row, own in of_rung.items() if own == rung]
        if not rows:
            known = ", ".join(sorted({own for own in of_rung.values() if own})) or "none"
            raise ConfigError(f"profile: {op} has no rung {rung!r}; expected one of {known}")
    if not device.runs_kernels:  # NumPy has one way, whatever the rung
        first = {row.name.removesuffix(f"_{getattr(row, 'rung', '')}"): row for row in reversed(rows)}
        rows = [row for row in rows if row in first.values()]
    return rows


def case_of(row: Row, shape: tuple[int, int, int, int], outputs: int | None, kernel: int) -> Case:
    """The row's first case in another size: a map (n, h, w, c), for convolutions `outputs` channels and a kernel.

    Channels are rounded up to what the row takes.
    """
    n, h, w = shape[:3]
    c, o = (-(-count // row.channels) * row.channels for count in (shape[3], outputs or shape[3]))
    # By the names that rows give their sizes; a row has some of them.
    sizes: Mapping[str, Any] = {
        "x": (n, h, w, c),
        "y": (n, 2 * h, 2 * w, o),
        "size": (2 * h, 2 * w),
        "c": c,
        "o": o,
        "bias": False,
        "kernel": (kernel, kernel),
        "padding": kernel // 2,
        "stride": 1,
        "pixels": n * h * w,
        "classes": c,
        "sizes": (n * h * w * c,) * 3,
    }
    template = row.cases()[0].sizes
    return Case("profile", {name: sizes.get(name, value) for name, value in template.items()})


def measure(recorder: Recorder, rows: list[Row], cases: list[Case], device: Device, passes: int) -> None:
    """Runs each row's op so many times, in the scope of the row's name; one pass before that is not timed."""
    work = []
    for row, case in zip(rows, cases, strict=True):
        op = row.plan(case, row.elements[0])
        arrays = row.inputs(op, case, row.generator(0, 0))
        on_device = {name: None if a is None else device.upload(a) for name, a in arrays.items()}
        work.append((row.name, op, on_device))
        op(device, **on_device)
    with observe(recorder):
        for _ in range(passes):
            recorder.begin_pass()
            for name, op, arrays_on_device in work:
                with scope(name):
                    op(device, **arrays_on_device)
