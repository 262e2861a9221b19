"""What the tests of the training programs share: small data, small recipes, and a run in this process."""

import shutil
import sys
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from typer.testing import CliRunner, Result

TOOLS: Final = Path(__file__).parents[2] / "tools"
sys.path.append(str(TOOLS))

from shapes.make_shapes_dataset import make_shapes_dataset  # noqa: E402

from backbone.command.app import app  # noqa: E402

IGNORED_WARNINGS: Final = [
    # pycocotools 2.0.11 wraps its own memory in an array class from before NumPy 2
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning",
    # Lightning 2.6 asks torch's pytree for leaves in a way that torch 2.14 is about to drop
    "ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning",
    # TensorBoard reads a module of protobuf that Python 3.12 is about to drop
    "ignore:Type google\\._upb\\._message\\..* uses PyType_Spec:DeprecationWarning",
]

TRAIN: Final[dict[str, Any]] = {
    "epochs": 2,
    "batch_size": 2,
    "learning_rate": 0.001,
    "warmup_steps": 3,
    "num_workers": 0,
    "validate_every": 9,
}
"""Four steps an epoch on the eight images of ``small_data``."""


def recipe(detector: str = "retinanet", *, norm: str = "gn", train: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the settings of a small detector for shapes of 64 x 64 pixels."""
    settings: dict[str, Any] = {
        "detector": detector,
        "backbone": {"name": "resnet18", "norm": norm},
        "num_classes": 5,
        "min_size": 64,
        "max_size": 64,
        "train": {**TRAIN, **(train or {})},
    }
    if detector not in ("deeplabv3", "fcn"):
        settings["pyramid"] = {"out_channels": 8}
    if detector.endswith("rcnn"):
        settings["rois_per_image"] = 8
    return settings


def small_data(folder: Path) -> Path:
    """Write eight training and four validation images into ``folder``."""
    make_shapes_dataset(folder, num_train=8, num_val=4, image_size=(64, 64), min_scale=0.3)
    return folder


def invoke(command: str, settings: dict[str, Any], data: Path, out: Path, *arguments: str) -> Result:
    """Run a sub-command of ``backbone`` in this process with ``settings`` as its recipe."""
    file = out.parent / f"{out.name}.yaml"
    file.write_text(yaml.safe_dump(settings))
    common = ["--config", str(file), "--data", str(data), "--device", "cpu"]
    return CliRunner().invoke(app, [command, *common, *arguments], catch_exceptions=False)


def train(settings: dict[str, Any], data: Path, out: Path, *arguments: str) -> Result:
    """Run ``backbone train`` in this process."""
    return invoke("train", settings, data, out, "--out", str(out), *arguments)


def copy_of(data: Path, folder: Path) -> Path:
    """Copy a data set to damage it."""
    return Path(shutil.copytree(data, folder))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight training and four validation images."""
    return small_data(tmp_path_factory.mktemp("shapes") / "data")
