"""Bilinear resizing and the augmentation of batches on a device."""
