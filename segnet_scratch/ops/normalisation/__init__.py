"""Batch norm, alone and fused with ReLU and pooling."""
