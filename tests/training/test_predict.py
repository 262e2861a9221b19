"""``backbone predict``: what a trained detector finds on photos, as COCO's JSON and as pictures."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from runs import IGNORED_WARNINGS, data, recipe, train
from typer.testing import CliRunner, Result

from backbone.command.app import app
from backbone.hosts.torchvision import build_detector
from backbone.recipe import DetectorConfig
from backbone.training.facts import RunFacts, facts_of, recipe_of
from backbone.training.prediction import CocoPredictions, above

pytestmark = [pytest.mark.filterwarnings(each) for each in IGNORED_WARNINGS]
__all__ = ["data"]
NAMES = ["circle", "square", "triangle", "star"]


def predict(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["predict", "--device", "cpu", *map(str, arguments)])


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of each kind of answer."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("save_sheet", "save_curves"):
            patch.setattr(f"backbone.training.train.{name}", lambda *_: None)
        for detector in ("mask_rcnn", "fcn"):
            made = recipe(detector, norm="bn", train={"epochs": 1, "batch_size": 4})
            assert train(made, data, folder / detector).exit_code == 0
    return {detector: folder / detector for detector in ("mask_rcnn", "fcn")}


@pytest.fixture(scope="module")
def photos(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two photos, one of another size in a folder of its own, and a text."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "deep").mkdir()
    shutil.copy(data / "val" / "000000.png", folder / "a.png")
    Image.open(data / "val" / "000001.png").resize((100, 70)).save(folder / "deep" / "[dog].png")
    (folder / "b.png").write_text("no photo")
    return folder


def test_the_weights_alone_tell_recipe_and_names(runs: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    weights = runs["mask_rcnn"] / "model.pth"
    result = predict("--weights", weights, "--images", photos, "--recursive", "--out", tmp_path, "--min-score", 0)
    assert result.exit_code == 1  # of the text
    assert "b.png: cannot be read as an image" in result.stderr
    assert "1 of 3 images failed" in result.stderr
    written = [str(tmp_path / name) for name in ("a.png", "deep/[dog].png", "predictions.json")]
    assert result.stdout.splitlines() == written
    content = json.loads((tmp_path / "predictions.json").read_text())
    assert [category["name"] for category in content["categories"]] == NAMES
    assert [(image["height"], image["width"]) for image in content["images"]] == [(64, 64), (70, 100)]
    assert len(content["annotations"]) > 0
    assert all({"bbox", "score", "segmentation", "area"} <= each.keys() for each in content["annotations"])


def test_pycocotools_reads_what_was_written(runs: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    weights = runs["mask_rcnn"] / "model.pth"
    predict("--weights", weights, "--images", photos / "a.png", "--out", tmp_path, "--min-score", 0, "--no-picture")
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.json"]
    coco = COCO(tmp_path / "predictions.json")
    masks = [coco.annToMask(each) for each in coco.loadAnns(coco.getAnnIds())]
    assert [int(mask.sum()) for mask in masks] == [each["area"] for each in coco.anns.values()]


def test_a_segmenter_gives_a_region_for_each_class(runs: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    result = predict("--weights", runs["fcn"] / "model.pth", "--images", photos / "deep", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "predictions.json").read_text())
    assert all(each["segmentation"]["size"] == [70, 100] for each in content["annotations"])
    assert (tmp_path / "[dog].png").stat().st_size > 1000


def test_a_photo_is_not_replaced_by_its_picture(runs: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    shutil.copy(photos / "a.png", tmp_path / "a.png")
    result = predict("--weights", runs["fcn"] / "model.pth", "--images", tmp_path, "--out", tmp_path)
    assert (result.exit_code, "its picture would replace it" in result.stderr) == (2, True)


def test_weights_without_a_recipe_ask_for_it(photos: Path, tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(1)}, tmp_path / "model.pth")
    result = predict("--weights", tmp_path / "model.pth", "--images", photos / "a.png", "--out", tmp_path / "out")
    assert (result.exit_code, "give the detector's by --config" in result.stderr) == (2, True)


@pytest.mark.parametrize("detector", ["faster_rcnn", "retinanet", "fcn"])
def test_the_recipe_in_the_weights_is_the_recipe(detector: str) -> None:
    made = recipe(detector, train={"freeze_schedule": {0: 2, 3: 0}, "lr_multipliers": {"stem": 0.1}})
    config = DetectorConfig.model_validate({**made, "min_size": [32, 64]})
    facts = facts_of(build_detector(config), config, {1: "circle"}, {1: 1}, {})
    assert recipe_of(None, RunFacts.from_json(facts.to_json()), Path("model.pth")) == config


def found() -> dict[str, Any]:
    return {
        "boxes": torch.tensor([[1.0, 2, 5, 10], [0, 0, 4, 4]]),
        "labels": torch.tensor([2, 9]),
        "scores": torch.tensor([0.75, 0.25]),
        "keypoints": torch.tensor([[[1.0, 2, 1], [3, 4, 0]], [[0, 0, 1], [0, 0, 1]]]),
    }


def test_objects_are_written_as_coco_has_them_and_labels_of_no_category_count_for_nothing() -> None:
    predictions = CocoPredictions(None, num_classes=4)
    predictions.add("a.png", (20, 30), found())
    (only,) = predictions.content["annotations"]
    assert only["bbox"] == [1, 2, 4, 8]
    assert (only["category_id"], only["area"], only["score"], only["num_keypoints"]) == (2, 32, 0.75, 1)
    assert only["keypoints"] == [1, 2, 1, 3, 4, 0]


def test_objects_below_the_score_are_left_out() -> None:
    assert above(found(), 0.5)["labels"].tolist() == [2]
    classes = torch.zeros(2, 2, dtype=torch.int64)
    assert above({"classes": classes}, 0.5)["classes"] is classes


def test_regions_are_the_classes_pixels() -> None:
    classes = torch.zeros(6, 8, dtype=torch.int64)
    classes[2:4, 1:7] = 3
    predictions = CocoPredictions(None, num_classes=4)
    predictions.add("a.png", (6, 8), {"classes": classes})
    (only,) = predictions.content["annotations"]
    assert (only["category_id"], only["area"], only["bbox"]) == (3, 12, [1.0, 2.0, 6.0, 2.0])
    coco = COCO()
    coco.dataset = predictions.content
    coco.createIndex()
    assert np.array_equal(coco.annToMask(only), classes.numpy() == 3)
