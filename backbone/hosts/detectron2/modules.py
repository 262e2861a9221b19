"""Backbones and pyramids of this package as modules of detectron2: in its registry's and LazyConfig's terms."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, TypeAlias

import torch
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import Backbone as Detectron2Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from backbone.builder import construct
from backbone.config import BackboneConfig, NormName
from backbone.features import Backbone, Features
from backbone.freeze import freeze_stages
from backbone.hosts.detectron2.names import detectron2_names
from backbone.norm import FrozenBatchNorm2d, NormLayer, norm_layer
from backbone.providers.resnet.deformable import DeformableConv3x3
from backbone.providers.resnet.network import FAMILY, ResNet, Variant
from backbone.pyramid import FeaturePyramid
from backbone.recipe import ExtraLevels, SourceOfP6
from backbone.stages import STAGE_NAMES
from backbone.weights import load_weights
from backbone.weights.metadata import BGR_255

NormChoice: TypeAlias = str | Callable[[int], nn.Module]
"""A norm as detectron2 writes it: FrozenBN, BN, SyncBN, GN, "" for none, ..., or a constructor."""

_NORMS: Final[Mapping[str, NormName]] = {
    "FrozenBN": "frozen_bn",
    "BN": "bn",
    "SyncBN": "sync_bn",
    "nnSyncBN": "sync_bn",
    "GN": "gn",
}


class HostedBackbone(Backbone, Detectron2Backbone):  # type: ignore[misc]
    """Any backbone of this package as detectron2 wants it: its feature names, its state-dict names.

    ``freeze_stages``, ``freeze_report`` and ``FreezeSchedule`` take it as they take every backbone.

    Args:
        network: A backbone or a ``FeaturePyramid``.
        size_divisibility: detectron2 pads images to multiples of so many pixels; 0 pads to the largest image alone.
            The network needs no padding, but the same numbers as detectron2's need the same padding.
        square_pad: Side in pixels of the square that images are padded to; 0 for none.

    Attributes:
        network: The network under its own names.
        loading_under: Where in the whole model the state dict being loaded puts this module.
    """

    network: Backbone

    def __init__(self, network: Backbone, *, size_divisibility: int = 0, square_pad: int = 0) -> None:
        super().__init__()
        self.adopt("network", network)
        self.feature_specs = {_detectron2_feature(name): spec for name, spec in network.feature_specs.items()}
        self.square_pad = square_pad
        self._size_divisibility = size_divisibility
        self.loading_under = ""
        self.register_state_dict_post_hook(_rename_saved)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_rename_given)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_rename_missing)  # type: ignore[no-untyped-call]

    def forward(self, images: Tensor) -> Features:
        """Images (N, C, H, W) -> res2 (N, 256, H/4, W/4), ... or p2, ... of a pyramid; sizes round up."""
        return {_detectron2_feature(name): feature for name, feature in self.network(images).items()}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return channels and stride of each output."""
        return {name: ShapeSpec(channels=s.channels, stride=s.stride) for name, s in self.feature_specs.items()}

    @property
    def size_divisibility(self) -> int:
        """Images are padded to multiples of this, in pixels; 0 for no padding."""
        return self._size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        """The square that images are padded to."""
        return {"square_size": self.square_pad}


