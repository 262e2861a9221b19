"""Detectors from detectron2's own recipes, twice: with its backbone and with ours in its place; and their inputs."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import boxes as box_ops
from torchvision.ops import deform_conv2d

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")  # detectron2 does, while imported
    pytest.importorskip("detectron2", reason="detectron2 is installed from its own repository")
    import detectron2
    from detectron2.config import CfgNode, LazyCall, LazyConfig, get_cfg, instantiate
    from detectron2.modeling import build_model
    from detectron2.modeling.backbone import resnet as their_resnet
    from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
    from detectron2.utils.events import EventStorage

    from backbone.hosts.detectron2 import DROP_IN_BUILDERS, DetectronBackbone, DetectronPyramid, add_backbone_config

CHECKOUT = Path(detectron2.__file__).parents[1]
CONFIGS = CHECKOUT / "configs"
if not CONFIGS.is_dir():  # an installation carries them elsewhere
    CONFIGS = CHECKOUT / "detectron2" / "model_zoo" / "configs"
SECTIONS = (
    "COCO-Detection", "COCO-InstanceSegmentation", "COCO-Keypoints", "COCO-PanopticSegmentation",
    "LVISv0.5-InstanceSegmentation", "LVISv1-InstanceSegmentation", "Cityscapes", "PascalVOC-Detection", "Misc",
)  # fmt: skip
NOT_ITS_RESNET = {
    "COCO-InstanceSegmentation/mask_rcnn_regnetx_4gf_dds_fpn_1x.py": "RegNet",
    "COCO-InstanceSegmentation/mask_rcnn_regnety_4gf_dds_fpn_1x.py": "RegNet",
    "Misc/mmdet_mask_rcnn_R_50_FPN_1x.py": "mmdetection's ResNet",
    "Misc/torchvision_imagenet_R_50.py": "torchvision's classifier",
}
SMALLER = (
    "MODEL.DEVICE", "cpu", "MODEL.RPN.PRE_NMS_TOPK_TRAIN", 200, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 20,
    "MODEL.RPN.PRE_NMS_TOPK_TEST", 200, "MODEL.RPN.POST_NMS_TOPK_TEST", 10,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 8, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0,
    "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0, "MODEL.RETINANET.TOPK_CANDIDATES_TEST", 50,
    "TEST.DETECTIONS_PER_IMAGE", 5, "MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH", 0.0,
)  # fmt: skip
"""Fewer proposals and detections: the heads cost less, and the backbone is as the recipe has it."""


BATCHED_NMS = box_ops.batched_nms  # detectron2 gives it boxes in float32, whatever the scores are


def recipes() -> list[str]:
    """Every recipe of the sections that uses detectron2's own ResNet; files called Base are parts of others."""
    paths = [path for section in SECTIONS for path in sorted((CONFIGS / section).iterdir())]
    names = [str(path.relative_to(CONFIGS)) for path in paths if not path.name.startswith("Base")]
    return [name for name in names if name not in NOT_ITS_RESNET]


def read_recipe(name: str, *overrides: object) -> CfgNode:
    cfg = get_cfg()
    add_backbone_config(cfg)
    cfg.merge_from_file(str(CONFIGS / name), allow_unsafe=True)  # detectron2's own files compute anchors in YAML
    cfg.merge_from_list([*SMALLER, *overrides])
    return cfg


def read_lazy_recipe(name: str) -> Any:
    model = LazyConfig.load(str(CONFIGS / name)).model
    if "proposal_generator" in model:
        model.proposal_generator.update(pre_nms_topk=(200, 200), post_nms_topk=(20, 10))
        model.roi_heads.batch_size_per_image = 8
    if "head_in_features" in model:
        model.update(test_score_thresh=0.0, test_topk_candidates=50)
    return model


