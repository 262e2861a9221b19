"""What a detector is made of behind its backbone: pyramid and heads, counted on the meta device."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from backbone.command.description import Description, describe
from backbone.features import Backbone
from backbone.recipe import R_CNNS, DetectorConfig

NUM_DETECTIONS: Final = 100
"""Objects of an image that the mask and keypoint heads look at: torchvision's ``box_detections_per_img``."""


@dataclass(frozen=True, slots=True)
class PartDescription:
    """A part of a detector.

    Attributes:
        name: ``pyramid``, ``proposals``, ``box head``, ...
        parameters: Number of scalar parameters.
        multiply_adds: Multiply-adds of its convolutions and matrix products on one image.
    """

    name: str
    parameters: int
    multiply_adds: int


@dataclass(frozen=True, slots=True)
class DetectorDescription:
    """A detector's backbone and its other parts, on one image of a fixed size.

    Attributes:
        backbone: The backbone, stage by stage.
        parts: What lies behind it.
        note: What the counts of the heads assume.
    """

    backbone: Description
    parts: tuple[PartDescription, ...]
    note: str

    @property
    def parameters(self) -> int:
        """Number of scalar parameters of the whole detector."""
        return self.backbone.parameters + sum(part.parameters for part in self.parts)

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of the whole detector."""
        return self.backbone.multiply_adds + sum(part.multiply_adds for part in self.parts)


def describe_detector(config: DetectorConfig, image_size: tuple[int, int]) -> DetectorDescription:
    """Build the detector on the meta device and count; no weights are read.

    Args:
        config: The recipe.
        image_size: Height and width of the image that reaches the backbone, in pixels.

    Raises:
        ValueError: If the detector cannot be built.
    """
    from backbone.hosts.torchvision import build_detector

    without_weights = config.backbone.model_copy(update={"weights": None, "stem_channels_from": None})
    with torch.device("meta"):
        detector: Any = build_detector(config.model_copy(update={"backbone": without_weights})).eval()
    body: Backbone = detector.backbone.body
    with torch.no_grad(), torch.device("meta"):
        description = describe(body, image_size, in_channels=config.backbone.in_channels)
        images = torch.zeros(1, config.backbone.in_channels, *image_size)
        parts = tuple(_count_parts(detector, config, images))
    note = ""
    if config.detector in R_CNNS:
        note = f"Heads are counted on {_num_proposals(detector)} proposals"
        note += f" and {NUM_DETECTIONS} objects." if config.detector != "faster_rcnn" else "."
    return DetectorDescription(description, parts, note)


def _count_parts(detector: Any, config: DetectorConfig, images: Tensor) -> Iterator[PartDescription]:  # noqa: ANN401
    backbone = detector.backbone
    features = backbone(images)
    maps = list(features.values())
    if backbone.fpn is not None:
        body = backbone.body(images)
        yield _count("pyramid", [backbone.fpn], lambda: backbone.fpn(body))
    if config.detector in R_CNNS:
        yield _count("proposals", [detector.rpn], lambda: detector.rpn.head(maps))
        yield from _count_roi_heads(detector, maps[0].shape[1])
    elif config.detector in ("deeplabv3", "fcn"):
        yield _count("head", [detector.classifier], lambda: detector.classifier(features["out"]))
        if detector.aux_classifier is not None:
            auxiliary = detector.aux_classifier
            yield _count("auxiliary head", [auxiliary], lambda: auxiliary(features["aux"]))
    else:
        yield _count("head", [detector.head], lambda: detector.head(maps))


def _count_roi_heads(detector: Any, channels: int) -> Iterator[PartDescription]:  # noqa: ANN401
    heads, num_proposals = detector.roi_heads, _num_proposals(detector)

    def run(name: str, num_regions: int) -> None:
        size = getattr(heads, f"{name}_roi_pool").output_size
        regions = torch.zeros(num_regions, channels, *size)
        getattr(heads, f"{name}_predictor")(getattr(heads, f"{name}_head")(regions))

    for name in ("box", "mask", "keypoint"):
        modules = [getattr(heads, f"{name}_{part}", None) for part in ("head", "predictor")]
        if None not in modules:
            count = num_proposals if name == "box" else NUM_DETECTIONS
            yield _count(f"{name} head", modules, lambda name=name, count=count: run(name, count))


def _num_proposals(detector: Any) -> int:  # noqa: ANN401
    return int(detector.rpn._post_nms_top_n["testing"])


def _count(name: str, modules: list[Any], run: Any) -> PartDescription:  # noqa: ANN401
    counter = FlopCounterMode(display=False)
    with counter:
        run()
    parameters = nn.ModuleList(modules).parameters()
    return PartDescription(name, sum(each.numel() for each in parameters), counter.get_total_flops() // 2)
