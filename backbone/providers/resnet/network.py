"""The ResNet family, ResNet-D included: a stem and four planned stages, C2 to C5."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from backbone.config import BackboneConfig, NormName
from backbone.engine import conv_norm_act, register_pairs, register_sequence, run_blocks, stem
from backbone.features import Backbone, Features, FeatureSpec, require_images
from backbone.norm import NormLayer, norm_layer
from backbone.providers.resnet.blocks import BasicBlock, Bottleneck, Conv3x3
from backbone.providers.resnet.resnet_d import DeepStem, deep_stem, pooled_projection
from backbone.registry import register_backbone
from backbone.stages import C1_STRIDE, StagePlan, plan_stages, stage_number


@dataclass(frozen=True, slots=True)
class Variant:
    """One row of the family's depth table. Channels double from stage to stage.

    Attributes:
        block: The residual block.
        depths: Blocks of C2 to C5.
        c2_channels: Channels of C2.
        groups: Groups of a bottleneck's 3x3 convolutions.
        width_per_group: Channels per group of C2's 3x3 convolutions, in bottlenecks.
        stem_channels: Channels of the stem.
        deep_stem: Whether three 3x3 convolutions stand for the stem's 7x7.
        pooled_shortcuts: Whether a shortcut averages pixels before its convolution.
        projects_first: Whether C2's shortcut is projected although its shape does not need it.
    """

    block: type[BasicBlock] | type[Bottleneck]
    depths: tuple[int, int, int, int]
    c2_channels: int = 256
    groups: int = 1
    width_per_group: int = 64
    stem_channels: int = 64
    deep_stem: bool = False
    pooled_shortcuts: bool = False
    projects_first: bool = False


FAMILY: Final = {
    # Deep Residual Learning, arXiv:1512.03385, table 1.
    "resnet18": Variant(BasicBlock, (2, 2, 2, 2), c2_channels=64),
    "resnet34": Variant(BasicBlock, (3, 4, 6, 3), c2_channels=64),
    "resnet50": Variant(Bottleneck, (3, 4, 6, 3)),
    "resnet101": Variant(Bottleneck, (3, 4, 23, 3)),
    "resnet152": Variant(Bottleneck, (3, 8, 36, 3)),
    # ResNeXt, arXiv:1611.05431, table 1; 64x4d is section 5.1.
    "resnext50_32x4d": Variant(Bottleneck, (3, 4, 6, 3), groups=32, width_per_group=4),
    "resnext101_32x8d": Variant(Bottleneck, (3, 4, 23, 3), groups=32, width_per_group=8),
    "resnext101_64x4d": Variant(Bottleneck, (3, 4, 23, 3), groups=64, width_per_group=4),
    # Wide Residual Networks, arXiv:1605.07146, table 8: twice the width inside the bottleneck.
    "wide_resnet50_2": Variant(Bottleneck, (3, 4, 6, 3), width_per_group=128),
    "wide_resnet101_2": Variant(Bottleneck, (3, 4, 23, 3), width_per_group=128),
    # ResNet-D, arXiv:1812.01187, table 5; timm's names.
    "resnet18d": Variant(BasicBlock, (2, 2, 2, 2), c2_channels=64, deep_stem=True, pooled_shortcuts=True),
    "resnet34d": Variant(BasicBlock, (3, 4, 6, 3), c2_channels=64, deep_stem=True, pooled_shortcuts=True),
    "resnet50d": Variant(Bottleneck, (3, 4, 6, 3), deep_stem=True, pooled_shortcuts=True),
    "resnet101d": Variant(Bottleneck, (3, 4, 23, 3), deep_stem=True, pooled_shortcuts=True),
    "resnet152d": Variant(Bottleneck, (3, 8, 36, 3), deep_stem=True, pooled_shortcuts=True),
}
for _d in ("resnet18d", "resnet34d"):  # RT-DETR's small ones, arXiv:2304.08069: PaddleDetection projects C2's shortcut
    FAMILY[_d.replace("d", "vd")] = replace(FAMILY[_d], projects_first=True)


class Stage(nn.Sequential):
    """The residual blocks of one stage.

    Args:
        blocks: The blocks in order.
        recompute: Whether each block's activations are recomputed in backward instead of kept.
    """

    def __init__(self, *blocks: nn.Module, recompute: bool = False) -> None:
        super().__init__(*blocks)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, C_in, H, W) -> (N, C_out, H / stride, W / stride); sizes round up."""
        if not self.recompute or not torch.is_grad_enabled():
            return run_blocks(self, x)
        for block in self:
            x = _recomputed(block, x)
        return x


register_sequence(Stage)


