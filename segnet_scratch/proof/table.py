"""The op table: one row for each op (and each rung of its ladder), read by tests, fuzzing, profiler and benchmarks.

What a row is stands in rows/base.py. A new kernel needs one row, here, and nothing else.
"""

from segnet_scratch.errors import ConfigError
from segnet_scratch.ops.add import AddForward
from segnet_scratch.ops.argmax import ArgmaxForward
from segnet_scratch.ops.cross_entropy import CrossEntropyBackward, CrossEntropyForward
from segnet_scratch.ops.dropout import DropoutForward
from segnet_scratch.ops.max_pool import MaxPoolBackward, MaxPoolForward
from segnet_scratch.ops.max_unpool import MaxUnpoolBackward, MaxUnpoolForward
from segnet_scratch.ops.relu import ReluBackward, ReluForward
from segnet_scratch.proof.rows.augment import AugmentRow
from segnet_scratch.proof.rows.base import Row
from segnet_scratch.proof.rows.batch_norm import BatchNormBackwardRow, BatchNormEvaluationRow, BatchNormTrainingRow
from segnet_scratch.proof.rows.conv2d import Conv2dBackwardBiasRow, conv_rows
from segnet_scratch.proof.rows.conv2d_fused import fused_conv_rows
from segnet_scratch.proof.rows.conv2d_mma import tensor_core_rows
from segnet_scratch.proof.rows.conv_transpose2d import conv_transpose_rows
from segnet_scratch.proof.rows.maps import (
    AddRow,
    DropoutRow,
    MaxPoolRow,
    ReluRow,
    ResizeBackwardRow,
    ResizeRow,
    WindowRow,
)
from segnet_scratch.proof.rows.norm_relu import norm_rows
from segnet_scratch.proof.rows.scores import ArgmaxRow, ConfusionRow, CrossEntropyRow, SoftmaxCrossEntropyRow
from segnet_scratch.proof.rows.sgd import GradientNormRow, SgdPackRow, SgdRow

ROWS: tuple[Row, ...] = (
    *conv_rows("direct"),
    *conv_rows("tiled"),
    *tensor_core_rows(),
    *fused_conv_rows(),
    *norm_rows(),
    Conv2dBackwardBiasRow(),
    *conv_transpose_rows("direct"),
    *conv_transpose_rows("tiled"),
    BatchNormTrainingRow(),
    BatchNormEvaluationRow(),
    BatchNormBackwardRow(training=True),
    BatchNormBackwardRow(training=False),
    ReluRow(ReluForward),
    ReluRow(ReluBackward),
    MaxPoolRow(MaxPoolForward),
    WindowRow(MaxPoolBackward),
    WindowRow(MaxUnpoolForward),
    WindowRow(MaxUnpoolBackward),
    DropoutRow(DropoutForward),
    *(CrossEntropyRow(op, n) for op in (CrossEntropyForward, CrossEntropyBackward) for n in ("weights", "valid")),
    *(SoftmaxCrossEntropyRow(n) for n in ("weights", "valid")),
    ArgmaxRow(ArgmaxForward),
    ConfusionRow(),
    ResizeRow(),
    ResizeBackwardRow(),
    AddRow(AddForward),
    SgdRow(),
    SgdPackRow(),
    AugmentRow(),
    GradientNormRow(),
)


def row_named(name: str) -> Row:
    """The row of this name. ConfigError lists the names there are."""
    for row in ROWS:
        if row.name == name:
            return row
    raise ConfigError(f"there is no row {name!r} in the op table; its rows are {', '.join(row.name for row in ROWS)}")
