"""``backbone describe``: timm's networks, detectors, recipes by name, and which weights exist."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

from backbone import BackboneConfig, build_backbone
from backbone.command.app import app
from backbone.command.description import describe, num_blocks
from backbone.command.detector_description import describe_detector
from backbone.hosts.torchvision import build_detector
from backbone.recipe import DetectorConfig
from backbone.shipped import load_recipe
from backbone.weights.published import list_weights

BLOCKS = {
    "resnet50": [0, 3, 4, 6, 3],
    "timm/regnetx_002": [0, 1, 1, 4, 7],  # arXiv:2003.13678, table of the models
    "timm/swin_tiny_patch4_window7_224": [0, 2, 2, 6, 2],
    "timm/vit_tiny_patch16_224": [0, 3, 3, 3, 3],
}


def described(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["describe", *map(str, arguments)])


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_strides_and_dilations_are_those_of_the_papers(name: str) -> None:
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    with torch.device("meta"):
        stages = describe(build_backbone(BackboneConfig(name=name, norm="bn")), (224, 224)).stages
    assert [stage.blocks for stage in stages] == BLOCKS[name]
    assert [stage.stride for stage in stages[1:]] == [4, 8, 16, 32]
    assert all(stage.dilations == (1,) and stage.channels for stage in stages)


def test_dilated_networks_of_timm_show_it() -> None:
    pytest.importorskip("timm")
    with torch.device("meta"):
        model = build_backbone(BackboneConfig(name="timm/regnetx_002", output_stride=8, norm="bn"))
    assert [stage.dilations for stage in describe(model, (224, 224)).stages][-2:] == [(1, 2), (2, 4)]


def test_a_list_of_layers_is_no_block() -> None:
    stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    assert num_blocks(stem) == 0


def test_a_feature_that_is_only_pooled_has_a_row() -> None:
    pytest.importorskip("timm")
    assert re.search(r"c5 +- +512 +32 +- +7x7 +0 ", described("timm/vgg11_bn").stdout)


def test_the_random_pyramid_of_a_plain_transformer_is_told_of() -> None:
    pytest.importorskip("timm")
    said = words(described("timm/vit_tiny_patch16_224").stdout)
    assert "pyramid whose 166,320 parameters no published weights have" in said
    assert re.search(r"pyramid( -)+ 166,320", said)


@pytest.mark.parametrize(
    "recipe",
    ["faster_rcnn_resnet50_c4", "mask_rcnn_resnet50", "keypoint_rcnn_resnet50", "fcos_resnet50", "fcn_resnet50"],
)
def test_a_detectors_totals_are_those_of_the_detector(recipe: str) -> None:
    config = load_recipe(recipe)
    assert isinstance(config, DetectorConfig)
    description = describe_detector(config, (128, 160))
    with torch.device("meta"):
        bare = config.backbone.model_copy(update={"weights": None, "norm": "bn", "freeze_at": 0})
        detector = build_detector(config.model_copy(update={"backbone": bare}))
    assert description.parameters == sum(parameter.numel() for parameter in detector.parameters())
    assert all(part.multiply_adds > 0 for part in description.parts)


def test_a_detectors_recipe_is_described_by_name_at_its_own_size() -> None:
    said = described("retinanet_resnet50").stdout
    assert "retinanet on resnet50, image 800 x 1333" in said
    assert re.search(r"total +34,068,119", said)  # torchvision's 34,014,999 and the 53,120 of its frozen norms


def test_a_local_file_comes_before_the_packages_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo").write_text("name: resnet18\nnorm: bn\nout_features: [c2]")
    assert not re.search(r"c5", described("demo").stdout.split("weights:")[0])


def test_a_file_that_is_absent_and_a_name_that_is_unknown_are_told_apart() -> None:
    assert "must be an existing YAML file, got 'faster_rcnn.yaml'" in words(described("faster_rcnn.yaml").stderr)
    assert "unknown backbone 'resnet5'" in words(described("resnet5").stderr)


def test_markup_in_a_name_is_printed_letter_by_letter(tmp_path: Path) -> None:
    file = tmp_path / "[red]a :dog:.yaml"
    file.write_text("detector: fcos\nbackbone: {name: resnet18, norm: bn}\nmin_size: 64\nmax_size: 64\n")
    assert f"{file}: fcos on resnet18" in described(file).stdout


def test_list_weights_are_those_of_the_library_with_its_accuracies() -> None:
    assert [(each.name, each.accuracy) for each in list_weights("resnet50")] == [
        ("IMAGENET1K_V2", 80.858),
        ("IMAGENET1K_V1", 76.13),
    ]
    assert "weights: IMAGENET1K_V1 (69.8 % on ImageNet)" in described("resnet18").stdout


def test_list_weights_of_timm_are_its_tags() -> None:
    pytest.importorskip("timm")
    assert "a1_in1k" in [each.name for each in list_weights("timm/resnet50")]
