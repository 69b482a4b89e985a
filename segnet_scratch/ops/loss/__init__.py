"""Softmax cross-entropy, and what an evaluation counts."""
