"""The fused engine: SegNet in a few large kernels a block, on one arena, replayed as one CUDA graph a step."""
