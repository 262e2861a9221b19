"""Backbones in 8 bits: calibrated, chosen layer by layer, run by oneDNN."""

from backbone.inference.int8.calibration import Calibration
from backbone.inference.int8.network import CalibrationSource, LayerChoice, compute_in_int8, in_floats_again

__all__ = ["Calibration", "CalibrationSource", "LayerChoice", "compute_in_int8", "in_floats_again"]
