"""Convolution, norm, residual and ReLU as one operation: what makes the package fast, and nothing else."""
