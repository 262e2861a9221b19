"""Every kind of backbone and every host: what tests/hosts/test_matrix.py trains, and the table in docs/matrix.md.

python tests/hosts/matrix.py --write  # writes the page; without it, prints it
"""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

BACKBONES = {
    "ResNet-50": "resnet50",
    "ResNet-50-D": "resnet50d",
    "ConvNeXt of timm": "timm/convnext_atto",
    "RegNet of timm": "timm/regnetx_002",
    "a plugin": "tiny_pyramid_net",
}
FREEZE_AT = 2
SIDE = 64  # image pixels
BOX = [4.0, 4.0, 40.0, 40.0]


class Cell(NamedTuple):
    """A model and what to do with it."""

    model: nn.Module
    loss: Callable[[], Tensor]
    infer: Callable[[], object]


def in_torchvision(detector: str, backbone: str) -> Cell:
    from backbone.hosts.torchvision import build_detector
    from backbone.recipe import DetectorConfig

    settings = {
        "detector": detector,
        "backbone": {"name": backbone, "norm": "bn", "freeze_at": FREEZE_AT},
        "num_classes": 3,
    }
    if detector == "deeplabv3":
        model = build_detector(DetectorConfig.model_validate(settings))
        images = torch.randn(2, 3, SIDE, SIDE)
        return Cell(model, lambda: model(images)["out"].square().mean(), lambda: model(images)["out"].shape)
    model = build_detector(DetectorConfig.model_validate(settings | {"min_size": SIDE, "max_size": SIDE}))
    photos = list(torch.rand(2, 3, SIDE, SIDE))
    targets = [{"boxes": torch.tensor([BOX]), "labels": torch.tensor([1])}] * 2
    return Cell(model, lambda: torch.stack(list(model(photos, targets).values())).sum(), lambda: model(photos))


def in_detectron2(_detector: str, backbone: str) -> Cell:
    detectron2 = pytest.importorskip("detectron2", reason="detectron2 is installed from its own repository")
    host: Any = pytest.importorskip("backbone.hosts.detectron2")
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model
    from detectron2.structures import Boxes, Instances
    from detectron2.utils.events import EventStorage

    cfg = get_cfg()
    host.add_backbone_config(cfg)
    configs = Path(detectron2.__file__).parents[1] / "configs"
    cfg.merge_from_file(str(configs / "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"))
    cfg.MODEL.BACKBONE.NAME = host.DROP_IN_BUILDERS[cfg.MODEL.BACKBONE.NAME]
    cfg.MODEL.BACKBONE_PLUGIN.NAME = backbone
    cfg.merge_from_list(["MODEL.RESNETS.NORM", "BN", "MODEL.DEVICE", "cpu", "MODEL.BACKBONE.FREEZE_AT", FREEZE_AT])
    model = build_model(cfg)
    objects = Instances((SIDE, SIDE), gt_boxes=Boxes(torch.tensor([BOX])))
    objects.gt_classes = torch.tensor([1])
    inputs = [{"image": torch.rand(3, SIDE, SIDE) * 255, "instances": objects} for _ in range(2)]

    def loss() -> Tensor:
        with EventStorage():
            return torch.stack(list(model(inputs).values())).sum()

    return Cell(model, loss, lambda: model(inputs))


def in_transformers(detector: str, backbone: str) -> Cell:
    transformers: Any = pytest.importorskip("transformers", reason="transformers is an extra: transformers")
    pytest.importorskip("scipy", reason="transformers matches boxes with scipy")
    host: Any = pytest.importorskip("backbone.hosts.transformers")
    from transformers_detectors import DETECTORS, images

    wanted = DETECTORS[detector]
    settings = {"name": backbone, "norm": wanted.norm, "freeze_at": FREEZE_AT}
    body = host.TransformersBackboneConfig(settings, out_features=wanted.features)
    sizes = dict(wanted.settings)
    if "encoder_in_channels" in sizes:
        sizes["encoder_in_channels"] = host.TransformersBackbone(body).channels
    model = wanted.model_class(getattr(transformers, wanted.config)(backbone_config=body, **sizes))
    return Cell(model, lambda: model(images(), **wanted.labels()).loss, lambda: model(images()))