class ResNet(Backbone):
    """ResNet, ResNeXt or Wide ResNet as C2 to C5 feature maps, with torchvision's parameter names.

    Weights start as in torchvision: He initialisation of convolutions (arXiv:1502.01852), unit norms.

    Args:
        variant: Row of the depth table.
        in_channels: Channels of the images.
        norm: Norm layers, by name or as a constructor (number of channels -> module).
        output_stride: Largest stride, in image pixels: 32, 16 or 8.
        dilate_first_block: Dilation convention, see ``plan_stages``.
        dilations: Dilation of C2 to C5, where it is not what ``output_stride`` asks for.
        multi_grid: What multiplies the dilation in each block of C5 (arXiv:1706.05587, section 3.2).
        stride_in_1x1: Bottleneck stride in the first 1x1 (v1) instead of the 3x3 (v1.5).
        out_features: Features to return, of ``c1`` (the stem before its pool) to ``c5``; later stages are not built.
        num_classes: Classes of the ImageNet classifier, whose ``logits`` (N, num_classes) join the outputs.
        zero_init_residual: Whether the last norm of each block starts at zero.
        checkpoint_stages: Stages that recompute their activations in backward.
        conv3x3_by_stage: For stages of bottlenecks whose 3x3 convolutions are of another kind, ``c2`` to ``c5``:
            their constructor.

    Raises:
        ValueError: If a setting cannot be honoured: an ``output_stride`` out of range, or ``stride_in_1x1`` in
            a network of BasicBlocks, which have no 1x1.
    """

    def __init__(
        self,
        variant: Variant,
        *,
        in_channels: int = 3,
        norm: NormName | NormLayer = "frozen_bn",
        output_stride: int = 32,
        dilate_first_block: bool = False,
        dilations: Sequence[int] | None = None,
        multi_grid: Sequence[int] | None = None,
        stride_in_1x1: bool = False,
        out_features: Sequence[str] = ("c2", "c3", "c4", "c5"),
        num_classes: int | None = None,
        zero_init_residual: bool = False,
        checkpoint_stages: Sequence[str] = (),
        conv3x3_by_stage: Mapping[str, Conv3x3] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        if stride_in_1x1 and variant.block is BasicBlock:
            raise ValueError(
                "stride_in_1x1 must be false for resnet18 and resnet34, whose blocks have no 1x1 convolution "
                "to stride in, got true; remove the key or choose resnet50 or deeper"
            )
        if conv3x3_by_stage and variant.block is BasicBlock:
            raise ValueError(
                f"conv3x3_by_stage must be empty for resnet18 and resnet34, whose 3x3 convolutions come in pairs, got "
                f"{', '.join(conv3x3_by_stage)}; remove it or choose resnet50 or deeper"
            )
        make_norm = norm_layer(norm)
        self.in_channels = in_channels
        channels = variant.stem_channels
        self.conv1 = (
            DeepStem(in_channels, channels // 2, channels, make_norm)
            if variant.deep_stem
            else nn.Conv2d(in_channels, channels, 7, stride=2, padding=3, bias=False)
        )
        self.bn1 = make_norm(channels)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.stage_modules: dict[str, tuple[str, ...]] = {"stem": ("conv1", "bn1", "relu", "maxpool")}
        if "c1" in out_features:
            self.feature_specs["c1"] = FeatureSpec(channels, C1_STRIDE)
        if multi_grid is not None and len(multi_grid) != variant.depths[-1]:
            raise ValueError(
                f"multi_grid must have one entry for each of the {variant.depths[-1]} blocks of c5, got "
                f"{list(multi_grid)}"
            )
        plans = plan_stages(output_stride, dilate_first_block=dilate_first_block, dilations=dilations)
        last = len(plans) if num_classes is not None else max(map(stage_number, out_features))
        for number, plan in enumerate(plans[:last]):
            make_conv3x3 = conv3x3_by_stage.get(plan.name)
            grid = multi_grid if plan is plans[-1] else None
            blocks = _blocks(variant, number, plan, grid, channels, stride_in_1x1, make_norm, make_conv3x3)
            channels = variant.c2_channels << number
            stage = Stage(*blocks, recompute=plan.name in checkpoint_stages)
            self.add_module(f"layer{number + 1}", stage)
            self.stage_modules[plan.name] = (f"layer{number + 1}",)
            if plan.name in out_features:
                self.feature_specs[plan.name] = FeatureSpec(channels, plan.output_stride)
        self.fc = nn.Linear(channels, num_classes) if num_classes is not None else None
        unbuilt = [f"layer{number}." for number in range(last + 1, len(plans) + 1)]
        self.unbuilt_prefixes = (*unbuilt, "fc.") if self.fc is None else ()
        self._initialise(zero_init_residual)

    def forward(self, images: Tensor) -> Features:
        """Images (N, in_channels, H, W) -> c2 (N, 256, H/4, W/4), ..., c5 (N, 2048, H/32, W/32); sizes round up.

        Channels are those of the bottleneck networks; resnet18 and resnet34 have a quarter. c1, where it is wanted, is
        (N, 64, H/2, W/2).
        """
        require_images(images, self.in_channels)
        features: Features = {}
        if "c1" in self.feature_specs:
            features["c1"] = self._c1(images)
            x = self.maxpool(features["c1"])
        else:
            x = self._stem(images)
        for name, paths in self.stage_modules.items():
            if name != "stem":
                x = self.get_submodule(paths[0])(x)
            if name in self.feature_specs:
                features[name] = x
        if self.fc is not None:
            features["logits"] = self.fc(x.mean((2, 3)))
        return features

    def _c1(self, images: Tensor) -> Tensor:
        c1 = conv_norm_act(images, self.conv1, self.bn1, act=self.relu)
        return self.relu(self.bn1(self.conv1(images))) if c1 is None else c1

    def split_off_c5(self) -> nn.Module:
        """Take C5 out of this network and return it, (N, C4 channels, H, W) -> (N, C5 channels, H / 2, W / 2)."""
        (path,) = self.stage_modules.pop("c5")
        self.feature_specs.pop("c5", None)
        self.unbuilt_prefixes = (f"{path}.", *self.unbuilt_prefixes)
        stage = self.get_submodule(path)
        delattr(self, path)
        return stage

    def _stem(self, images: Tensor) -> Tensor:
        """Images (N, in_channels, H, W) -> (N, 64, H/4, W/4); sizes round up."""
        first, after = self.conv1, (self.bn1, self.relu, self.maxpool)
        x = deep_stem(images, first, *after) if type(first) is DeepStem else stem(images, first, *after)
        return self.maxpool(self.relu(self.bn1(self.conv1(images)))) if x is None else x

    def _initialise(self, zero_init_residual: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is None:  # those that predict offsets have one
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, BasicBlock | Bottleneck) and zero_init_residual:
                nn.init.zeros_(module.last_norm.weight)  # type: ignore[arg-type]


register_pairs(ResNet, ("conv1", "bn1"), ("conv1.6", "bn1"))


def _blocks(
    variant: Variant,
    number: int,
    plan: StagePlan,
    multi_grid: Sequence[int] | None,
    in_channels: int,
    stride_in_1x1: bool,
    norm: NormLayer,
    make_conv3x3: Conv3x3 | None,
) -> list[nn.Module]:
    """Build the blocks of stage ``number`` (0 is C2). Only the first strides, with its own dilation."""
    out_channels = variant.c2_channels << number
    blocks: list[nn.Module] = []
    for index in range(variant.depths[number]):
        stride, first_dilation = (plan.stride, plan.first_dilation) if index == 0 else (1, plan.dilation)
        dilation = plan.dilation
        if multi_grid is not None:
            first_dilation = dilation = plan.dilation * multi_grid[index]
        always = variant.projects_first and number == index == 0
        pooled = partial(pooled_projection, dilated=plan.dilation > 1, always=always)
        shortcut = pooled if variant.pooled_shortcuts else None
        if issubclass(variant.block, BasicBlock):
            basic = variant.block(
                in_channels,
                out_channels,
                norm=norm,
                stride=stride,
                first_dilation=first_dilation,
                dilation=dilation,
                make_shortcut=shortcut,
            )
            blocks.append(basic)
        else:
            width = variant.groups * (variant.width_per_group << number)
            block = variant.block(
                in_channels,
                width,
                out_channels,
                norm=norm,
                stride=stride,
                dilation=first_dilation,
                groups=variant.groups,
                stride_in_1x1=stride_in_1x1,
                make_conv3x3=make_conv3x3,
                make_shortcut=shortcut,
            )
            blocks.append(block)
        in_channels = out_channels
    return blocks


def _recomputed(block: nn.Module, x: Tensor) -> Tensor:
    """Run ``block`` so that backward recomputes its activations, without counting the batch twice in its norms."""
    if torch.compiler.is_compiling():  # the compiler drops the second update itself, and takes no contexts
        return checkpoint(block, x, use_reentrant=False)  # type: ignore[no-any-return]
    contexts = lambda: (nullcontext(), _StatisticsUntouched(block))  # noqa: E731
    return checkpoint(block, x, use_reentrant=False, context_fn=contexts)  # type: ignore[no-any-return]


class _StatisticsUntouched(AbstractContextManager[None]):
    """Lets training batch norms update copies of their running statistics, and gives the originals back.

    It may be entered again: a graph that is retained goes backward more than once.
    """

    def __init__(self, block: nn.Module) -> None:
        self._norms = [module for module in block.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        self._originals: list[dict[str, Tensor | None]] = []

    def __enter__(self) -> None:
        self._originals = [norm._buffers for norm in self._norms]
        for norm, buffers in zip(self._norms, self._originals, strict=True):
            norm._buffers = {name: buffer if buffer is None else buffer.clone() for name, buffer in buffers.items()}

    def __exit__(self, *_: object) -> None:
        for norm, buffers in zip(self._norms, self._originals, strict=True):
            norm._buffers = buffers


def _register(name: str, variant: Variant) -> None:
    @register_backbone(name)
    def build(config: BackboneConfig) -> ResNet:
        return ResNet(
            variant,
            in_channels=config.in_channels,
            norm=config.norm,
            output_stride=config.output_stride,
            dilate_first_block=config.dilate_first_block,
            dilations=config.dilations,
            multi_grid=config.multi_grid,
            stride_in_1x1=config.stride_in_1x1,
            out_features=config.out_features,
            num_classes=config.num_classes,
            zero_init_residual=config.zero_init_residual,
            checkpoint_stages=config.checkpoint_stages,
        )


for _name, _variant in FAMILY.items():
    _register(_name, _variant)
