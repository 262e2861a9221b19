"""torchvision's detectors and segmenters on any backbone. Their code is torchvision's; what differs is passed in.

from backbone.hosts.torchvision import as_torchvision, build_detector
detector = build_detector(load_detector_config("configs/detectors/faster_rcnn_resnet50.yaml"))
losses = detector(images, targets)  # or your own: FasterRCNN(as_torchvision(pyramid), 91, **detector_kwargs(pyramid))
"""

from inspect import Parameter
from itertools import pairwise
from typing import Any, Final, Unpack

from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, KeypointRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.segmentation import FCN, DeepLabV3
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.ops import MultiScaleRoIAlign

from backbone.builder import build_backbone
from backbone.config import BackboneConfig, spelled_out
from backbone.features import Backbone
from backbone.hosts.torchvision.adapter import TorchvisionBackbone, as_torchvision
from backbone.hosts.torchvision.request import described, detector_config
from backbone.hosts.torchvision.transform import BackboneTransform
from backbone.norm import norm_layer
from backbone.providers.resnet.network import ResNet
from backbone.pyramid import FeaturePyramid
from backbone.recipe import DENSE_DETECTORS, SEGMENTERS, DetectorConfig, DetectorKeys, DetectorName, ExtraLevels

ASPECT_RATIOS: Final = (0.5, 1.0, 2.0)

ATROUS_REACH: Final = 96
"""Image pixels that the first dilated 3x3 of DeepLab's head steps: rates (6, 12, 18) at output stride 16 and twice
that at 8 (arXiv:1706.05587, section 4)."""


def build_detector(
    config: DetectorConfig | DetectorName,
    backbone: Backbone | BackboneConfig | str | None = None,
    **keys: Unpack[DetectorKeys],
) -> nn.Module:
    """Return torchvision's detector or segmenter with the backbone, pyramid and head that ``config`` names.

    Detectors take a list of images (C, H, W) of 0 to 1 and, in training, targets; they resize and normalise
    themselves, as the backbone's present weights expect it. Segmenters take a normalised batch (N, C, H, W) and give
    ``{"out": (N, num_classes, H, W)}``. Anchors and poolers follow the levels that exist.

    Args:
        config: Name of the detector, such as ``"faster_rcnn"``, or a whole config; ``load_detector_config`` reads one.
        backbone: A registered name, a config, or a ready backbone or ``FeaturePyramid``, which is used as it is, not
            copied. In place of the config's own; with a detector's name it must be there.
        keys: The other keys of ``DetectorConfig``; they override those of a config.

    Raises:
        UnknownBackboneError: If no backbone is registered under the name.
        ValueError: If a key is unknown, a setting cannot be honoured or the weights do not fit.
    """
    ready = backbone if isinstance(backbone, Backbone) else None
    settings: dict[str, Any] = dict(keys)
    request = described(backbone, config, settings) if isinstance(backbone, Backbone) else backbone
    config = detector_config(config, request, settings)
    detector: nn.Module
    if config.detector in SEGMENTERS:
        detector = _build_segmenter(config, ready)
    elif config.box_head == "c5":
        detector = _build_faster_rcnn_on_c4(config, ready)
    else:
        detector = _build_on_levels(config, ready)
    detector.config = config  # type: ignore[assignment]
    return detector


build_detector.__signature__ = spelled_out(  # type: ignore[attr-defined]
    DetectorConfig,
    DetectorKeys,
    Parameter("config", Parameter.POSITIONAL_OR_KEYWORD, annotation=DetectorConfig | DetectorName),
    Parameter(
        "backbone",
        Parameter.POSITIONAL_OR_KEYWORD,
        default=None,
        annotation=Backbone | BackboneConfig | str | None,
    ),
    returns=nn.Module,
)


def _build_on_levels(config: DetectorConfig, ready: Backbone | None) -> nn.Module:
    model = ready or build_backbone(config.backbone)
    if config.pyramid is not None and not isinstance(model, FeaturePyramid):
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
    detector.transform = _transform(config, model)
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


def _build_faster_rcnn_on_c4(config: DetectorConfig, ready: Backbone | None) -> FasterRCNN:
    """The C4 model (arXiv:1512.03385, appendix A): proposals on C4, and C5 runs on every proposal's features."""
    body = ready or build_backbone(config.backbone.model_copy(update={"out_features": ("c4", "c5")}))
    if not isinstance(body, ResNet) or body.feature_specs.keys() != {"c4", "c5"}:
        raise ValueError(
            f"box_head: c5 needs a network of our ResNet family, whose C5 runs on any map, with c4 and c5, got "
            f"{config.backbone.name!r} with {', '.join(body.feature_specs)}; use box_head: mlp"
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
    detector.transform = _transform(config, body)
    return detector


def _build_segmenter(config: DetectorConfig, ready: Backbone | None) -> DeepLabV3 | FCN:
    model = ready or build_backbone(config.backbone)
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


def _transform(config: DetectorConfig, model: Backbone) -> BackboneTransform:
    """Return torchvision's resizing and normalising, with the statistics that the config, or else the weights, say."""
    return BackboneTransform(model, config.min_size, config.max_size, config.image_mean, config.image_std)