def in_smp(architecture: str, backbone: str) -> Cell:
    smp: Any = pytest.importorskip("segmentation_models_pytorch", reason="segmentation_models_pytorch is an extra: smp")
    host: Any = pytest.importorskip("backbone.hosts.smp")
    from backbone import BackboneConfig

    config = BackboneConfig(name=backbone, norm="bn", freeze_at=FREEZE_AT)
    host.register_encoder(f"matrix-{backbone}", config)
    model = getattr(smp, architecture)(f"matrix-{backbone}", encoder_weights=None, classes=3)
    images = torch.randn(2, 3, SIDE, SIDE)
    return Cell(model, lambda: model(images).square().mean(), lambda: model.predict(images).shape)


def in_mmdetection(detector: str, backbone: str) -> Cell:
    mmdet: Any = pytest.importorskip("mmdet", reason="mmdet is in an environment of its own: docs/mmdetection.md")
    import mmdetection_stand_in

    mmdetection_stand_in.stand_in()
    pytest.importorskip("backbone.hosts.mmdetection")
    from mmdet.registry import MODELS
    from mmdet.structures import DetDataSample
    from mmengine.config import Config
    from mmengine.registry import init_default_scope
    from mmengine.structures import InstanceData

    init_default_scope("mmdet")
    bases = Path(mmdet.__file__).parent / ".mim" / "configs" / "_base_" / "models"
    settings = Config.fromfile(bases / f"{detector}_r50_fpn.py").model
    mmdetection_stand_in.with_torchvisions_roi_align(settings)
    settings.backbone = {"type": "PluginBackbone", "name": backbone, "norm": "bn", "frozen_stages": FREEZE_AT - 1}
    probe = MODELS.build(copy.deepcopy(settings.backbone))
    settings.neck.in_channels = [spec.channels for spec in probe.feature_specs.values()]
    model = MODELS.build(settings)
    samples = []
    for _ in range(2):
        sizes = dict.fromkeys(("img_shape", "ori_shape", "pad_shape", "batch_input_shape"), (SIDE, SIDE))
        sample = DetDataSample(metainfo={**sizes, "scale_factor": (1.0, 1.0)})
        sample.gt_instances = InstanceData(bboxes=torch.tensor([BOX]), labels=torch.tensor([1]))
        sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
        samples.append(sample)
    images = torch.randn(2, 3, SIDE, SIDE)

    def loss() -> Tensor:
        found = model(images, copy.deepcopy(samples), mode="loss")
        losses = [value if isinstance(value, list) else [value] for key, value in found.items() if "loss" in key]
        return torch.stack([each.sum() for values in losses for each in values]).sum()

    return Cell(model, loss, lambda: model(images, copy.deepcopy(samples), mode="predict"))


PAGE = Path(__file__).parents[2] / "docs" / "matrix.md"
HOSTS: dict[str, tuple[Callable[[str, str], Cell], dict[str, str]]] = {
    "torchvision": (
        in_torchvision,
        {"faster_rcnn": "Faster R-CNN", "retinanet": "RetinaNet", "deeplabv3": "DeepLabV3"},
    ),
    "detectron2": (in_detectron2, {"faster_rcnn": "Faster R-CNN"}),
    "transformers": (in_transformers, {"detr": "DETR", "rt_detr": "RT-DETR", "mask2former": "Mask2Former"}),
    "segmentation_models_pytorch": (in_smp, {"Unet": "Unet", "FPN": "FPN", "UPerNet": "UPerNet"}),
    "mmdetection": (in_mmdetection, {"retinanet": "RetinaNet", "faster-rcnn": "Faster R-CNN"}),
}
"""For each host how a cell is built, and the detectors or segmenters it is built for, with their names."""


def table() -> str:
    """Return the matrix as a page of Markdown."""
    lines = [
        "# Backbones and hosts",
        "",
        "Each cell is a test: the model trains for a step with the stem and C2 frozen, and predicts. Written by",
        "`python tests/hosts/matrix.py --write` from what the tests run.",
        "",
        f"| backbone | {' | '.join(HOSTS)} |",
        f"|---|{'---|' * len(HOSTS)}",
    ]
    cells = " | ".join(", ".join(names.values()) for _, names in HOSTS.values())
    lines += [f"| {label} (`{name}`) | {cells} |" for label, name in BACKBONES.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(table())
    else:
        print(table(), end="")
