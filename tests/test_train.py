"""tools/train.py: resumed, distributed and refrozen runs by the bytes they end with; bad input by its message."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from shapes_data import TOOLS, make_tiny_data
from typer.testing import CliRunner

sys.path.insert(0, str(TOOLS))
import train as tool  # noqa: E402
from callbacks import load_checkpoint  # noqa: E402

RETINANET: dict[str, Any] = {
    "detector": "retinanet",
    "backbone": {"name": "resnet18", "norm": "gn"},
    "pyramid": {"out_channels": 8},
    "num_classes": 5,
    "min_size": 64,
    "max_size": 64,
}
FASTER_RCNN: dict[str, Any] = {
    **RETINANET,
    "detector": "faster_rcnn",
    "backbone": {"name": "resnet18", "norm": "bn"},
    "rois_per_image": 16,
}
TRAIN: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 2,
    "learning_rate": 0.001,
    "warmup_steps": 3,
    "num_workers": 0,
    "validate_every": 9,
}
"""What the tests train: four steps an epoch on eight images of 64 x 64 pixels."""
