"""Typical mistakes: each gets one line that says the rule, the value received and the remedy."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models.detection import FasterRCNN

import backbone
import backbone.hosts.torchvision as torchvision_host
from backbone import (
    FeaturePyramid,
    freeze_stages,
    from_pretrained,
    load_config,
    load_detector_config,
    save_pretrained,
)
from backbone.hosts.torchvision import as_torchvision

# A type checker would find most of these mistakes before they are made.
build_backbone: Any = backbone.build_backbone
build_detector: Any = torchvision_host.build_detector
load_weights: Any = backbone.load_weights
optimize_for_inference: Any = backbone.optimize_for_inference
BackboneConfig: Any = backbone.BackboneConfig
DetectorConfig: Any = backbone.DetectorConfig

CONFIGS = Path(__file__).parent.parent / "backbone" / "configs"
BACKBONE, DETECTOR = CONFIGS / "resnet50.yaml", CONFIGS / "detectors" / "faster_rcnn_resnet50.yaml"
SMALL = build_backbone("resnet18", norm="bn", out_features=["c2"]).eval()
DEEPER = build_backbone("resnet34", norm="bn", out_features=["c2"]).state_dict()


def run(images: Any) -> object:
    return SMALL(images)


def detect_on_a_bare_pyramid() -> object:
    pyramid = FeaturePyramid(build_backbone("resnet18", norm="bn"), out_channels=8, extra_levels="maxpool")
    return FasterRCNN(pyramid, num_classes=2, min_size=64, max_size=64).eval()([torch.rand(3, 64, 64)])


# what was done -> how, the rule, the value, the remedy
MISTAKES: dict[str, tuple[Callable[[], object], str, str, str]] = {
    "misspelt name": (lambda: build_backbone("resnet52"), "unknown backbone", "'resnet52'", "did you mean 'resnet50'?"),
    "name of the paper": (lambda: build_backbone("ResNet-50"), "unknown backbone", "'ResNet-50'", "known: resnet101"),
    "timm's name alone": (
        lambda: build_backbone("convnext_tiny"),
        "unknown backbone",
        "'convnext_tiny'",
        "'timm/convnext_tiny'",
    ),
    "misspelt timm name": (
        lambda: build_backbone("timm/convnext_tinny"),
        "unknown backbone",
        "tinny",
        "did you mean 'timm/convnext_tiny'?",
    ),
    "file for a name": (lambda: build_backbone("r50.yaml"), "unknown backbone", "'r50.yaml'", "load_config(path)"),
    "misspelt key": (
        lambda: build_backbone("resnet18", freez_at=2),
        "unknown key",
        "'freez_at'",
        "did you mean 'freeze_at'?",
    ),
    "misspelt key of a config": (
        lambda: BackboneConfig("resnet18", nrom="bn"),
        "unknown key",
        "'nrom'",
        "did you mean 'norm'?",
    ),
    "freeze_at 6": (lambda: build_backbone("resnet18", freeze_at=6), "freeze_at must be 0 to 5", "got 6", "0 freezes"),
    "freeze_at 6 later": (
        lambda: freeze_stages(SMALL, 6),
        "freeze_at must be 0 to 5",
        "got 6",
        "counted from the stem",
    ),
    "norm of another library": (
        lambda: build_backbone("resnet18", norm="FrozenBN"),
        "norm must be",
        "got 'FrozenBN'",
        "frozen_bn, bn_eval, bn, sync_bn",
    ),
    "output stride 4": (
        lambda: build_backbone("resnet18", output_stride=4),
        "output_stride must be",
        "got 4",
        "32, 16 or 8",
    ),
    "features of detectron2": (
        lambda: build_backbone("resnet18", out_features=["res5"]),
        "out_features must be",
        "'res5'",
        "c2, c3, c4, c5",
    ),
    "a dict for a config": (
        lambda: build_backbone({"name": "resnet18"}),
        "takes a name",
        "got dict",
        "BackboneConfig(**",
    ),
    "a detector's config to build_backbone": (
        lambda: build_backbone(load_detector_config(DETECTOR)),
        "takes a name",
        "got DetectorConfig",
        "build_detector",
    ),
    "a detector's file to load_config": (
        lambda: load_config(DETECTOR),
        "a backbone's keys begin with name",
        "(faster_rcnn)",
        "load_detector_config",
    ),
    "a backbone's file to load_detector_config": (
        lambda: load_detector_config(BACKBONE),
        "a detector's keys are detector, backbone",
        "(resnet50)",
        "load_config",
    ),
    "no such config": (lambda: load_config("nowhere.yaml"), "must be an existing YAML file", "'nowhere.yaml'", "check"),
    "config changed in place": (
        lambda: setattr(BackboneConfig("resnet18"), "freeze_at", 2),
        "freeze_at cannot be changed",
        "freeze_at",
        "make another",
    ),
    "misspelt weights": (
        lambda: build_backbone("resnet18", weights="IMAGENET_V1"),
        "weights of resnet18 must be",
        "'IMAGENET_V1'",
        "IMAGENET1K_V1",
    ),
    "weights of another depth": (
        lambda: load_weights(SMALL, DEEPER),
        "does not fit this network",
        "12 unexpected",
        "Choose the name",
    ),
    "a model for weights": (
        lambda: load_weights(SMALL, SMALL),
        "weights must be a name, a path",
        "got ResNet",
        "model.state_dict()",
    ),
    "no such weights": (
        lambda: load_weights(SMALL, Path("nowhere.pth")),
        "must be an existing file",
        "'nowhere.pth'",
        "check the path",
    ),
    "a state dict in a config": (
        lambda: BackboneConfig("resnet18", weights=DEEPER),
        "must be a name, path or address",
        "got a state dict of",
        "load_weights",
    ),
    "channels chosen without weights": (
        lambda: build_backbone("resnet18", stem_channels_from=[2, 1, 0]),
        "stem_channels_from maps",
        "weights: null",
        "give weights",
    ),
    "uint8 images": (
        lambda: run(torch.zeros(1, 3, 9, 9, dtype=torch.uint8)),
        "must be a floating-point tensor",
        "torch.uint8",
        "model.transforms()",
    ),
    "channels last": (lambda: run(torch.rand(1, 9, 9, 3)), "(N, 3, H, W)", "(1, 9, 9, 3)", "movedim(-1, 1)"),
    "no batch": (lambda: run(torch.rand(3, 9, 9)), "(N, 3, H, W)", "(3, 9, 9)", "model.transforms()([image])"),
    "numpy images": (
        lambda: run(np.zeros((9, 9, 3))),
        "must be a floating-point tensor",
        "ndarray",
        "model.transforms()",
    ),
    "a photo": (
        lambda: run(Image.new("RGB", (9, 9))),
        "must be a floating-point tensor",
        "Image",
        "model.transforms()",
    ),
    "a list of images": (
        lambda: run([torch.rand(3, 9, 9)]),
        "must be a floating-point tensor",
        "list",
        "model.transforms()",
    ),
    "other channels": (lambda: run(torch.rand(1, 4, 9, 9)), "(N, 3, H, W)", "(1, 4, 9, 9)", "in_channels=4"),
    "classes of a detector's backbone": (
        lambda: build_detector("fcos", BackboneConfig("resnet18", num_classes=9)),
        "no use for the backbone's classifier",
        "got backbone.num_classes 9",
        "outside of backbone",
    ),
    "misspelt detector": (
        lambda: build_detector("fastrcnn", "resnet18"),
        "unknown detector",
        "'fastrcnn'",
        "did you mean 'faster_rcnn'?",
    ),
    "detector without a backbone": (
        lambda: build_detector("fcos"),
        "fcos needs a backbone",
        "got none",
        "build_detector('fcos', 'resnet50', ...)",
    ),
    "backbone for a detector": (
        lambda: build_detector(SMALL),
        "takes a detector's name",
        "got ResNet",
        "build_detector('faster_rcnn', backbone",
    ),
    "misspelt key of a detector": (
        lambda: build_detector("fcos", "resnet18", num_clases=3),
        "unknown key",
        "'num_clases'",
        "did you mean 'num_classes'?",
    ),
    "key of another detector": (
        lambda: DetectorConfig(detector="fcos", backbone="resnet18", box_head="c5"),
        "box_head is for faster_rcnn",
        "got detector fcos",
        "remove it",
    ),
    "several maps for torchvision": (
        lambda: as_torchvision(build_backbone("resnet18")),
        "same channels on every level",
        "64, 128, 256, 512",
        "put a FeaturePyramid on it",
    ),
    "bare pyramid for torchvision": (
        detect_on_a_bare_pyramid,
        "pools boxes from maps named 0",
        "p2, p3",
        "as_torchvision(pyramid)",
    ),
    "saving what cannot be": (
        lambda: save_pretrained(nn.Linear(1, 1), "x"),
        "takes a backbone",
        "got Linear",
        "build it so",
    ),
    "no such folder": (
        lambda: from_pretrained("./nowhere"),
        "takes an existing folder or an id",
        "'./nowhere'",
        "check the path",
    ),
    "dtype by its name": (
        lambda: optimize_for_inference(SMALL, dtype="bf16"),
        "dtype must be",
        "got bf16",
        "one of torch.float16",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_gets_rule_value_and_remedy_on_one_line(mistake: str) -> None:
    make, *pieces = MISTAKES[mistake]
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        make()
    text = str(caught.value)
    assert [piece for piece in pieces if piece not in text] == [], text
    assert "\n" not in text
    assert not any(word in text for word in ("pydantic", "validation error", "input_type", "https://errors"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to move to")
@pytest.mark.parametrize("move", [lambda model: model.cuda(), lambda model: model.to("cuda")])
def test_moving_to_a_gpu_that_is_not_there_is_one_line(move: Callable[[nn.Module], object]) -> None:
    with pytest.raises(
        RuntimeError, match=r"moves to a CUDA device that torch can see, got none .*; stay on the CPU"
    ) as caught:
        move(build_backbone("resnet18", out_features=["c2"]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("module", "call", "extra"),
    [
        ("timm", lambda: build_backbone("timm/resnet18"), "pip install 'backbone[timm]'"),
        ("huggingface_hub", lambda: from_pretrained("org/name"), "pip install 'backbone[hub]'"),
    ],
)
def test_missing_extra_is_named(
    module: str, call: Callable[[], object], extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "backbone.providers.timm.provider", raising=False)
    with pytest.raises(ModuleNotFoundError) as caught:
        call()
    assert extra in str(caught.value)


def test_unknown_name_without_timm_is_told_of_ours_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backbone.registry.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"unknown backbone 'convnext_tiny'; .*known: resnet101"):
        build_backbone("convnext_tiny")


@pytest.mark.parametrize("weights", ["default", "hf://org/net/model.safetensors", "timm/test_convnext.r160_in1k"])
def test_weights_without_a_network_are_said_at_once(
    weights: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import time

    pytest.importorskip("timm")
    for variable in (
        "http_proxy",
        "https_proxy",
        "all_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
        "HF_HUB_OFFLINE",
    ):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "https://nobody.invalid")
    name = "timm/test_convnext" if weights == "default" else "resnet18"
    began = time.monotonic()
    with pytest.raises(
        OSError, match=r"nobody\.invalid cannot be reached .* is not in the cache; check the connection"
    ):
        build_backbone(name, weights=weights, norm="bn")
    assert time.monotonic() - began < 20
