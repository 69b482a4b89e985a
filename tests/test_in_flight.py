"""Loads in flight at once (cuda/common/in_flight.cuh): what the compiler makes of memory-bound kernels.

No result would show it if it moved each load next to its use; the kernel would wait for memory so many times as often.
"""

import pytest
from support import FULL
from support.machine_code import instructions_of, loads_before_a_use, needs_disassembler

# Of each kernel the loads that a thread begins before it uses the first; one fewer where that is converted already.
LOADS = {
    "cast_to_bfloat16": ("bfloat16", 8),
    "cast_from_bfloat16": ("bfloat16", 8),
    "relu_forward": ("float32", 4),
    "relu_backward": ("float32", 4),
    "add_forward": ("float32", 8),
    "sgd_step": ("float32", 12),
    "sgd_pack_step": ("bfloat16", 12),
    "keep_finite": ("float32", 8),
    "conv2d_backward_weight_merge": ("float32", 8),
    "gradient_norm_partial": ("float32", 7),
    "gradient_norm_merge": ("float32", 4),
    "norm_merge_statistics": ("bfloat16", 24),
    "norm_merge_gradients": ("bfloat16", 24),
    "conv2d_backward_bias_partial": ("bfloat16", 8),
    "conv2d_backward_bias_merge": ("float32", 7),
    "softmax_cross_entropy_count": ("bfloat16", 4),
    "softmax_cross_entropy": ("bfloat16", 4),
    "cross_entropy_partial": ("float32", 7),
    "cross_entropy_backward": ("float32", 7),
    "max_pool_forward_pieces": ("float32", 4),
    "max_unpool_backward_pieces": ("float32", 4),
    "batch_norm_partial_statistics": ("float32", 7),
    "batch_norm_forward": ("float32", 8),
    "batch_norm_backward": ("float32", 8),
}


def test_loads_are_counted_up_to_the_first_use():
    load = [("LDG.E.128", [8, 2]), ("IADD3", [2, 2]), ("LDG.E.128.CONSTANT", [12, 2])]
    assert loads_before_a_use([*load, ("FADD", [20, 8, 30])]) == 2
    assert loads_before_a_use([load[0], ("FADD", [20, 8, 30]), load[2], ("FADD", [20, 12, 30])]) == 1
    assert loads_before_a_use([load[0], ("LDG.E.128", [12, 8])]) == 1  # an address that was loaded
    assert loads_before_a_use([("LDG.E", [1, 2]), *load], "LDG.E.128") == 2


@needs_disassembler
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"] if FULL else ["sm_90"])
@pytest.mark.parametrize("kernel", LOADS)
def test_loads_begin_before_the_first_is_used(kernel, architecture):
    element, loads = LOADS[kernel]
    code = instructions_of(kernel, element, architecture)
    assert loads_before_a_use(code) >= loads
    assert not any(name.startswith(("LDL", "STL")) for name, _ in code), "local memory"
