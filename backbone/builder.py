"""From a configuration to a backbone ready to use."""

import warnings

from backbone.config import BackboneConfig
from backbone.features import Backbone
from backbone.freeze import freeze_stages
from backbone.norm import FrozenBatchNorm2d
from backbone.registry import find_constructor
from backbone.weights import load_weights


def build_backbone(config: BackboneConfig) -> Backbone:
    """Construct the network, load its weights, freeze its first stages.

    Args:
        config: What to build; ``load_config`` reads one from YAML.

    Returns:
        The backbone, in training mode: (N, in_channels, H, W) -> ``{"c2": (N, C, H/4, W/4), ...}``.

    Raises:
        UnknownBackboneError: If nothing is registered under the name.
        ValueError: If a setting cannot be honoured or the weights do not fit.
        FileNotFoundError: If the weights' path does not exist.
    """
    backbone = construct(config)
    if config.weights is None:
        warn_if_frozen_at_random(backbone, config)
    else:
        load_weights(backbone, config.weights, name=config.name, stem_channels_from=config.stem_channels_from)
    freeze_stages(backbone, config.freeze_at)
    return backbone


def construct(config: BackboneConfig) -> Backbone:
    """Construct the network alone: fresh weights, nothing frozen; raises as ``build_backbone`` does."""
    backbone = find_constructor(config.name)(config)
    _check_contract(backbone, config)
    return backbone


def _check_contract(backbone: Backbone, config: BackboneConfig) -> None:
    """Hold every constructor, a plugin's above all, to what detectors rely on."""
    if not isinstance(backbone, Backbone):
        raise ValueError(
            f"the constructor of {config.name!r} must return a backbone.Backbone, got {type(backbone).__name__}; "
            f"subclass it"
        )
    absent = [name for name in config.out_features if name not in backbone.feature_specs]
    if absent:
        raise ValueError(
            f"out_features must be among those of {config.name!r}, {', '.join(backbone.feature_specs)}; "
            f"got {', '.join(absent)}"
        )


def warn_if_frozen_at_random(backbone: Backbone, config: BackboneConfig) -> None:
    """Warn where something is frozen in a backbone that was given no weights."""
    frozen = [f"the first {config.freeze_at} stages"] if config.freeze_at else []
    built_frozen = any(isinstance(m, FrozenBatchNorm2d) and m.built_frozen for m in backbone.modules())
    frozen += ["all norms"] if built_frozen else []
    if frozen:
        warnings.warn(
            f"{config.name}: {' and '.join(frozen)} are frozen at random weights and will never train; set weights, "
            f"load a checkpoint before training, or use norm='bn' (or 'gn') and freeze_at=0",
            stacklevel=3,
        )
