"""Whole detectors: what depends on the data is an operator of fixed shape, which ONNX has too."""
