"""Copies of a model for inference, and CUDA graphs of them."""