class DetectronBackbone(HostedBackbone):
    """A backbone from plain arguments, for LazyConfig: in place of detectron2's ``ResNet``.

    Args:
        name: Registered name, or a row of our ResNets' own.
        out_features: ``res2`` to ``res5``; later stages are not built.
        in_channels: Channels of the images.
        norm: detectron2's name of a norm, or a constructor.
        freeze_at: Stages to freeze, counted from the stem: detectron2's number.
        stride_in_1x1: Whether a bottleneck strides in its first 1x1. True for MSRA and most zoo weights.
        output_stride: Largest stride, in image pixels: 32, 16 (RES5_DILATION 2) or 8.
        dilate_first_block: Dilation convention; True is detectron2's.
        deform_on_per_stage: Which of res2 to res5 have deformable 3x3 convolutions.
        deform_modulated: Whether those are modulated.
        deform_num_groups: Groups of channels with offsets of their own.
        weights: As ``BackboneConfig.weights``. ``preprocessing`` then tells the pixels they expect; detectron2 feeds
            BGR, 0 to 255, unless told otherwise.
        checkpoint_stages: Stages, ``res2`` to ``res5``, that recompute their activations in backward.

    Raises:
        ValueError: If a setting is out of range or the network cannot honour it.
    """

    def __init__(
        self,
        name: str | Variant = "resnet50",
        *,
        out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
        in_channels: int = 3,
        norm: NormChoice = "FrozenBN",
        freeze_at: int = 0,
        stride_in_1x1: bool = False,
        output_stride: int = 32,
        dilate_first_block: bool = True,
        deform_on_per_stage: Sequence[bool] = (False, False, False, False),
        deform_modulated: bool = False,
        deform_num_groups: int = 1,
        weights: str | None = None,
        checkpoint_stages: Sequence[str] = (),
    ) -> None:
        settings: dict[str, Any] = {
            "in_channels": in_channels,
            "stride_in_1x1": stride_in_1x1,
            "output_stride": output_stride,
            "dilate_first_block": dilate_first_block and output_stride < 32,  # noqa: PLR2004 - nothing dilates then
            "out_features": _our_features("out_features", out_features),
            "checkpoint_stages": _our_features("checkpoint_stages", checkpoint_stages),
        }
        variant = name if isinstance(name, Variant) else FAMILY.get(name)
        if variant is not None:
            deform = partial(DeformableConv3x3, modulated=deform_modulated, offset_groups=deform_num_groups)
            deformable = {stage: deform for stage, on in zip(STAGE_NAMES[1:], deform_on_per_stage, strict=True) if on}
            network: Backbone = ResNet(variant, norm=_norm(norm), conv3x3_by_stage=deformable, **settings)
            name = next((known for known, row in FAMILY.items() if row == variant), "a ResNet of these widths")
        elif not isinstance(norm, str) or norm not in _NORMS or any(deform_on_per_stage):
            raise ValueError(
                f"{name} takes the norms {', '.join(_NORMS)} and no deformable stages, got norm {norm!r} and "
                f"deform_on_per_stage {list(deform_on_per_stage)}; choose one of our ResNets for those"
            )
        else:
            network = construct(BackboneConfig(name=str(name), norm=_NORMS[norm], **settings))
        network.preprocessing = BGR_255  # what detectron2 feeds; our builders compare INPUT.FORMAT with the weights
        if weights is not None:
            load_weights(network, weights, name=str(name))
        freeze_stages(network, freeze_at)
        super().__init__(network)


class DetectronPyramid(HostedBackbone):
    """A feature pyramid with the arguments of detectron2's ``FPN``; it takes any image size and equal strides.

    A level is called p<n> after res<n>, whatever its stride. detectron2's ROIPooler still wants each stride twice the
    one before: with a dilated res5 pool from p2, p3 and p4.

    Args:
        bottom_up: The backbone.
        in_features: Its feature maps to build on, the deepest included; all of them where None.
        out_channels: Channels of each level.
        norm: Norm after each convolution, "" for none.
        top_block: detectron2's LastLevelMaxPool or LastLevelP6P7, whose convolutions are used; None for no more levels.
        fuse_type: ``sum``, or ``avg`` for the mean of a map and the level above.
        square_pad: Side in pixels of the square that images are padded to; 0 for none.

    Raises:
        ValueError: If an argument is none of those.
    """

    def __init__(
        self,
        bottom_up: DetectronBackbone,
        in_features: Sequence[str] | None = None,
        out_channels: int = 256,
        norm: NormChoice = "",
        top_block: nn.Module | None = None,
        fuse_type: str = "sum",
        square_pad: int = 0,
    ) -> None:
        if not isinstance(bottom_up, HostedBackbone):
            raise ValueError(
                f"bottom_up must be a DetectronBackbone, got {type(bottom_up).__name__}; "
                f"replace it, or keep detectron2's FPN"
            )
        if fuse_type not in ("sum", "avg"):
            raise ValueError(f"fuse_type must be sum or avg, got {fuse_type!r}")
        body = bottom_up.network
        _select(body, in_features)
        extra_levels, p6_from = _extra_levels(top_block, next(reversed(body.feature_specs)))
        pyramid = FeaturePyramid(
            body,
            out_channels=out_channels,
            extra_levels=extra_levels,
            p6_from=p6_from,
            norm=norm_layer(_norm(norm)) if norm else None,
            average=fuse_type == "avg",
        )
        if isinstance(top_block, LastLevelP6P7):
            pyramid.fpn.extra_blocks.p6, pyramid.fpn.extra_blocks.p7 = top_block.p6, top_block.p7
        stride = max(spec.stride for spec in body.feature_specs.values())
        super().__init__(pyramid, size_divisibility=stride, square_pad=square_pad)


