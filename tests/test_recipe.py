"""A detector's recipe: what the detector is used to is filled in, and what cannot be is refused in one line."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from backbone import BackboneConfig
from backbone.config import explain, json_schema
from backbone.hosts.torchvision import build_detector
from backbone.recipe import DetectorConfig, load_detector_config

FOLDER = Path(__file__).parent.parent / "configs" / "detectors"
RECIPES = sorted(FOLDER.glob("*.yaml"))

USUAL = [
    ({"detector": "faster_rcnn"}, ("c2", "c3", "c4", "c5"), 32),
    ({"detector": "mask_rcnn"}, ("c2", "c3", "c4", "c5"), 32),
    ({"detector": "retinanet"}, ("c3", "c4", "c5"), 32),
    ({"detector": "fcos"}, ("c3", "c4", "c5"), 32),
    ({"detector": "faster_rcnn", "pyramid": None}, ("c5",), 32),
    ({"detector": "faster_rcnn", "pyramid": None, "box_head": "c5"}, ("c4",), 32),
    ({"detector": "deeplabv3"}, ("c5",), 8),
    ({"detector": "fcn", "aux_classifier": True}, ("c4", "c5"), 8),
]
BACKBONE: dict[str, Any] = {"name": "resnet18"}
INVALID: list[tuple[dict[str, Any], str]] = [
    ({"detector": "yolo"}, "detector must be one of faster_rcnn, .* got 'yolo'"),
    ({"detctor": "fcn"}, "unknown key 'detctor'; did you mean 'detector'"),
    ({"backbone": {"name": "resnet18", "freeze": 2}}, "backbone unknown key 'freeze'"),
    ({"num_classes": 0}, "num_classes must be an integer of at least 1, got 0"),
    ({"min_size": []}, "min_size must be one size in pixels or a list of them"),
    (
        {"pyramid": None, "backbone": {**BACKBONE, "out_features": ["c4", "c5"]}},
        "one map, got .* c4, c5",
    ),
    ({"detector": "retinanet", "pyramid": None}, "pyramid must not be null for retinanet"),
    ({"detector": "fcn", "pyramid": {}}, "pyramid is for .* only, got detector fcn"),
    ({"box_head": "c5"}, "box_head: c5 works on C4 alone"),
    ({"detector": "mask_rcnn", "pyramid": None, "box_head": "c5"}, "box_head is for faster_rcnn only"),
    ({"aux_classifier": True}, "aux_classifier is for deeplabv3, fcn only, got detector faster_rcnn"),
    ({"head_norm": "gn"}, "head_norm is for retinanet only, got detector faster_rcnn"),
    (
        {"detector": "retinanet", "head_norm": "gn", "pyramid": {"out_channels": 48}},
        "in 32 groups, got pyramid.out_channels 48; choose a multiple of 32",
    ),
    ({"num_keypoints": 5}, "num_keypoints is for keypoint_rcnn only"),
    ({"detector": "fcn", "backbone": {**BACKBONE, "out_features": ["c3"]}}, "a segmenter classifies c5"),
    ({"backbone": {**BACKBONE, "in_channels": 4}, "image_mean": [0.5] * 3}, "one value for each of 4 in_channels"),
    ({"train": {"lr_multipliers": {"c6": 0.1}}}, "lr_multipliers must map stem, c2, .* got {'c6': 0.1}"),
    ({"train": {"lr_multipliers": {"c2": -1}}}, "lr_multipliers must map"),
    ({"train": {"freeze_schedule": {0: 6}}}, "freeze_schedule must map one or more epochs"),
    ({"train": {"freeze_schedule": {}}}, "freeze_schedule must map one or more epochs"),
    ({"train": {"freeze_schedule": {1: 2}}}, "what is frozen from epoch 0 on"),
    ({"backbone": {**BACKBONE, "num_classes": 10}}, "no use for the backbone's classifier"),
    ({"pyramid": None, "box_head": "c5", "backbone": {**BACKBONE, "freeze_at": 5}}, "must be 0 to 4 with box_head"),
    ({"pyramid": None, "box_head": "c5", "train": {"freeze_schedule": {0: 2, 1: 5}}}, "must be 0 to 4 with box_head"),
    ({"train": {"freeze_schedule": {0: 2}}, "backbone": {**BACKBONE, "freeze_at": 2}}, "say the same thing"),
    ({"train": {"layer_decay": 0}}, "layer_decay must be above 0"),
    ({"train": {"precision": "bf16"}}, "precision must be 32-true, bf16-mixed or 16-mixed, got 'bf16'"),
]


@pytest.mark.parametrize(("settings", "out_features", "output_stride"), USUAL)
@pytest.mark.parametrize("backbone", [BACKBONE, BackboneConfig(name="resnet18")], ids=["mapping", "BackboneConfig"])
def test_backbone_gives_what_its_detector_is_used_to(
    settings: dict[str, Any], out_features: tuple[str, ...], output_stride: int, backbone: object
) -> None:
    config = DetectorConfig.model_validate({**settings, "backbone": backbone})
    assert (config.backbone.out_features, config.backbone.output_stride) == (out_features, output_stride)


def test_what_the_recipe_says_comes_first() -> None:
    backbone = {**BACKBONE, "out_features": ["c4", "c5"], "output_stride": 16}
    config = DetectorConfig.model_validate({"detector": "retinanet", "backbone": backbone})
    assert (config.backbone.out_features, config.backbone.output_stride) == (("c4", "c5"), 16)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_comes_back_from_what_it_is_written_as(path: Path) -> None:
    config = load_detector_config(path)
    assert DetectorConfig.model_validate(config.model_dump()) == config


def test_an_r_cnn_refuses_levels_with_a_gap() -> None:
    backbone = {**BACKBONE, "norm": "bn", "out_features": ["c2", "c4", "c5"]}
    config = DetectorConfig.model_validate({"detector": "faster_rcnn", "backbone": backbone})
    with torch.device("meta"), pytest.raises(ValueError, match="strides double, got strides 4, 16, 32"):
        build_detector(config)


@pytest.mark.parametrize(("settings", "rule"), INVALID)
def test_impossible_recipe_is_refused(settings: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValidationError) as caught:
        DetectorConfig.model_validate({"detector": "faster_rcnn", "backbone": BACKBONE, **settings})
    assert re.search(rule, "\n".join(explain(caught.value)))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_builds(path: Path) -> None:
    config = load_detector_config(path)
    backbone = config.backbone.model_copy(update={"weights": None, "norm": "bn", "freeze_at": 0})
    with torch.device("meta"):
        detector = build_detector(config.model_copy(update={"backbone": backbone}))
    assert sum(parameter.numel() for parameter in detector.parameters()) > 1e6


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_points_editors_to_the_schema(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=schema.json\n")


def test_checked_in_schema_is_the_generated_one() -> None:
    drift = "configs/detectors/schema.json is out of date; run `make schema`"
    assert (FOLDER / "schema.json").read_text(encoding="utf-8") == json_schema(DetectorConfig), drift
