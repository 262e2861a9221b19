"""Every kind of backbone in every kind of detector: one training step and one inference each."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backbone import register_backbone
from backbone import registry as registry_module
from backbone.hosts.torchvision import build_detector
from backbone.recipe import DetectorConfig

EXAMPLE = Path(__file__).parents[1] / "providers" / "example_plugin"

BACKBONES = ("resnet50", "timm/convnext_atto", "timm/regnetx_002", "tiny_pyramid_net")
FREEZE_AT = 2
SIDE = 64  # image pixels

Losses = Callable[[], Tensor]


@pytest.fixture(autouse=True)
def _example_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the example as its entry point would; tests/test_plugin.py installs it."""
    monkeypatch.setattr(registry_module, "_constructors", dict(registry_module._constructors))
    monkeypatch.syspath_prepend(str(EXAMPLE))
    import example_plugin

    register_backbone("tiny_pyramid_net")(example_plugin.build)


def in_torchvision(detector: str, backbone: str) -> tuple[nn.Module, Losses, Callable[[], object]]:
    settings = {
        "detector": detector,
        "backbone": {"name": backbone, "norm": "bn", "freeze_at": FREEZE_AT},
        "num_classes": 3,
    }
    if detector == "deeplabv3":
        model = build_detector(DetectorConfig.model_validate(settings))
        images = torch.randn(2, 3, SIDE, SIDE)
        return model, lambda: model(images)["out"].square().mean(), lambda: model(images)["out"].shape
    model = build_detector(DetectorConfig.model_validate(settings | {"min_size": SIDE, "max_size": SIDE}))
    photos = list(torch.rand(2, 3, SIDE, SIDE))
    targets = [{"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1])}] * 2
    return model, lambda: torch.stack(list(model(photos, targets).values())).sum(), lambda: model(photos)


def in_detectron2(detector: str, backbone: str) -> tuple[nn.Module, Losses, Callable[[], object]]:
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
    objects = Instances((SIDE, SIDE), gt_boxes=Boxes(torch.tensor([[4.0, 4.0, 40.0, 40.0]])))
    objects.gt_classes = torch.tensor([1])
    inputs = [{"image": torch.rand(3, SIDE, SIDE) * 255, "instances": objects} for _ in range(2)]

    def loss() -> Tensor:
        with EventStorage():
            return torch.stack(list(model(inputs).values())).sum()

    return model, loss, lambda: model(inputs)


HOSTS: dict[str, Callable[[str, str], tuple[nn.Module, Losses, Callable[[], object]]]] = {
    "faster_rcnn": in_torchvision,
    "retinanet": in_torchvision,
    "deeplabv3": in_torchvision,
    "detectron2": in_detectron2,
}


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_backbone_trains_and_infers_in(host: str, backbone: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.script.*` is deprecated")  # detectron2 uses it
        warnings.filterwarnings("ignore", message="torch.meshgrid")  # detectron2 does not name the indexing
        model, loss, infer = HOSTS[host](host, backbone)
        loss().backward()  # type: ignore[no-untyped-call]
        model.eval()
        with torch.no_grad():
            assert infer()
    wrong = [name for name, p in model.named_parameters() if (p.grad is not None) != p.requires_grad]
    assert wrong == []
    assert any(not parameter.requires_grad for parameter in model.parameters())
