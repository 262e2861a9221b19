"""The builders that MODEL.BACKBONE.NAME takes, reading detectron2's own keys and MODEL.BACKBONE_PLUGIN."""

import math
import re
import warnings
from functools import reduce
from typing import Any, Final

from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import nn

from backbone.config import did_you_mean
from backbone.features import Preprocessing
from backbone.hosts.detectron2.modules import DetectronBackbone, DetectronPyramid
from backbone.providers.resnet.blocks import Bottleneck
from backbone.providers.resnet.network import FAMILY, Variant

DROP_IN_BUILDERS: Final[dict[str, str]] = {
    "build_resnet_backbone": "build_plugin_resnet_backbone",
    "build_resnet_fpn_backbone": "build_plugin_resnet_fpn_backbone",
    "build_retinanet_resnet_fpn_backbone": "build_plugin_retinanet_resnet_fpn_backbone",
}
"""Our builder for each of detectron2's, by the names that MODEL.BACKBONE.NAME takes."""

PLUGIN_KEYS: Final[dict[str, object]] = {
    "NAME": "",  # any registered backbone; "" is the ResNet of MODEL.RESNETS
    "WEIGHTS": "",  # as BackboneConfig.weights; "" leaves it to MODEL.WEIGHTS
    "OUTPUT_STRIDE": 0,  # 32, 16 or 8; 0 follows MODEL.RESNETS.RES5_DILATION
    "DILATE_FIRST_BLOCK": True,  # detectron2's convention; False is torchvision's and timm's
    "IN_CHANNELS": 0,  # 0 takes the length of MODEL.PIXEL_MEAN
    "CHECKPOINT_STAGES": [],  # res2 to res5
}
"""The keys of MODEL.BACKBONE_PLUGIN with their defaults."""

_DEPTHS: Final = {18: "resnet18", 34: "resnet34", 50: "resnet50", 101: "resnet101", 152: "resnet152"}
_ROW_KEYS: Final = ("DEPTH", "NUM_GROUPS", "WIDTH_PER_GROUP", "STEM_OUT_CHANNELS", "RES2_OUT_CHANNELS")

_BGR_STD: Final = (57.375, 57.120, 58.395)
_NO_STD: Final = (1.0, 1.0, 1.0)
_PUBLISHED: Final[tuple[tuple[str, bool, str, tuple[float, ...]], ...]] = (
    # detectron2's MODEL_ZOO.md, "ImageNet Pretrained Models", and the recipes of its detectors: what MODEL.WEIGHTS
    # matches, STRIDE_IN_1X1, INPUT.FORMAT, PIXEL_STD
    (r"ImageNetPretrained/MSRA/", True, "BGR", _NO_STD),
    (r"ImageNetPretrained/torchvision/", False, "RGB", _BGR_STD[::-1]),
    (r"ImageNetPretrained/FAIR/R-\d+-GN", False, "BGR", _NO_STD),
    (r"ImageNetPretrained/FAIR/X-101-", False, "BGR", _BGR_STD),
    (r"//(COCO|LVIS|Cityscapes|PascalVOC)[^/]*/\w+_R_(50|101)_", True, "BGR", _NO_STD),
    (r"//(COCO|LVIS)[^/]*/\w+_X_101_", False, "BGR", _BGR_STD),
)


def add_backbone_config(cfg: CfgNode) -> None:
    """Add the node MODEL.BACKBONE_PLUGIN to a detectron2 configuration, in place; see ``PLUGIN_KEYS``."""
    cfg.MODEL.BACKBONE_PLUGIN = CfgNode(dict(PLUGIN_KEYS))


