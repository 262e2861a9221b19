"""The class that mmdetection, mmsegmentation and mmpretrain build: their arguments, weights and calls."""

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Final

from mmengine.model import BaseModule, initialize
from mmengine.registry import MODELS
from mmengine.runner import CheckpointLoader
from torch import Tensor

from backbone.builder import construct
from backbone.config import BackboneConfig
from backbone.freeze import freeze_stages
from backbone.hosts.mmdetection.arguments import (
    NORM_CFG,
    Setting,
    dilations_of,
    features_of,
    freeze_at_of,
    name_of,
    norm_of,
    one_way,
    output_stride_of,
    stride_in_1x1_of,
)
from backbone.hosts.transparent import TransparentWrapper
from backbone.providers.resnet.network import FAMILY
from backbone.stages import OUTPUT_STRIDES
from backbone.weights import load_weights
from backbone.weights.formats.mmdetection import RGB_255
from backbone.weights.metadata import BGR_255

_THEIR_SCHEMES: Final = "://"
_OUR_SCHEMES: Final = ("hf://", "file://")


@MODELS.register_module()  # type: ignore[untyped-decorator, unused-ignore]
class PluginBackbone(BaseModule, TransparentWrapper):  # type: ignore[misc]
    """Any backbone of this package under mmdetection's arguments, ours or both; one thing is said in one way only.

    State dicts have mmdetection's names, which for ResNets are ours: its checkpoints load, and load back.
    ``freeze_stages``, ``freeze_report`` and ``FreezeSchedule`` take it as they take every backbone.

    Args:
        name: Registered name. ``depth`` (18, 34, 50, 101, 152; with ``groups`` and ``base_width`` a ResNeXt) says it in
            mmdetection's way.
        depth: See ``name``.
        groups: Of a ResNeXt.
        base_width: Of a ResNeXt.
        in_channels: Channels of the images.
        num_stages: How many of the four stages may be wanted.
        out_indices: Stages to return, 0 to 3; later ones are not built. Ours: ``out_features``.
        frozen_stages: -1 for none, 0 for the stem, 1 for C2 as well, ... 4 for all. Ours: ``freeze_at``, one more.
        norm_cfg: ``type`` BN, SyncBN or GN, and ``requires_grad``. Ours: ``norm``.
        norm_eval: Whether statistics stand still in training: with ``requires_grad`` ``bn_eval``, else ``frozen_bn``.
        style: ``pytorch`` strides in the 3x3, ``caffe`` in the 1x1. Ours: ``stride_in_1x1``.
        strides: Stride of each stage. Ours: ``output_stride``.
        dilations: Dilation of each stage, in all its blocks.
        with_cp: Whether all stages recompute their activations. Ours: ``checkpoint_stages``.
        zero_init_residual: By default, as in mmdetection, where our ResNets start without weights.
        weights: As ``BackboneConfig.weights``, loaded at once.
        pretrained: mmdetection's old name of ``init_cfg=dict(type="Pretrained", checkpoint=...)``.
        init_cfg: mmengine's; of type Pretrained it takes mmengine's addresses (``torchvision://resnet50``) and what
            ``weights`` takes, and loads in ``init_weights``, strictly.
        norm: As in ``BackboneConfig``, and so are the following.
        freeze_at: Number of stages, 0 to 5.
        output_stride: 32, 16 or 8 (image pixels).
        dilate_first_block: mmdetection's convention, True, where our networks dilate.
        multi_grid: A factor for each block of C5.
        stride_in_1x1: See ``style``.
        stem_channels_from: Needs ``weights``.
        out_features: c1 to c5.
        checkpoint_stages: c2 to c5.

    Attributes:
        config: What all that comes to.
        is_init: Whether ``init_weights`` was called; mmengine reads it.

    Raises:
        ValueError: If one thing is said in two ways, or a setting cannot be honoured.
    """

    is_init: bool

    def __init__(
        self,
        name: str | None = None,
        *,
        depth: int | None = None,
        groups: int = 1,
        base_width: int = 4,
        in_channels: int = 3,
        num_stages: int = 4,
        out_indices: Sequence[int] | None = None,
        frozen_stages: int | None = None,
        norm_cfg: Setting | None = None,
        norm_eval: bool | None = None,
        style: str | None = None,
        strides: Sequence[int] | None = None,
        dilations: Sequence[int] | None = None,
        with_cp: bool | None = None,
        zero_init_residual: bool | None = None,
        weights: str | None = None,
        pretrained: str | None = None,
        init_cfg: Setting | Sequence[Setting] | None = None,
        norm: str | None = None,
        freeze_at: int | None = None,
        output_stride: int | None = None,
        dilate_first_block: bool | None = None,
        multi_grid: Sequence[int] | None = None,
        stride_in_1x1: bool | None = None,
        stem_channels_from: Sequence[int | None] | None = None,
        out_features: Sequence[str] | None = None,
        checkpoint_stages: Sequence[str] | None = None,
    ) -> None:
        one_way(weights=weights, pretrained=pretrained, init_cfg=init_cfg)
        one_way(name=name, depth=depth)
        one_way(out_features=out_features, out_indices=out_indices)
        one_way(freeze_at=freeze_at, frozen_stages=frozen_stages)
        one_way(norm=norm, norm_cfg=norm_cfg)
        one_way(norm=norm, norm_eval=norm_eval)
        one_way(stride_in_1x1=stride_in_1x1, style=style)
        one_way(checkpoint_stages=checkpoint_stages, with_cp=with_cp)
        if pretrained is not None:
            init_cfg = {"type": "Pretrained", "checkpoint": pretrained}
        super().__init__(init_cfg)  # type: ignore[call-arg]
        name = name or name_of(depth, groups, base_width)
        norm = norm or norm_of(NORM_CFG if norm_cfg is None else norm_cfg, norm_eval is not False)
        one_way(strides=strides, output_stride=output_stride)
        stride = output_stride or output_stride_of(num_stages, strides)
        if strides is not None and dilations is None:
            dilations = (1,) * num_stages  # strides alone dilate nothing in mmdetection
        dilated, own = stride < max(OUTPUT_STRIDES) or max(dilations or (1,)) > 1, name in FAMILY
        starts_afresh = weights is None and init_cfg is None and own and norm not in ("frozen_bn", "bn_eval")
        settings = {
            "name": name,
            "weights": weights,
            "norm": norm,
            "freeze_at": freeze_at_of(frozen_stages) if freeze_at is None else freeze_at,
            "output_stride": stride,
            "dilate_first_block": (dilated and "/" not in name) if dilate_first_block is None else dilate_first_block,
            "stride_in_1x1": stride_in_1x1_of(style) if stride_in_1x1 is None else stride_in_1x1,
            "in_channels": in_channels,
            "stem_channels_from": stem_channels_from,
            "dilations": dilations_of(name, stride, dilations),
            "multi_grid": multi_grid,
            "out_features": out_features or features_of(out_indices, num_stages),
            "zero_init_residual": starts_afresh if zero_init_residual is None else zero_init_residual,
        }
        self.settings = BackboneConfig.model_validate(settings)
        built = self.settings.built_stages[1:] if with_cp else tuple(checkpoint_stages or ())
        self.settings = BackboneConfig.model_validate({**settings, "checkpoint_stages": built})
        network = construct(self.settings)
        network.preprocessing = BGR_255 if self.settings.stride_in_1x1 else RGB_255  # what its recipes feed
        if weights is not None:
            load_weights(network, weights, name=name, stem_channels_from=self.settings.stem_channels_from)
        freeze_stages(network, self.settings.freeze_at)
        self.wrap(network)
        self._has_group_norms = own and self.settings.norm == "gn"

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Images (N, C, H, W) -> one map for each of ``out_indices``, (N, 256, H/4, W/4), ...; sizes round up."""
        features = self.network(images)
        return tuple(features[name] for name in self.network.feature_specs)

    def init_weights(self) -> None:
        """Do what ``init_cfg`` says, once; the modules inside, initialised already, are not asked to do it again.

        Raises:
            ValueError: If a checkpoint does not fit.
        """
        if self.is_init:
            return
        init_cfg: Any = self.init_cfg
        settings = [init_cfg] if isinstance(init_cfg, Mapping) else list(init_cfg or ())
        pretrained = [each for each in settings if each["type"] == "Pretrained"]
        others = [each for each in settings if each not in pretrained]
        if others:
            initialize(self, others)
        for each in pretrained:
            self._load(str(each["checkpoint"]), each.get("prefix"))
        self.is_init = True

    def _load(self, checkpoint: str, prefix: str | None) -> None:
        theirs = _THEIR_SCHEMES in checkpoint and not checkpoint.startswith(_OUR_SCHEMES)
        if not theirs or "#sha256=" in checkpoint:
            with warnings.catch_warnings():  # style says what its weights are; the format alone assumes
                warnings.filterwarnings("ignore", message=".*its weights have (stride_in_1x1|dilate_first_block)")
                load_weights(self.network, checkpoint, name=self.settings.name)
            return
        content = CheckpointLoader.load_checkpoint(checkpoint, map_location="cpu", logger="current")
        state = content.get("state_dict", content)
        start = next((p for p in (prefix, "module.backbone.", "backbone.", "module.") if p and _any(state, p)), "")
        own = {self.own_name(key.removeprefix(start)): v for key, v in state.items() if key.startswith(start)}
        unused = (*self.network.unbuilt_prefixes, "fc.")
        given = {key: value for key, value in own.items() if not key.startswith(unused)}
        self._require_fit(given, checkpoint)
        self.network.load_state_dict(given, strict=False)

    def _require_fit(self, given: Mapping[str, Tensor], checkpoint: str) -> None:
        own = self.network.state_dict()
        missing = [key for key in own if key not in given and not key.endswith("num_batches_tracked")]
        unexpected = [key for key in given if key not in own]
        reshaped = [key for key in given if key in own and own[key].shape != given[key].shape]
        if missing or unexpected or reshaped:
            raise ValueError(
                f"{checkpoint}: does not fit {self.settings.name}: missing {missing[:3]} ({len(missing)}), unexpected "
                f"{unexpected[:3]} ({len(unexpected)}), of another shape {reshaped[:3]} ({len(reshaped)}); choose the "
                f"backbone it was made for"
            )

    def saved_name(self, name: str) -> str:
        """Return mmdetection's name: a ResNet's group norms are called so, its batch norms as ours."""
        return re.sub(r"(^|\.)bn(\d\.)", r"\1gn\2", name) if self._has_group_norms else name

    def own_name(self, name: str) -> str:
        """Return our name of what mmdetection calls ``name``."""
        return re.sub(r"(^|\.)gn(\d\.)", r"\1bn\2", name) if self._has_group_norms else name

    def extra_repr(self) -> str:
        """Show what the arguments come to."""
        said = self.settings.model_dump(exclude_defaults=True, exclude={"name"})
        return ", ".join([repr(self.settings.name), *(f"{key}={value!r}" for key, value in said.items())])


def _any(state: Mapping[str, Tensor], prefix: str) -> bool:
    return any(key.startswith(prefix) for key in state)
