"""Proof that the kernels are right: the op table, comparisons with the reference, and the gradient check."""
