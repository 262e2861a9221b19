"""From a model to a file that serves: one call for every runtime, checked in that runtime before it is kept.

from backbone.export import export_model
report = export_model(model, "resnet50.onnx", to="onnx")
"""

from backbone.export.checking import ExportMismatchError
from backbone.export.request import DTYPES, SUFFIXES, TARGETS, MissingExtraError
from backbone.export.runners import read_metadata
from backbone.export.writing import ExportReport, check_file, export_model

__all__ = [
    "DTYPES",
    "SUFFIXES",
    "TARGETS",
    "ExportMismatchError",
    "ExportReport",
    "MissingExtraError",
    "check_file",
    "export_model",
    "read_metadata",
]
