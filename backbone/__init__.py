"""One backbone, any detector.

YAML -> config -> registry -> build_backbone: construct -> load weights -> freeze -> Backbone -> c2, c3, c4, c5

from backbone import BackboneConfig, build_backbone
model = build_backbone(BackboneConfig(name="resnet50", weights="IMAGENET1K_V2", freeze_at=2))
features = model(images)  # (N, 3, H, W) -> {"c2": (N, 256, H/4, W/4), ..., "c5": (N, 2048, H/32, W/32)}
"""

import backbone.providers.resnet.network as _resnet  # registers the ResNet family
from backbone.builder import build_backbone
from backbone.config import BackboneConfig, load_config
from backbone.engine import EngineReport, engine_enabled, engine_report
from backbone.features import Backbone, Features, FeatureSpec, Preprocessing
from backbone.freeze import FreezeSchedule, StageReport, freeze_report, freeze_stages
from backbone.inference.optimize import optimize_for_inference
from backbone.norm import FrozenBatchNorm2d, freeze_norms, thaw_norms
from backbone.registry import UnknownBackboneError, list_backbones, register_backbone
from backbone.weights import LoadReport, convert_weights, inspect_weights, load_weights

__all__ = [
    "Backbone",
    "BackboneConfig",
    "EngineReport",
    "FeatureSpec",
    "Features",
    "FreezeSchedule",
    "FrozenBatchNorm2d",
    "LoadReport",
    "Preprocessing",
    "StageReport",
    "UnknownBackboneError",
    "build_backbone",
    "convert_weights",
    "engine_enabled",
    "engine_report",
    "freeze_norms",
    "freeze_report",
    "freeze_stages",
    "inspect_weights",
    "list_backbones",
    "load_config",
    "load_weights",
    "optimize_for_inference",
    "register_backbone",
    "thaw_norms",
]
del _resnet
