"""One backbone, any detector.

YAML -> config -> registry -> build_backbone: construct -> load weights -> freeze -> Backbone -> c2, c3, c4, c5

from backbone import build_backbone
model = build_backbone("resnet50", weights="IMAGENET1K_V2", freeze_at=2)
features = model(images)  # (N, 3, H, W) -> {"c2": (N, 256, H/4, W/4), ..., "c5": (N, 2048, H/32, W/32)}
"""

from typing import TYPE_CHECKING, Final

import backbone.providers.resnet.network as _resnet  # registers the ResNet family
from backbone.builder import build_backbone
from backbone.config import BackboneConfig, SettingsError, load_config
from backbone.engine import EngineReport, engine_enabled, engine_report
from backbone.features import Backbone, Features, FeatureSpec, Preprocessing, find_backbone
from backbone.freeze import FreezeSchedule, StageReport, freeze_report, freeze_stages
from backbone.inference.optimize import optimize_for_inference
from backbone.norm import FrozenBatchNorm2d, freeze_norms, thaw_norms
from backbone.pretrained import from_pretrained, save_pretrained
from backbone.recipe import DetectorConfig, load_detector_config
from backbone.registry import UnknownBackboneError, list_backbones, register_backbone
from backbone.weights import LoadReport, convert_weights, inspect_weights, load_weights
from backbone.weights.published import PublishedWeights, list_weights

if TYPE_CHECKING:
    from backbone.pyramid import FeaturePyramid

__version__: Final = "0.1.0"

__all__ = [
    "Backbone",
    "BackboneConfig",
    "DetectorConfig",
    "EngineReport",
    "FeaturePyramid",
    "FeatureSpec",
    "Features",
    "FreezeSchedule",
    "FrozenBatchNorm2d",
    "LoadReport",
    "Preprocessing",
    "PublishedWeights",
    "SettingsError",
    "StageReport",
    "UnknownBackboneError",
    "__version__",
    "build_backbone",
    "convert_weights",
    "engine_enabled",
    "engine_report",
    "find_backbone",
    "freeze_norms",
    "freeze_report",
    "freeze_stages",
    "from_pretrained",
    "inspect_weights",
    "list_backbones",
    "list_weights",
    "load_config",
    "load_detector_config",
    "load_weights",
    "optimize_for_inference",
    "register_backbone",
    "save_pretrained",
    "thaw_norms",
]
del _resnet


def __getattr__(name: str) -> object:
    """Import what needs torchvision, a second's work, when it is first asked for."""
    if name == "FeaturePyramid":
        from backbone.pyramid import FeaturePyramid

        return FeaturePyramid
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