def with_our_name(recipe: Any) -> Any:
    """The recipe with our backbone in place of detectron2's."""
    recipe = copy.deepcopy(recipe)
    if isinstance(recipe, CfgNode):
        recipe.MODEL.BACKBONE.NAME = DROP_IN_BUILDERS[recipe.MODEL.BACKBONE.NAME]
        return recipe
    pyramid = recipe.backbone if "bottom_up" in recipe.backbone else None
    theirs = recipe.backbone if pyramid is None else pyramid.bottom_up
    ours = LazyCall(DetectronBackbone)(
        name=f"resnet{theirs.stages.depth}",
        out_features=theirs.out_features,
        norm=theirs.stages.norm,
        stride_in_1x1=theirs.stages.stride_in_1x1,
        freeze_at=theirs.get("freeze_at", 0),
    )
    if pyramid is None:
        recipe.backbone = ours
    else:
        pyramid._target_ = DetectronPyramid
        pyramid.bottom_up = ours
    return recipe


def detector(recipe: Any) -> Any:
    return build_model(recipe) if isinstance(recipe, CfgNode) else instantiate(recipe)


class StandInDeformConv(nn.Module):
    """detectron2's DeformConv and ModulatedDeformConv on torchvision's kernel: its own exist only when compiled."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, norm: nn.Module, **settings: Any
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(out_channels, in_channels // settings["groups"], kernel_size, kernel_size)
        )
        self.norm, self.bias = norm, None
        self.settings = {key: settings[key] for key in ("stride", "padding", "dilation")}

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        out: Tensor = self.norm(deform_conv2d(x, offset, self.weight, mask=mask, **self.settings))
        return out


def stand_in_for_compiled_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(their_resnet, "DeformConv", StandInDeformConv)
    monkeypatch.setattr(their_resnet, "ModulatedDeformConv", StandInDeformConv)


def in_double_precision(model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return ``model`` in float64, in which rounding flips no ReLU, no ranking of proposals and no sample."""
    monkeypatch.setattr(box_ops, "batched_nms", lambda boxes, scores, *rest: BATCHED_NMS(boxes, scores.float(), *rest))
    return model.double()


def example(size: tuple[int, int] = (96, 128)) -> list[dict[str, Any]]:
    """One image with three objects, labelled in every way that any recipe asks for."""
    height, width = size
    boxes = Boxes(torch.tensor([[10.0, 10, 70, 90], [40, 20, 120, 80], [5, 40, 60, 90]]))
    objects = Instances(size, gt_boxes=boxes, gt_classes=torch.tensor([0, 0, 0]))
    objects.gt_masks = BitMasks(torch.rand(3, height, width) > 0.5)
    keypoints = torch.rand(3, 17, 3) * torch.tensor([width, height, 0.0]) + torch.tensor([0.0, 0, 2])
    objects.gt_keypoints = Keypoints(keypoints)
    proposals = Instances(size, proposal_boxes=boxes, objectness_logits=torch.tensor([3.0, 2, 1]))
    return [
        {
            "image": torch.rand(3, height, width) * 255,
            "instances": objects,
            "proposals": proposals,
            "sem_seg": torch.randint(0, 50, size),
            "height": height,
            "width": width,
        }
    ]


def losses_and_gradients(model: nn.Module, inputs: list[dict[str, Any]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses of one training step, and the gradients by detectron2's parameter names."""
    torch.manual_seed(0)  # proposals are sampled
    with EventStorage():
        losses = model.train()(copy.deepcopy(inputs))
    sum(losses.values()).backward()
    parameters = dict(model.named_parameters())
    gradients = {name: p.grad for name, p in by_their_names(model, parameters).items() if p.grad is not None}
    return {name: loss.detach() for name, loss in losses.items()}, gradients


def by_their_names(model: nn.Module, parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    by_address = {parameter.data_ptr(): parameter for parameter in parameters.values()}
    return {
        name: by_address[value.data_ptr()]
        for name, value in model.state_dict().items()
        if value.data_ptr() in by_address
    }


def flat(output: Any) -> dict[str, Tensor]:
    """All tensors in a detector's output, by where they are."""
    if isinstance(output, Tensor):
        return {"": output}
    if isinstance(output, Instances):
        output = {**output.get_fields()}
    if isinstance(output, Boxes):
        return {"": output.tensor}
    if isinstance(output, list | tuple):
        output = {str(index): value for index, value in enumerate(output)}
    if isinstance(output, dict):
        return {f"{key}.{place}": value for key, item in output.items() for place, value in flat(item).items()}
    return {"": torch.as_tensor(output)} if isinstance(output, int | float | bool) else {}
