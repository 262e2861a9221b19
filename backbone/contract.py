"""Holds what a constructor returns, a plugin's above all, to what was asked for and to what detectors rely on."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.func import functional_call

from backbone.config import BackboneConfig
from backbone.features import RGB_CHANNELS, Backbone, FeatureSpec
from backbone.stages import STAGE_NAMES

_SIDES = (2, 3)  # height and width of the trial image in units of the largest stride, unequal
_BATCH = 2


def require_contract(backbone: Backbone, config: BackboneConfig, *, run: bool) -> None:
    """Compare the attributes of ``backbone`` with ``config``, and with the maps of one forward.

    The forward runs on the meta device with the network's own modules, so that it takes neither memory nor arithmetic
    and nothing is built twice. A network that cannot run there, because it looks at values, is not run.

    Args:
        backbone: What the constructor of ``config.name`` returned.
        config: What was asked for.
        run: Whether to run that forward.

    Raises:
        ValueError: If it is no Backbone or something differs; names both values.
    """
    if not isinstance(backbone, Backbone):
        raise ValueError(
            f"the constructor of {config.name!r} must return a backbone.Backbone, got {type(backbone).__name__}; "
            f"subclass it"
        )
    _require_features(backbone.feature_specs, config)
    _require_stages(backbone, config)
    if run:
        _require_maps(backbone, config)


def _require_features(specs: Mapping[str, FeatureSpec], config: BackboneConfig) -> None:
    absent = [name for name in config.out_features if name not in specs]
    if absent:
        raise ValueError(
            f"out_features must be among those of {config.name!r}, {', '.join(specs)}; got {', '.join(absent)}"
        )
    if len(specs) != len(config.out_features):
        raise ValueError(
            f"{config.name!r} must state the out_features it was asked for, {', '.join(config.out_features)}, got "
            f"{', '.join(specs)}; its constructor ignores config.out_features"
        )
    for name, spec in specs.items():
        if spec.stride > config.output_stride:
            raise ValueError(
                f"{config.name!r} must keep to output_stride {config.output_stride}, got {name} at stride "
                f"{spec.stride}; dilate it, or let its constructor refuse config.output_stride"
            )


def _require_stages(backbone: Backbone, config: BackboneConfig) -> None:
    unknown = [name for name in backbone.stage_modules if name not in STAGE_NAMES]
    if unknown:
        raise ValueError(
            f"stage_modules of {config.name!r} must be among {', '.join(STAGE_NAMES)}, got {', '.join(unknown)}"
        )
    modules = dict(backbone.named_modules())
    missing = [path for paths in backbone.stage_modules.values() for path in paths if path not in modules]
    if missing:
        raise ValueError(f"stage_modules of {config.name!r} must name modules it has, got {', '.join(missing)}")


def _require_maps(backbone: Backbone, config: BackboneConfig) -> None:
    maps = _maps(backbone, config.in_channels)
    if maps is None:
        if config.in_channels != RGB_CHANNELS and _maps(backbone, RGB_CHANNELS) is not None:
            raise ValueError(
                f"{config.name!r} must take images of in_channels {config.in_channels}, got a network that takes "
                f"{RGB_CHANNELS}; its constructor ignores config.in_channels"
            )
        return
    wanted = {name: _shape(backbone, spec) for name, spec in backbone.feature_specs.items()}
    if config.num_classes is not None:
        wanted["logits"] = (_BATCH, config.num_classes)
    if maps.keys() != wanted.keys():
        raise ValueError(
            f"the forward of {config.name!r} must return {', '.join(wanted)}, got {', '.join(maps)}; return what "
            f"feature_specs and num_classes say, and nothing else"
        )
    for name, shape in wanted.items():
        if maps[name] != shape:
            size = " x ".join(str(side) for side in _size(backbone))
            raise ValueError(
                f"{config.name!r} states {name} as {_said(backbone, name)}, which is {shape} for images of {size} "
                f"pixels, got {maps[name]} from its forward; correct its feature_specs"
            )


def _said(backbone: Backbone, name: str) -> str:
    return str(backbone.feature_specs.get(name, "num_classes"))


def _size(backbone: Backbone) -> tuple[int, ...]:
    return tuple(side * max(backbone.size_divisibility, 32) for side in _SIDES)


def _shape(backbone: Backbone, spec: FeatureSpec) -> tuple[int, ...]:
    return (_BATCH, spec.channels, *(-(-side // spec.stride) for side in _size(backbone)))


def _maps(backbone: Backbone, in_channels: int) -> dict[str, tuple[int, ...]] | None:
    """Return the shapes of what a forward on the meta device returns; None if it cannot run there."""
    state = {**dict(backbone.named_parameters()), **dict(backbone.named_buffers())}
    on_meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    modes = {module: module.training for module in backbone.modules()}
    for module in modes:
        module.training = False  # not eval(), which some networks give a meaning of their own
    try:
        with torch.no_grad():
            images = torch.empty(_BATCH, in_channels, *_size(backbone), device="meta")
            outputs = functional_call(backbone, on_meta, (images,))
    except Exception:  # a plugin's own code, on a device it was not written for
        return None
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not isinstance(outputs, dict) or not all(isinstance(value, Tensor) for value in outputs.values()):
        raise ValueError(
            f"the forward of {type(backbone).__name__} must return a dict of feature maps by name, got "
            f"{type(outputs).__name__}"
        )
    return {name: tuple(value.shape) for name, value in outputs.items()}
