"""What a network is built of: Tensor and its gradients, the functions on it, modules with parameters."""
