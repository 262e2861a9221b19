"""C2-C5 to P2-P7: a feature pyramid on any backbone of this package."""

from typing import Final, TypedDict, get_args

from torch import Tensor
from torchvision.ops.feature_pyramid_network import (
    ExtraFPNBlock,
    FeaturePyramidNetwork,
    LastLevelMaxPool,
    LastLevelP6P7,
)

from backbone.calling import look_at_detector
from backbone.config import NormName
from backbone.features import Backbone, Features, FeatureSpec
from backbone.norm import NormLayer, norm_layer
from backbone.recipe import ExtraLevels, SourceOfP6

_NUM_EXTRA_LEVELS: Final = {"none": 0, "maxpool": 1, "p6p7": 2}


class PyramidSettings(TypedDict):
    """The arguments of a ``FeaturePyramid`` but its body."""

    out_channels: int
    extra_levels: ExtraLevels
    p6_from: SourceOfP6
    norm: NormName | NormLayer | None
    average: bool


class FeaturePyramid(Backbone):
    """A backbone whose features are the levels of a Feature Pyramid Network (arXiv:1612.03144), torchvision's own.

    Level p2 comes from c2, ... p5 from c5, whatever their strides: images of any size and a dilated C5 work. It is a
    backbone itself: ``freeze_stages``, ``freeze_report`` and ``FreezeSchedule`` reach the stages of ``body``.

    Args:
        body: The backbone; every one of its feature maps becomes a level.
        out_channels: Channels of each level.
        extra_levels: ``maxpool`` adds one level of half the resolution (Faster R-CNN), ``p6p7`` adds two by strided
            convolutions (RetinaNet, arXiv:1708.02002; FCOS), ``none`` adds none.
        p6_from: What P6 is computed from: the last level (torchvision) or the body's last map (the RetinaNet paper,
            detectron2). Only for ``p6p7``.
        norm: Norm after each convolution of p2 to p5, which then has no bias: name or constructor; None for no norm.
        average: Whether a level is the mean of its map and the level above, rather than their sum.

    Attributes:
        body: The backbone.
        settings: The other arguments.
        fpn: torchvision's FeaturePyramidNetwork.

    Raises:
        ValueError: If ``extra_levels`` or ``p6_from`` is none of those, or ``p6_from`` is c5 without p6p7.
    """

    body: Backbone

    def __init__(
        self,
        body: Backbone,
        *,
        out_channels: int = 256,
        extra_levels: ExtraLevels = "none",
        p6_from: SourceOfP6 = "p5",
        norm: NormName | NormLayer | None = None,
        average: bool = False,
    ) -> None:
        super().__init__()
        self.settings: PyramidSettings = {
            "out_channels": out_channels,
            "extra_levels": extra_levels,
            "p6_from": p6_from,
            "norm": norm,
            "average": average,
        }
        specs = list(body.feature_specs.items())
        self.adopt("body", body)
        self.fpn = (_AveragingNetwork if average else FeaturePyramidNetwork)(
            [spec.channels for _, spec in specs],
            out_channels,
            extra_blocks=_extra_block(extra_levels, p6_from, specs[-1][1].channels, out_channels),
            norm_layer=None if norm is None else norm_layer(norm),
        )
        self.out_channels = out_channels
        self.feature_specs = {f"p{name[1:]}": FeatureSpec(out_channels, spec.stride) for name, spec in specs}
        name, deepest = specs[-1]
        for number in range(1, _NUM_EXTRA_LEVELS[extra_levels] + 1):
            self.feature_specs[f"p{int(name[1:]) + number}"] = FeatureSpec(out_channels, deepest.stride << number)
        look_at_detector(self)

    def forward(self, images: Tensor) -> Features:
        """Images (N, C, H, W) -> p2 (N, 256, H/4, W/4), ..., p6 (N, 256, H/64, W/64); sizes round up."""
        features = self.body(images)
        levels = self.fpn({name: features[name] for name in self.body.feature_specs})
        return dict(zip(self.feature_specs, levels.values(), strict=True))


class _AveragingNetwork(FeaturePyramidNetwork):  # type: ignore[misc]
    """Halves each sum: the sums grow by powers of two instead, which is exact, and each level takes its own back."""

    def get_result_from_inner_blocks(self, x: Tensor, idx: int) -> Tensor:
        """Map of level ``idx`` (N, C, H, W) -> its part of the sum (N, out_channels, H, W)."""
        return super().get_result_from_inner_blocks(x, idx) * 2 ** max(self._levels_above(idx) - 1, 0)  # type: ignore[no-any-return]

    def get_result_from_layer_blocks(self, x: Tensor, idx: int) -> Tensor:
        """Sum down to level ``idx`` (N, out_channels, H, W) -> the level, of the same shape."""
        return super().get_result_from_layer_blocks(x / 2 ** self._levels_above(idx), idx)  # type: ignore[no-any-return]

    def _levels_above(self, idx: int) -> int:
        return (len(self.inner_blocks) - 1 - idx) % len(self.inner_blocks)  # idx is -1 for the last


def _extra_block(
    extra_levels: ExtraLevels, p6_from: SourceOfP6, channels_of_last_map: int, out_channels: int
) -> ExtraFPNBlock | None:
    """Return what computes the levels above the backbone's; None for none."""
    for name, value, known in (("extra_levels", extra_levels, ExtraLevels), ("p6_from", p6_from, SourceOfP6)):
        if value not in get_args(known):
            raise ValueError(f"{name} must be one of {', '.join(get_args(known))}, got {value!r}")
    if extra_levels == "p6p7":
        block = LastLevelP6P7(out_channels if p6_from == "p5" else channels_of_last_map, out_channels)
        block.use_P5 = p6_from == "p5"  # torchvision guesses it from the channels
        return block
    if p6_from != "p5":
        raise ValueError(f"p6_from: {p6_from} needs extra_levels: p6p7, got {extra_levels}; drop one of them")
    return LastLevelMaxPool() if extra_levels == "maxpool" else None
