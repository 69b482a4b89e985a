"""The op table: one row for each op (and each rung of its ladder), read by tests, fuzzing, profiler and benchmarks.

What a row is stands in ops/cases.py. A new kernel needs one row, here, and nothing else.
"""

from segnet_scratch.errors import ConfigError
from segnet_scratch.ops.cases import Row
from segnet_scratch.ops.convolution.conv2d_cases import Conv2dBackwardBiasRow, conv_rows
from segnet_scratch.ops.convolution.conv2d_fused_cases import fused_conv_rows
from segnet_scratch.ops.convolution.conv2d_hopper_cases import hopper_rows
from segnet_scratch.ops.convolution.conv2d_lessons_cases import lesson_rows
from segnet_scratch.ops.convolution.conv2d_mma_cases import tensor_core_rows
from segnet_scratch.ops.convolution.conv_transpose2d_cases import conv_transpose_rows
from segnet_scratch.ops.elementwise.add import AddForward
from segnet_scratch.ops.elementwise.arithmetic import BINARY, UNARY, SumBackward, SumForward
from segnet_scratch.ops.elementwise.arithmetic_cases import ArithmeticRow, ElementwiseRow, SumRow
from segnet_scratch.ops.elementwise.cases import AddRow, DropoutRow, ReluRow
from segnet_scratch.ops.elementwise.dropout import DropoutForward
from segnet_scratch.ops.elementwise.relu import ReluBackward, ReluForward
from segnet_scratch.ops.loss.argmax import ArgmaxForward
from segnet_scratch.ops.loss.cases import ArgmaxRow, ConfusionRow, CrossEntropyRow, SoftmaxCrossEntropyRow
from segnet_scratch.ops.loss.cross_entropy import CrossEntropyBackward, CrossEntropyForward
from segnet_scratch.ops.loss.log_softmax import LogSoftmaxBackward, LogSoftmaxForward
from segnet_scratch.ops.loss.log_softmax_cases import LogSoftmaxRow
from segnet_scratch.ops.normalisation.batch_norm_cases import batch_norm_rows
from segnet_scratch.ops.normalisation.norm_relu_cases import norm_rows
from segnet_scratch.ops.optimiser.sgd_cases import GradientNormRow, KeepFiniteRow, SgdPackRow, SgdRow
from segnet_scratch.ops.pooling.cases import pool_rows
from segnet_scratch.ops.resampling.augment_cases import AugmentRow
from segnet_scratch.ops.resampling.resize_cases import ResizeBackwardRow, ResizeRow

ROWS: tuple[Row, ...] = (
    *conv_rows("direct"),
    *lesson_rows(),
    *conv_rows("tiled"),
    *tensor_core_rows(),
    *fused_conv_rows(),
    *hopper_rows(),
    *norm_rows(),
    Conv2dBackwardBiasRow(),
    *conv_transpose_rows("direct"),
    *conv_transpose_rows("tiled"),
    *batch_norm_rows(),
    ReluRow(ReluForward),
    ReluRow(ReluBackward),
    *pool_rows(),
    DropoutRow(DropoutForward),
    *(
        CrossEntropyRow(op, normalisation)
        for op in (CrossEntropyForward, CrossEntropyBackward)
        for normalisation in ("weights", "valid", "none")
    ),
    *(SoftmaxCrossEntropyRow(n) for n in ("weights", "valid")),
    ArgmaxRow(ArgmaxForward),
    ConfusionRow(),
    ResizeRow(),
    ResizeBackwardRow(),
    AddRow(AddForward),
    *(ArithmeticRow(operation) for operation in BINARY),
    *(ElementwiseRow(operation) for operation in UNARY),
    *(SumRow(op) for op in (SumForward, SumBackward)),
    *(LogSoftmaxRow(op) for op in (LogSoftmaxForward, LogSoftmaxBackward)),
    SgdRow(),
    SgdPackRow(),
    AugmentRow(),
    GradientNormRow(),
    KeepFiniteRow(),
)


def row_named(name: str) -> Row:
    """The row of this name. ConfigError lists the names there are."""
    for row in ROWS:
        if row.name == name:
            return row
    raise ConfigError(f"there is no row {name!r} in the op table; its rows are {', '.join(row.name for row in ROWS)}")
