"""What a call of ``build_detector`` asks for, as one checked config."""

from collections.abc import Mapping
from typing import Any, get_args

from backbone.config import BackboneConfig, StrictModel, did_you_mean
from backbone.features import Backbone, input_channels
from backbone.pyramid import FeaturePyramid
from backbone.recipe import DetectorConfig, DetectorName

UNNAMED = "(a ready backbone)"
"""Name in the config of a detector whose backbone was made by hand."""


def detector_config(given: object, backbone: BackboneConfig | str | None, keys: dict[str, Any]) -> DetectorConfig:
    """Return the config that a detector's name or config, a backbone and keys make together.

    Raises:
        ValueError: If they make none.
    """
    if backbone is not None:
        keys["backbone"] = backbone
    if isinstance(given, DetectorConfig):
        return given.replaced(keys) if keys else given
    if isinstance(given, str):
        if given not in get_args(DetectorName):
            known = get_args(DetectorName)
            raise ValueError(f"unknown detector {given!r}{did_you_mean(given, known)} known: {', '.join(known)}")
        if backbone is None:
            raise ValueError(f"{given} needs a backbone, got none; write build_detector({given!r}, 'resnet50', ...)")
        return DetectorConfig.model_validate({"detector": given, **keys})
    kind = type(given).__name__
    remedy = "give load_detector_config(path) for a file"
    if isinstance(given, BackboneConfig | Backbone):
        remedy = "write build_detector('faster_rcnn', backbone, ...)"
    elif isinstance(given, Mapping | StrictModel):
        remedy = "write build_detector(DetectorConfig(**settings))"
    raise ValueError(f"build_detector takes a detector's name or a DetectorConfig, got {kind}; {remedy}")


def described(ready: Backbone, given: object, keys: dict[str, Any]) -> BackboneConfig:
    """Return the config of a ready backbone, its features as they are, and put that of a ready pyramid among ``keys``.

    Raises:
        ValueError: If there is a pyramid and ``keys`` ask for one, too.
    """
    body = ready.body if isinstance(ready, FeaturePyramid) else ready
    if isinstance(ready, FeaturePyramid):
        if "pyramid" in keys:
            raise ValueError(
                f"pyramid must not be given beside a ready FeaturePyramid, got {keys['pyramid']!r}; drop it"
            )
        keys["pyramid"] = {key: ready.settings[key] for key in ("out_channels", "extra_levels", "p6_from")}
    config = body.config or BackboneConfig(UNNAMED, in_channels=input_channels(body))
    features = tuple(body.feature_specs)
    if keys.get("box_head", getattr(given, "box_head", None)) == "c5" and features == ("c4", "c5"):
        features = ("c4",)  # C5 goes into the head
    return config.model_copy(update={"out_features": features, "output_stride": config.output_stride})
