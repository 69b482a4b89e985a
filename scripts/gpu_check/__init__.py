"""Checks the cuda device on the machine at hand; run as scripts/gpu_check.sh."""
