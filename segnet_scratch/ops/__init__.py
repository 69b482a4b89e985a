"""The operations: one file each, with checks, plan, launches and a NumPy reference, forward and backward."""

from segnet_scratch.ops.add import add
from segnet_scratch.ops.batch_norm import batch_norm
from segnet_scratch.ops.conv2d import conv2d
from segnet_scratch.ops.conv_transpose2d import conv_transpose2d
from segnet_scratch.ops.cross_entropy import cross_entropy
from segnet_scratch.ops.dropout import dropout
from segnet_scratch.ops.max_pool import max_pool
from segnet_scratch.ops.max_unpool import max_unpool
from segnet_scratch.ops.relu import relu
from segnet_scratch.ops.resize_bilinear import resize_bilinear
from segnet_scratch.ops.windows import PoolCodes

__all__ = [
    "PoolCodes",
    "add",
    "batch_norm",
    "conv2d",
    "conv_transpose2d",
    "cross_entropy",
    "dropout",
    "max_pool",
    "max_unpool",
    "relu",
    "resize_bilinear",
]