def build_plugin_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> DetectronBackbone:
    """Build what detectron2's ``build_resnet_backbone`` builds from MODEL.RESNETS and MODEL.BACKBONE.FREEZE_AT.

    With MODEL.BACKBONE_PLUGIN.NAME it is that network: depth and widths of MODEL.RESNETS must then stay at their
    defaults, and STRIDE_IN_1X1 holds for our own bottlenecks alone.

    Raises:
        ValueError: If a key is unknown, out of range or contradicts another.
    """
    resnets, plugin = cfg.MODEL.RESNETS, _plugin(cfg)
    if plugin["IN_CHANNELS"] not in (0, input_shape.channels):
        raise ValueError(
            f"MODEL.BACKBONE_PLUGIN.IN_CHANNELS is {plugin['IN_CHANNELS']}, but the model gives its backbone images of "
            f"{input_shape.channels} channels; give MODEL.PIXEL_MEAN and PIXEL_STD one value per channel"
        )
    name = _named(cfg, plugin["NAME"]) if plugin["NAME"] else _row(resnets)
    row = FAMILY.get(name) if isinstance(name, str) else name
    backbone = DetectronBackbone(
        name,
        out_features=resnets.OUT_FEATURES,
        in_channels=input_shape.channels,
        norm=resnets.NORM,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        stride_in_1x1=resnets.STRIDE_IN_1X1 and row is not None and row.block is Bottleneck,
        output_stride=_output_stride(resnets.RES5_DILATION, plugin["OUTPUT_STRIDE"]),
        dilate_first_block=plugin["DILATE_FIRST_BLOCK"],
        deform_on_per_stage=resnets.DEFORM_ON_PER_STAGE,
        deform_modulated=resnets.DEFORM_MODULATED,
        deform_num_groups=resnets.DEFORM_NUM_GROUPS,
        weights=plugin["WEIGHTS"] or None,
        checkpoint_stages=plugin["CHECKPOINT_STAGES"],
    )
    _warn_of_contradictions(cfg, plugin["WEIGHTS"], backbone.preprocessing)
    return backbone


def build_plugin_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> DetectronPyramid:
    """Build what detectron2's ``build_resnet_fpn_backbone`` builds; see ``build_plugin_resnet_backbone``."""
    return _pyramid(cfg, build_plugin_resnet_backbone(cfg, input_shape), LastLevelMaxPool())


def build_plugin_retinanet_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> DetectronPyramid:
    """Build what detectron2's ``build_retinanet_resnet_fpn_backbone`` builds; see ``build_plugin_resnet_backbone``."""
    bottom_up = build_plugin_resnet_backbone(cfg, input_shape)
    name, spec = list(bottom_up.feature_specs.items())[-1]
    return _pyramid(cfg, bottom_up, LastLevelP6P7(spec.channels, cfg.MODEL.FPN.OUT_CHANNELS, in_feature=name))


def _plugin(cfg: CfgNode) -> dict[str, Any]:
    """Return MODEL.BACKBONE_PLUGIN, or its defaults where ``add_backbone_config`` was not called."""
    plugin = {**PLUGIN_KEYS, **cfg.MODEL.get("BACKBONE_PLUGIN", {})}
    for key in plugin:
        if key not in PLUGIN_KEYS:
            raise ValueError(
                f"unknown key MODEL.BACKBONE_PLUGIN.{key}{did_you_mean(key, PLUGIN_KEYS)} "
                f"known keys: {', '.join(PLUGIN_KEYS)}"
            )
    return plugin


def _row(resnets: CfgNode) -> Variant:
    """Return the row of the depth table that MODEL.RESNETS describes."""
    if resnets.DEPTH not in _DEPTHS:
        raise ValueError(f"MODEL.RESNETS.DEPTH must be one of {', '.join(map(str, _DEPTHS))}, got {resnets.DEPTH!r}")
    model = FAMILY[_DEPTHS[resnets.DEPTH]]
    if model.block is not Bottleneck and (resnets.NUM_GROUPS, resnets.RES2_OUT_CHANNELS) != (1, 64):
        raise ValueError(
            f"MODEL.RESNETS.DEPTH {resnets.DEPTH} needs NUM_GROUPS 1 and RES2_OUT_CHANNELS 64, got "
            f"{resnets.NUM_GROUPS} and {resnets.RES2_OUT_CHANNELS}"
        )
    return Variant(
        model.block,
        model.depths,
        c2_channels=resnets.RES2_OUT_CHANNELS,
        groups=resnets.NUM_GROUPS,
        width_per_group=resnets.WIDTH_PER_GROUP,
        stem_channels=resnets.STEM_OUT_CHANNELS,
    )


