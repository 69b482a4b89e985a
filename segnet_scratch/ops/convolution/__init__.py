"""Convolutions and their ladder of kernels, from one thread per element to tensor cores."""
