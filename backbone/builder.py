"""From a name or a configuration to a backbone ready to use."""

from collections.abc import Mapping
from inspect import Parameter
from typing import Any, Unpack

from backbone.config import BackboneConfig, BackboneKeys, StrictModel, spelled_out
from backbone.contract import require_contract
from backbone.features import Backbone
from backbone.freeze import freeze_stages
from backbone.initial import watch_initial_values
from backbone.registry import find_constructor, is_ours
from backbone.weights import load_weights

_STATE_DICT = "a state dict"
"""Stands in a config's ``weights`` for tensors that a config cannot hold, while its rules are checked."""


def build_backbone(config: BackboneConfig | str, **keys: Unpack[BackboneKeys]) -> Backbone:
    """Construct the network, load its weights, freeze its first stages.

    Args:
        config: Registered name of the network, such as ``"resnet50"``, or a whole config; ``load_config`` reads one.
        keys: The keys of ``BackboneConfig``; they override those of a config. ``weights`` may also be a state dict.

    Returns:
        The backbone, in training mode: (N, in_channels, H, W) -> ``{"c2": (N, C, H/4, W/4), ...}``. ``model.config``
        tells what it was built from. Its first forward in training mode warns if what is frozen has no weights yet.

    Raises:
        UnknownBackboneError: If nothing is registered under the name.
        ValueError: If a key is unknown, a setting cannot be honoured or the weights do not fit.
        FileNotFoundError: If the weights' path does not exist.
    """
    settings: dict[str, Any] = dict(keys)
    state = settings.get("weights")
    if isinstance(state, Mapping):
        settings["weights"] = _STATE_DICT
    config = _config(config, settings)
    source = state if isinstance(state, Mapping) else config.weights
    chosen = config.stem_channels_from
    if isinstance(state, Mapping):
        config = config.model_copy(update={"weights": None, "stem_channels_from": None})
    backbone = construct(config)
    if source is None:
        watch_initial_values(backbone, config.name)
    else:
        load_weights(backbone, source, name=config.name, stem_channels_from=chosen)
    freeze_stages(backbone, config.freeze_at)
    return backbone


_FIRST = Parameter("config", Parameter.POSITIONAL_OR_KEYWORD, annotation=BackboneConfig | str)
build_backbone.__signature__ = spelled_out(  # type: ignore[attr-defined]
    BackboneConfig, BackboneKeys, _FIRST, returns=Backbone
)


def _config(given: BackboneConfig | str, keys: dict[str, Any]) -> BackboneConfig:
    """Return the config that ``given`` and the keys over it make."""
    if isinstance(given, str):
        return BackboneConfig(given, **keys)
    if isinstance(given, BackboneConfig):
        return given.replaced(keys) if keys else given
    kind = type(given).__name__
    if isinstance(given, StrictModel):
        remedy = "build it by hosts.torchvision.build_detector, or give its .backbone"
    elif isinstance(given, Mapping):
        remedy = "write build_backbone(BackboneConfig(**settings))"
    else:
        remedy = "give one of these, load_config(path) for a file"
    raise ValueError(f"build_backbone takes a name such as 'resnet50' or a BackboneConfig, got {kind}; {remedy}")


def construct(config: BackboneConfig) -> Backbone:
    """Construct the network alone: fresh weights, nothing frozen; raises as ``build_backbone`` does."""
    backbone = find_constructor(config.name)(config)
    require_contract(backbone, config, run=not is_ours(config.name))
    backbone.config = config
    return backbone
