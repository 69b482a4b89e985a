"""Softmax cross-entropy of logits (P, K) and its gradient; a pixel labelled 255 (void) does not count.

A chunk of pixels is turned to (K, pixels) first: NumPy is many times faster along the pixels than along the
few classes of each.

All arrays are C-contiguous; `ops/loss/cross_entropy.py` checks shapes, and that labels are below K or void.
"""

import numpy as np

from segnet_scratch.ops.op import VOID
from segnet_scratch.runtime.workers import CHUNK_VALUES, parallel_slices, scratch


def cross_entropy_forward(
    logits: np.ndarray, labels: np.ndarray, class_weights: np.ndarray | None, smoothing: float, sums: np.ndarray
) -> None:
    """Writes sums (3,), float64: sum of weight * loss, sum of weights, number of pixels that count.

    loss = log(sum exp(logits)) - logits[label], for logits (P, K) and labels (P,), uint8. A pixel's weight is
    that of its label in class_weights (K,), or 1 where that is None. With label smoothing a share of weight * loss
    is that of every class (`ops/loss/cross_entropy.py`).
    """
    step = _chunk_pixels(logits)
    weights = _weights(logits, class_weights)
    parts = np.zeros((-(-len(logits) // step), 3), np.float64)

    def body(part: slice) -> None:
        shifted = _shifted(logits[part])
        counting = np.flatnonzero(labels[part] != VOID)
        label = labels[part][counting]
        label_logits = shifted[label, counting]
        weighted_logits = (weights @ shifted)[counting] if smoothing else None
        np.exp(shifted, out=shifted)
        log_sum = np.log(shifted.sum(axis=0)[counting])
        weight = weights[label].astype(np.float64)
        total = weight @ (log_sum - label_logits)
        if weighted_logits is not None:
            every = (weights.sum() * log_sum - weighted_logits).sum(dtype=np.float64) / len(weights)
            total = (1 - smoothing) * total + smoothing * every
        parts[part.start // step] = total, weight.sum(), len(counting)

    parallel_slices(len(logits), step, body)
    sums[...] = parts.sum(axis=0)


def cross_entropy_backward(
    logits: np.ndarray,
    labels: np.ndarray,
    class_weights: np.ndarray | None,
    smoothing: float,
    scale: float,
    dlogits: np.ndarray,
) -> None:
    """Writes dlogits (P, K) = scale * weight * (softmax(logits) - one_hot(label)); 0 at void pixels.

    With label smoothing a share of it is that of every class.
    """
    weights = _weights(logits, class_weights) * logits.dtype.type(scale)
    # What each class has from every pixel, and from its own.
    shares, weights = weights * logits.dtype.type(smoothing / len(weights)), weights * logits.dtype.type(1 - smoothing)

    def body(part: slice) -> None:
        gradient = _shifted(logits[part])
        np.exp(gradient, out=gradient)
        is_void = labels[part] == VOID
        label = np.where(is_void, 0, labels[part])
        weight = weights[label]
        gradient *= (weight + shares.sum()) / gradient.sum(axis=0)
        gradient[label, np.arange(len(label))] -= weight
        if smoothing:
            gradient -= shares[:, None]
        gradient[:, is_void] = 0
        dlogits[part] = gradient.T

    parallel_slices(len(logits), _chunk_pixels(logits), body)


def _weights(logits: np.ndarray, class_weights: np.ndarray | None) -> np.ndarray:
    """Weights (K,) in the type of the logits."""
    classes = logits.shape[1]
    return np.ones(classes, logits.dtype) if class_weights is None else class_weights.astype(logits.dtype)


def _chunk_pixels(logits: np.ndarray) -> int:
    # An odd number: at a power of two the classes of a pixel would compete for the same cache lines.
    return (CHUNK_VALUES // logits.shape[1]) | 1


def _shifted(logits: np.ndarray) -> np.ndarray:
    """Logits (pixels, K) minus the largest of each pixel, as (K, pixels): exponentials cannot overflow."""
    shifted = scratch("shifted", logits.shape[::-1], logits.dtype)
    np.copyto(shifted, logits.T)
    shifted -= shifted.max(axis=0)
    return shifted
