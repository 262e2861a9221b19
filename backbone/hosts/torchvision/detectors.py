"""torchvision's detectors and segmenters on any backbone. Their code is torchvision's; what differs is passed in.

from backbone.hosts.torchvision import as_torchvision, build_detector
detector = build_detector(load_detector_config("configs/detectors/faster_rcnn_resnet50.yaml"))
losses = detector(images, targets)  # or your own: FasterRCNN(as_torchvision(pyramid), num_classes=91)
"""

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Final

from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, KeypointRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.models.segmentation import FCN, DeepLabV3
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.ops import MultiScaleRoIAlign

from backbone.builder import build_backbone
from backbone.features import Backbone, Features, Preprocessing
from backbone.norm import FrozenBatchNorm2d, norm_layer
from backbone.providers.resnet.network import ResNet
from backbone.pyramid import FeaturePyramid
from backbone.recipe import DENSE_DETECTORS, SEGMENTERS, DetectorConfig, ExtraLevels

ASPECT_RATIOS: Final = (0.5, 1.0, 2.0)

ATROUS_REACH: Final = 96
"""Image pixels that the first dilated 3x3 of DeepLab's head steps: rates (6, 12, 18) at output stride 16 and twice
that at 8 (arXiv:1706.05587, section 4)."""


class TorchvisionBackbone(Backbone):
    """A backbone, with or without a pyramid, under the names torchvision's detectors expect.

    Parameters are named as in torchvision's BackboneWithFPN: ``body.*`` and ``fpn.*``.

    Args:
        model: A backbone or a ``FeaturePyramid``.
        names: torchvision's name for each feature of ``model``.

    Attributes:
        out_channels: Channels of each feature map, the same for all where there is a pyramid.
        body: The backbone itself.
        fpn: The pyramid, or None.
    """

    body: Backbone

    def __init__(self, model: Backbone, names: Mapping[str, str]) -> None:
        super().__init__()
        pyramid = model if isinstance(model, FeaturePyramid) else None
        self.adopt("body", pyramid.body if pyramid else model)
        self.fpn = pyramid.fpn if pyramid else None
        self.feature_specs = {names[name]: spec for name, spec in model.feature_specs.items()}
        self.out_channels = next(reversed(self.feature_specs.values())).channels

    def forward(self, images: Tensor) -> Features:
        """Images (N, C, H, W) -> "0" (N, 256, H/4, W/4), "1" (N, 256, H/8, W/8), ...; sizes round up."""
        features = self.body(images)
        features = {name: features[name] for name in self.body.feature_specs}
        if self.fpn is not None:
            features = self.fpn(features)
        return dict(zip(self.feature_specs, features.values(), strict=True))


def as_torchvision(model: Backbone) -> TorchvisionBackbone:
    """Return ``model`` as torchvision's ``FasterRCNN(backbone, ...)`` and its siblings take it.

    Feature maps are called "0", "1", ... from the finest, the level above the backbone's last ``pool``, or ``p6`` and
    ``p7`` where there are two, as in torchvision. Modules are shared with ``model``, not copied.

    Args:
        model: A ``FeaturePyramid``, or a backbone with one feature map.

    Raises:
        ValueError: If ``model`` has several feature maps of different channels, which torchvision's heads cannot take.
    """
    channels = {spec.channels for spec in model.feature_specs.values()}
    if len(channels) > 1:
        raise ValueError(
            f"torchvision's heads need the same channels on every level, got {', '.join(model.feature_specs)} with "
            f"{', '.join(map(str, sorted(channels)))}; put a FeaturePyramid on it or name one of out_features"
        )
    num_maps = len(model.body.feature_specs) if isinstance(model, FeaturePyramid) else len(model.feature_specs)
    extra = list(model.feature_specs)[num_maps:]
    names = [*map(str, range(num_maps)), *(["pool"] if len(extra) == 1 else extra)]
    return TorchvisionBackbone(model, dict(zip(model.feature_specs, names, strict=True)))


def build_detector(config: DetectorConfig) -> nn.Module:
    """Return torchvision's detector or segmenter with the backbone, pyramid and head that ``config`` names.

    Detectors take a list of images (C, H, W) of 0 to 1 and, in training, targets; they resize and normalise
    themselves, as the backbone's weights expect it. Segmenters take a normalised batch (N, C, H, W) and give
    ``{"out": (N, num_classes, H, W)}``. Anchors and poolers follow the levels that exist.

    Args:
        config: What to build; ``load_detector_config`` reads one from YAML.

    Raises:
        UnknownBackboneError: If no backbone is registered under the name.
        ValueError: If a setting cannot be honoured or the weights do not fit.
    """
    detector: nn.Module
    if config.detector in SEGMENTERS:
        detector = _build_segmenter(config)
    elif config.box_head == "c5":
        detector = _build_faster_rcnn_on_c4(config)
    else:
        detector = _build_on_levels(config)
    return detector


