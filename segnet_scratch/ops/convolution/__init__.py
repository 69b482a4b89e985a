"""Convolutions and their ladder of kernels, from one thread an element to tensor cores."""
