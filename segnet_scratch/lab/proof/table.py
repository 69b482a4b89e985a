"""The op table: one row for each op (and each rung of its ladder), read by tests, fuzzing, profiler and benchmarks.

What a row is stands in ops/cases.py; the rows of a family stand in its folder, as ROWS of each module listed here.
"""

import difflib
from collections.abc import Sequence

from segnet_scratch.errors import ConfigError
from segnet_scratch.ops.cases import Row
from segnet_scratch.ops.convolution import conv2d_cases, conv2d_fused_cases, conv2d_hopper_cases, conv_transpose2d_cases
from segnet_scratch.ops.elementwise import cases as elementwise_cases
from segnet_scratch.ops.loss import cases as loss_cases
from segnet_scratch.ops.normalisation import batch_norm_cases, norm_relu_cases
from segnet_scratch.ops.optimiser import cases as optimiser_cases
from segnet_scratch.ops.pooling import cases as pooling_cases
from segnet_scratch.ops.resampling import cases as resampling_cases

ROWS: tuple[Row, ...] = (
    *(*conv2d_cases.ROWS, *conv2d_fused_cases.ROWS, *conv2d_hopper_cases.ROWS, *conv_transpose2d_cases.ROWS),
    *(*batch_norm_cases.ROWS, *norm_relu_cases.ROWS),
    *(*elementwise_cases.ROWS, *pooling_cases.ROWS, *loss_cases.ROWS, *resampling_cases.ROWS, *optimiser_cases.ROWS),
)


def row_named(name: str) -> Row:
    """The row of this name. ConfigError lists the names there are."""
    for row in ROWS:
        if row.name == name:
            return row
    raise ConfigError(f"there is no row {name!r} in the op table; its rows are {', '.join(row.name for row in ROWS)}")


def unknown_op(command: str, name: str, ops: Sequence[str], rows: Sequence[str] = ()) -> ConfigError:
    """What to raise where a command knows no such op: with the name that is nearest, and all there are."""
    close = difflib.get_close_matches(name, [*ops, *rows], n=1)
    hint = f"did you mean {close[0]}? The ops are " if close else "expected one of "
    more = f"; of the op table also {', '.join(rows)}" if rows else ""
    return ConfigError(f"{command}: there is no op {name!r}; {hint}{', '.join(ops)}{more}")