def _build_on_levels(config: DetectorConfig) -> nn.Module:
    model = build_backbone(config.backbone)
    if config.pyramid is not None:
        usual: ExtraLevels = "p6p7" if config.detector in DENSE_DETECTORS else "maxpool"
        model = FeaturePyramid(
            model,
            out_channels=config.pyramid.out_channels,
            extra_levels=config.pyramid.extra_levels or usual,
            p6_from=config.pyramid.p6_from,
        )
    detector: nn.Module
    if config.detector == "retinanet":
        detector = _build_retinanet(config, model)
    elif config.detector == "fcos":
        detector = FCOS(as_torchvision(model), config.num_classes, anchor_generator=_fcos_anchors(model))
    else:
        detector = _build_r_cnn(config, model)
    detector.transform = _transform(config, model.preprocessing)
    return detector


def _build_retinanet(config: DetectorConfig, model: Backbone) -> RetinaNet:
    backbone, anchors = as_torchvision(model), _retinanet_anchors(config, model)
    (num_anchors,) = set(anchors.num_anchors_per_location())
    norm = norm_layer("gn") if config.head_norm == "gn" else None
    head = RetinaNetHead(backbone.out_channels, num_anchors, config.num_classes, norm_layer=norm)
    return RetinaNet(backbone, config.num_classes, anchor_generator=anchors, head=head)


def _build_r_cnn(config: DetectorConfig, model: Backbone) -> FasterRCNN:
    backbone = as_torchvision(model)
    pooled = _pooled_maps(backbone)
    settings = {
        "num_classes": config.num_classes,
        **_proposal_settings(config, model),
        "box_roi_pool": MultiScaleRoIAlign(pooled, output_size=7, sampling_ratio=2),
    }
    pool_of_second_head = MultiScaleRoIAlign(pooled, output_size=14, sampling_ratio=2)
    if config.detector == "mask_rcnn":
        return MaskRCNN(backbone, mask_roi_pool=pool_of_second_head, **settings)
    if config.detector == "keypoint_rcnn":
        num_keypoints = config.num_keypoints
        return KeypointRCNN(backbone, num_keypoints=num_keypoints, keypoint_roi_pool=pool_of_second_head, **settings)
    return FasterRCNN(backbone, **settings)


