"""Models and runtimes that the table of the documentation ticks, small where a size changes nothing."""

from collections.abc import Callable, Mapping
from typing import Final

import torch
from conftest import build, randomise_norms
from torch import Tensor, nn

from backbone import Backbone
from backbone.hosts.torchvision import build_detector
from backbone.pyramid import FeaturePyramid
from backbone.recipe import DetectorConfig


def backbone(name: str, **settings: object) -> nn.Module:
    """A backbone with uneven norms, frozen unless told otherwise."""
    model = build(name, **{"norm": "frozen_bn", **settings})
    randomise_norms(model)
    return model


def on_pyramid(model: nn.Module) -> nn.Module:
    """The backbone with levels up to p7."""
    assert isinstance(model, Backbone)
    return FeaturePyramid(model, out_channels=64, extra_levels="p6p7")


def pyramid(name: str) -> nn.Module:
    """A backbone of that name with p2 to p7."""
    return on_pyramid(backbone(name))


def detector(name: str, network: str = "resnet18") -> nn.Module:
    """A small detector or segmenter that finds something in noise."""
    settings: dict[str, object] = {"detector": name, "backbone": {"name": network, "norm": "bn"}, "num_classes": 4}
    if name not in ("fcn", "deeplabv3"):
        settings |= {"min_size": 128, "max_size": 200}
    if name.endswith("rcnn"):
        settings["num_proposals"] = 200
    model = build_detector(DetectorConfig.model_validate(settings))
    randomise_norms(model.backbone)  # type: ignore[arg-type]
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            _speak_up(key, parameter)
    return model.eval()


def _speak_up(key: str, parameter: Tensor) -> None:
    """Let a fresh head have opinions: large differences between places, scores above the threshold."""
    if key.endswith(("cls_logits.weight", "cls_score.weight", "rpn.head.cls_logits.weight", "mask_fcn_logits.weight")):
        parameter.normal_(0, 0.05)
    elif key.endswith(("bbox_pred.weight", "bbox_reg.weight")):
        parameter.normal_(0, 0.01)
    elif key.endswith("head.classification_head.cls_logits.bias"):
        parameter.fill_(-2.5)


MODELS: Final[Mapping[str, Callable[[], nn.Module]]] = {
    "resnet18": lambda: backbone("resnet18"),
    "resnet50": lambda: backbone("resnet50"),
    "resnet50, output stride 16": lambda: backbone("resnet50", output_stride=16),
    "resnet50, output stride 8": lambda: backbone("resnet50", output_stride=8),
    "resnet50, gn": lambda: backbone("resnet50", norm="gn"),
    "resnext50_32x4d": lambda: backbone("resnext50_32x4d"),
    "timm/convnext_atto": lambda: backbone("timm/convnext_atto", norm="bn"),
    "timm/swin_tiny_patch4_window7_224": lambda: backbone("timm/swin_tiny_patch4_window7_224", norm="bn"),
    "timm/tf_efficientnet_lite0": lambda: backbone("timm/tf_efficientnet_lite0"),
    "timm/efficientnet_b0": lambda: backbone("timm/efficientnet_b0"),
    "timm/regnetx_002": lambda: backbone("timm/regnetx_002"),
    "timm/mobilenetv3_small_100": lambda: backbone("timm/mobilenetv3_small_100"),
    "timm/vit_tiny_patch16_224": lambda: backbone("timm/vit_tiny_patch16_224", norm="bn"),
}
DETECTORS: Final = ("faster_rcnn", "mask_rcnn", "keypoint_rcnn", "retinanet", "fcos", "fcn", "deeplabv3")