def _rename_saved(module: HostedBackbone, state: dict[str, Tensor], prefix: str, _metadata: object) -> None:
    """Leave out the batch counters of norms that were built frozen: detectron2's frozen norm has none."""
    uncounted = {
        f"{path}.num_batches_tracked"
        for path, norm in module.network.named_modules()
        if isinstance(norm, FrozenBatchNorm2d) and norm.built_frozen
    }
    for ours, theirs in detectron2_names(module.network).items():
        value = state.pop(f"{prefix}network.{ours}")
        if ours not in uncounted:
            state[prefix + theirs] = value


def _rename_given(module: HostedBackbone, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    module.loading_under = prefix  # the last hook is not told
    for ours, theirs in detectron2_names(module.network).items():
        if prefix + theirs in state:
            state[f"{prefix}network.{ours}"] = state.pop(prefix + theirs)
    for path, norm in module.network.named_modules(prefix=f"{prefix}network"):
        if isinstance(norm, FrozenBatchNorm2d) and f"{path}.weight" in state:  # Caffe2's files have no statistics
            state.setdefault(f"{path}.running_mean", torch.zeros_like(norm.running_mean))
            state.setdefault(f"{path}.running_var", torch.ones_like(norm.running_var))


def _rename_missing(module: HostedBackbone, incompatible: _IncompatibleKeys) -> None:
    prefix = module.loading_under
    names = {f"{prefix}network.{ours}": prefix + theirs for ours, theirs in detectron2_names(module.network).items()}
    incompatible.missing_keys[:] = [names.get(key, key) for key in incompatible.missing_keys]


def _detectron2_feature(name: str) -> str:
    """Return res2 for c2; a pyramid's levels are called the same everywhere."""
    return name.replace("c", "res")


def _our_features(key: str, names: Sequence[str]) -> tuple[str, ...]:
    known = {_detectron2_feature(name): name for name in STAGE_NAMES[1:]}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{key} must be among {', '.join(known)}, got {', '.join(map(str, unknown))}")
    return tuple(known[name] for name in names)


def _norm(norm: NormChoice) -> NormName | NormLayer:
    """Return our norm of that name; where we have none, detectron2's own."""
    if isinstance(norm, str) and norm in _NORMS:
        return _NORMS[norm]
    try:
        get_norm(norm, 1)
    except KeyError:
        raise ValueError(f"norm must be one that detectron2 knows, such as {', '.join(_NORMS)}, got {norm!r}") from None
    return lambda channels: get_norm(norm, channels) or nn.Identity()


def _select(body: Backbone, in_features: Sequence[str] | None) -> None:
    """Leave ``body`` only the feature maps that a pyramid is built on."""
    offered = list(body.feature_specs)
    wanted = offered if in_features is None else _our_features("in_features", in_features)
    if set(wanted) - set(offered) or offered[-1] not in wanted:
        raise ValueError(
            f"in_features must be among out_features, {', '.join(map(_detectron2_feature, offered))}, and hold the "
            f"last of them, got {', '.join(map(_detectron2_feature, wanted))}; build no stage that nothing reads"
        )
    body.feature_specs = {name: spec for name, spec in body.feature_specs.items() if name in wanted}


def _extra_levels(top_block: nn.Module | None, deepest: str) -> tuple[ExtraLevels, SourceOfP6]:
    """Return what ``FeaturePyramid`` calls the levels of ``top_block``, and their source."""
    if top_block is None or isinstance(top_block, LastLevelMaxPool):
        return "none" if top_block is None else "maxpool", "p5"
    sources: dict[str, SourceOfP6] = {_detectron2_feature(deepest): "c5", f"p{deepest[1:]}": "p5"}
    if not isinstance(top_block, LastLevelP6P7) or top_block.in_feature not in sources:
        raise ValueError(
            f"top_block must be None, LastLevelMaxPool or a LastLevelP6P7 on {' or '.join(sources)}, got a "
            f"{type(top_block).__name__} on {getattr(top_block, 'in_feature', 'nothing')}"
        )
    return "p6p7", sources[top_block.in_feature]