def _build_faster_rcnn_on_c4(config: DetectorConfig) -> FasterRCNN:
    """The C4 model (arXiv:1512.03385, appendix A): proposals on C4, and C5 runs on every proposal's features."""
    body = build_backbone(config.backbone.model_copy(update={"out_features": ("c4", "c5")}))
    if not isinstance(body, ResNet):
        raise ValueError(
            f"box_head: c5 needs a network of our ResNet family, whose C5 runs on any map, got "
            f"{config.backbone.name!r}; use box_head: mlp"
        )
    channels = body.feature_specs["c5"].channels
    head = nn.Sequential(body.split_off_c5(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    detector = FasterRCNN(
        as_torchvision(body),
        **_proposal_settings(config, body),
        box_roi_pool=MultiScaleRoIAlign(["0"], output_size=14, sampling_ratio=2),
        box_head=head,
        box_predictor=FastRCNNPredictor(channels, config.num_classes),
    )
    detector.transform = _transform(config, body.preprocessing)
    return detector


def _build_segmenter(config: DetectorConfig) -> DeepLabV3 | FCN:
    model = build_backbone(config.backbone)
    backbone = TorchvisionBackbone(model, {"c4": "aux", "c5": "out"})
    specs = backbone.feature_specs
    aux_classifier = FCNHead(specs["aux"].channels, config.num_classes) if config.aux_classifier else None
    if config.detector == "fcn":
        return FCN(backbone, FCNHead(specs["out"].channels, config.num_classes), aux_classifier)
    rate = ATROUS_REACH // specs["out"].stride
    classifier = DeepLabHead(specs["out"].channels, config.num_classes, atrous_rates=(rate, 2 * rate, 3 * rate))
    return DeepLabV3(backbone, classifier, aux_classifier)


def _proposal_settings(config: DetectorConfig, model: Backbone) -> dict[str, object]:
    """Return how many proposals there are, and how many of them the box head learns from."""
    in_training, in_evaluation = config.num_proposals, (config.num_proposals + 1) // 2
    return {
        "rpn_anchor_generator": _r_cnn_anchors(config, model),
        "rpn_pre_nms_top_n_train": in_training,
        "rpn_pre_nms_top_n_test": in_evaluation,
        "rpn_post_nms_top_n_train": in_training,
        "rpn_post_nms_top_n_test": in_evaluation,
        "box_batch_size_per_image": config.rois_per_image,
    }


def _r_cnn_anchors(config: DetectorConfig, model: Backbone) -> AnchorGenerator:
    """One size per level of a pyramid, from P2 on (arXiv:1612.03144, section 4.1); all five sizes on a single map."""
    smallest = config.smallest_anchor
    if isinstance(model, FeaturePyramid):
        sizes: list[tuple[int, ...]] = [(int(smallest * 2.0 ** (_level(name) - 2)),) for name in model.feature_specs]
    else:
        sizes = [tuple(smallest << doubling for doubling in range(5))]
    return AnchorGenerator(tuple(sizes), (ASPECT_RATIOS,) * len(sizes))


def _retinanet_anchors(config: DetectorConfig, model: Backbone) -> AnchorGenerator:
    """Three sizes per level, a third of an octave apart, from P3 on (arXiv:1708.02002, section 4)."""
    smallest = [config.smallest_anchor * 2 ** (_level(name) - 3) for name in model.feature_specs]
    sizes = tuple(tuple(int(size * 2 ** (third / 3)) for third in range(3)) for size in smallest)
    return AnchorGenerator(sizes, (ASPECT_RATIOS,) * len(sizes))


def _fcos_anchors(model: Backbone) -> AnchorGenerator:
    """One point per place, written as torchvision does: an anchor as large as the stride."""
    sizes = tuple((spec.stride,) for spec in model.feature_specs.values())
    return AnchorGenerator(sizes, ((1.0,),) * len(sizes))


def _level(name: str) -> int:
    return int(name[1:])


def _pooled_maps(backbone: TorchvisionBackbone) -> list[str]:
    """Names of the maps that boxes are pooled from: the backbone's own levels, of equal strides the last one.

    Raises:
        ValueError: If a stride is not twice the one before: torchvision sends boxes to the levels by counting octaves,
            and those beyond the last one it counts are pooled from nothing.
    """
    by_stride = {backbone.feature_specs[name].stride: name for name in backbone.feature_specs if name.isdigit()}
    strides = list(by_stride)
    if any(coarse != 2 * fine for fine, coarse in pairwise(strides)):
        raise ValueError(
            f"an R-CNN pools boxes from levels whose strides double, got strides {', '.join(map(str, strides))}; name "
            f"out_features without a gap"
        )
    return list(by_stride.values())


class _BgrTransform(GeneralizedRCNNTransform):  # type: ignore[misc]
    """For weights that were trained on BGR images; the caller's images are RGB, as everywhere in torchvision."""

    def normalize(self, image: Tensor) -> Tensor:
        return super().normalize(image.flip(0))  # type: ignore[no-any-return]


def _transform(config: DetectorConfig, preprocessing: Preprocessing) -> GeneralizedRCNNTransform:
    """Return torchvision's resizing and normalising, with the statistics that config or weights ask for."""
    mean, std = unit_statistics(preprocessing, config.backbone.in_channels)
    transform = _BgrTransform if preprocessing.channel_order == "bgr" else GeneralizedRCNNTransform
    return transform(config.min_size, config.max_size, list(config.image_mean or mean), list(config.image_std or std))


def unit_statistics(preprocessing: Preprocessing, in_channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation for images of 0 to 1 with ``in_channels`` channels.

    One channel gets the average of the weights' channels; more than the weights know repeat them in turn, as a
    pre-trained stem's channels do.
    """
    low, high = preprocessing.value_range
    mean = [(value - low) / (high - low) for value in preprocessing.mean]
    std = [value / (high - low) for value in preprocessing.std]
    if in_channels == 1:
        return (sum(mean) / len(mean),), (sum(std) / len(std),)
    turns = range(in_channels)
    return tuple(mean[turn % len(mean)] for turn in turns), tuple(std[turn % len(std)] for turn in turns)


def load_torchvision_state(
    detector: nn.Module, state: Mapping[str, Tensor], *, frozen_norm_eps: float | None = None
) -> None:
    """Load, strictly, a state dict of torchvision's own detector into one of ``build_detector``.

    Args:
        detector: The same detector on the same backbone.
        state: ``state_dict()`` of torchvision's model, or its file's content.
        frozen_norm_eps: Set on every frozen norm. torchvision's COCO_V1 weights of Faster, Mask and Keypoint R-CNN
            and RetinaNet were trained with 0.0.

    Raises:
        RuntimeError: (torch's) If a key is missing, unexpected or of another shape.
    """
    detector.load_state_dict(from_torchvision_names(state))
    for module in detector.modules():
        if isinstance(module, FrozenBatchNorm2d) and frozen_norm_eps is not None:
            module.eps = frozen_norm_eps


def from_torchvision_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of torchvision's detector or segmenter under our names: only segmenters differ."""
    renamed = {}
    for key, value in state.items():
        inside = key.removeprefix("backbone.")
        rename = inside != key and not inside.startswith(("body.", "fpn."))
        renamed[f"backbone.body.{inside}" if rename else key] = value
    return renamed


def to_torchvision_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of ours under the names of torchvision's own detector or segmenter."""
    if any(key.startswith("backbone.fpn.") for key in state):
        return dict(state)
    return {re.sub(r"^backbone\.body\.", "backbone.", key): value for key, value in state.items()}