def _named(cfg: CfgNode, name: str) -> str:
    """Return ``name``, making sure that MODEL.RESNETS does not ask for another network."""
    defaults = get_cfg().MODEL.RESNETS
    changed = [key for key in _ROW_KEYS if cfg.MODEL.RESNETS[key] != defaults[key]]
    if changed:
        said = ", ".join(f"{key} {cfg.MODEL.RESNETS[key]}" for key in changed)
        raise ValueError(
            f"MODEL.BACKBONE_PLUGIN.NAME is {name!r}, which MODEL.RESNETS contradicts with {said}; "
            f"set those back to detectron2's defaults, or NAME to ''"
        )
    return name


def _output_stride(res5_dilation: int, output_stride: int) -> int:
    if res5_dilation not in (1, 2):
        raise ValueError(f"MODEL.RESNETS.RES5_DILATION must be 1 or 2, got {res5_dilation!r}")
    if res5_dilation == 2 and output_stride == 32:  # noqa: PLR2004
        raise ValueError(
            "MODEL.BACKBONE_PLUGIN.OUTPUT_STRIDE is 32, but MODEL.RESNETS.RES5_DILATION 2 makes it 16; "
            "set one of them back"
        )
    return output_stride or 32 // res5_dilation


def _pyramid(cfg: CfgNode, bottom_up: DetectronBackbone, top_block: nn.Module) -> DetectronPyramid:
    fpn = cfg.MODEL.FPN
    return DetectronPyramid(bottom_up, fpn.IN_FEATURES, fpn.OUT_CHANNELS, fpn.NORM, top_block, fpn.FUSE_TYPE)


def _warn_of_contradictions(cfg: CfgNode, plugin_weights: str, preprocessing: Preprocessing) -> None:
    """Warn where the configuration says other than what its weights were trained with, as far as that is known."""
    weights, expected = cfg.MODEL.WEIGHTS, {}
    for pattern, stride_in_1x1, pixels, std in _PUBLISHED:
        if re.search(pattern, weights):
            expected = {"MODEL.RESNETS.STRIDE_IN_1X1": stride_in_1x1, "INPUT.FORMAT": pixels, "MODEL.PIXEL_STD": std}
            break
    if plugin_weights and expected:
        warnings.warn(
            f"MODEL.WEIGHTS {weights!r} will be loaded over MODEL.BACKBONE_PLUGIN.WEIGHTS {plugin_weights!r}; "
            f"set one of them to ''",
            stacklevel=4,
        )
    elif plugin_weights:
        weights, expected = plugin_weights, _pixels(preprocessing)  # loading them has compared the strides
    for key, value in expected.items():
        said = reduce(lambda node, part: node[part], key.split("."), cfg)
        if not _agree(said, value):
            warnings.warn(f"{key} is {said}, but {weights} was trained with {value}; change one", stacklevel=4)


def _pixels(preprocessing: Preprocessing) -> dict[str, object]:
    """Return the keys that say in detectron2 what ``preprocessing`` says, for pixels from 0 to 255."""
    low, high = preprocessing.value_range
    to_255 = 255 / (high - low)
    return {
        "INPUT.FORMAT": preprocessing.channel_order.upper(),
        "MODEL.PIXEL_MEAN": [round((value - low) * to_255, 3) for value in preprocessing.mean],
        "MODEL.PIXEL_STD": [round(value * to_255, 3) for value in preprocessing.std],
    }


def _agree(said: Any, value: Any) -> bool:  # noqa: ANN401
    """Whether the two are equal, or lists of as good as equal numbers; of other channels nothing is known."""
    if isinstance(value, tuple | list):
        pairs = zip(said, value, strict=False)
        return len(said) != len(value) or all(math.isclose(a, b, rel_tol=1e-2) for a, b in pairs)
    return bool(said == value)


for _build in (
    build_plugin_resnet_backbone,
    build_plugin_resnet_fpn_backbone,
    build_plugin_retinanet_resnet_fpn_backbone,
):
    if _build.__name__ not in BACKBONE_REGISTRY:  # a second import would be refused
        BACKBONE_REGISTRY.register(_build)
