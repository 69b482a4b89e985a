"""SegNet without a deep learning framework: hand-written CUDA kernels, a minimal autograd, SGD."""

from segnet_scratch.autograd import Tensor, no_grad, tensor
from segnet_scratch.device import get_device
from segnet_scratch.segnet import SegNet, SegNetBasic
from segnet_scratch.weights import load

__version__ = "0.1.0"

__all__ = ["SegNet", "SegNetBasic", "Tensor", "__version__", "get_device", "load", "no_grad", "tensor"]
