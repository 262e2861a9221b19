"""timm's residual blocks and convolution-norm-activation units on our fused operations (fused.py).

The classes are timm's own with another ``forward``: parameters, names and results stay what they were. What more a
block has (attention, blurring, activations other than ReLU, drop layers at work) stays with timm's ``forward``.
"""

import itertools
from collections import deque
from typing import Final

from timm.layers.conv_bn_act import ConvNormAct
from timm.layers.drop import DropBlock2d, DropPath
from timm.models import regnet, resnet
from torch import Tensor, nn

from backbone.engine.calls import is_watched
from backbone.engine.folded import FoldedConv2d
from backbone.engine.operation import blocks_in_row, conv_norm_act, residual_block
from backbone.norm import FrozenBatchNorm2d


def fuse(network: nn.Module) -> None:
    """Let the stages, blocks and units in ``network`` that timm shares between families run as fused operations."""
    for module in network.modules():
        if type(module) in FUSED:
            module.__class__ = FUSED[type(module)]
        elif type(module) is nn.Sequential:
            children = list(module)
            if any(type(child) in (resnet.BasicBlock, resnet.Bottleneck) for child in children):
                module.__class__ = FusedStage
            elif any(hasattr(child, "running_var") for child in children):
                module.__class__ = FusedLayers


class FusedBasicBlock(resnet.BasicBlock):
    """timm's BasicBlock: convolutions, norms, shortcut and ReLUs are one operation."""

    downsample: nn.Sequential | None

    def forward(self, x: Tensor, *, reuse_input: bool = False) -> Tensor:
        """Features (N, C_in, H, W) -> (N, C_out, H / stride, W / stride), sizes round up."""
        if not _are_relus(self.act1, self.act2) or not _rest(self.drop_block, self.aa, self.se, self.drop_path):
            return super().forward(x)
        layers = ((self.conv1, self.bn1), (self.conv2, self.bn2))
        return residual_block(x, layers, self.downsample, reuse_input=reuse_input)


class FusedBottleneck(resnet.Bottleneck):
    """timm's Bottleneck: convolutions, norms, shortcut and ReLUs are one operation."""

    downsample: nn.Sequential | None

    def forward(self, x: Tensor, *, reuse_input: bool = False) -> Tensor:
        """Features (N, C_in, H, W) -> (N, C_out, H / stride, W / stride), sizes round up."""
        relus = _are_relus(self.act1, self.act2, self.act3)
        if not relus or not _rest(self.drop_block, self.aa, self.se, self.drop_path):
            return super().forward(x)
        layers = ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3))
        return residual_block(x, layers, self.downsample, reuse_input=reuse_input)


class FusedRegNetBottleneck(regnet.Bottleneck):
    """RegNet's bottleneck: the last convolution, its norm, the shortcut and the ReLU are one operation."""

    def forward(self, x: Tensor, *, reuse_input: bool = False) -> Tensor:
        """Features (N, C_in, H, W) -> (N, C_out, H / stride, W / stride), sizes round up."""
        last, shortcut = self.conv3, self.downsample
        if shortcut is None or is_watched(last) or not _are_relus(self.act3) or not _rest(last.aa, self.drop_path):
            return super().forward(x)
        out = self.se(self.conv2(self.conv1(x)))
        reuse = reuse_input and isinstance(shortcut, nn.Identity)
        return conv_norm_act(out, last.conv, last.bn, shortcut(x), reuse_residual=reuse)


class FusedConvNormAct(ConvNormAct):
    """A convolution, its norm and its activation as one operation."""

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, C_in, H, W) -> (N, C_out, H / stride, W / stride); sizes round up."""
        out = conv_norm_act(x, self.conv, self.bn, relu=False)  # the norm has the activation
        return out if self.aa is None else self.aa(out)


class FusedStage(nn.Sequential):
    """The blocks of a ResNet's stage."""

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, C_in, H, W) -> (N, C_out, H / stride, W / stride); sizes round up."""
        return blocks_in_row(self, (FusedBasicBlock, FusedBottleneck), x)


class FusedRegStage(regnet.RegStage):
    """The blocks of a RegNet's stage."""

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, C_in, H, W) -> (N, C_out, H / stride, W / stride); sizes round up."""
        if self.grad_checkpointing:
            return super().forward(x)
        return blocks_in_row(self.children(), (FusedRegNetBottleneck,), x)


class FusedLayers(nn.Sequential):
    """The layers of a shortcut or a stem: a convolution, norm and ReLU in a row are one operation."""

    @property
    def conv_norm_pairs(self) -> list[tuple[str, str]]:
        """The names of all neighbours: where they are a convolution and its norm, they may be folded."""
        return list(itertools.pairwise(self._modules))

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, C_in, H, W) -> (N, C_out, H / stride, W / stride); sizes round up."""
        layers = deque(self)
        while layers:
            layer = layers.popleft()
            follower = layers[0] if layers else None
            if isinstance(layer, FoldedConv2d) or (
                isinstance(layer, nn.Conv2d) and isinstance(follower, FrozenBatchNorm2d)
            ):
                norm = layers.popleft() if layers else nn.Identity()
                relu = bool(layers) and _are_relus(layers[0])
                x = conv_norm_act(x, layer, norm, relu=relu)
                if relu:
                    layers.popleft()
            else:
                x = layer(x)
        return x


FUSED: Final[dict[type[nn.Module], type[nn.Module]]] = {
    resnet.BasicBlock: FusedBasicBlock,
    resnet.Bottleneck: FusedBottleneck,
    regnet.Bottleneck: FusedRegNetBottleneck,
    regnet.RegStage: FusedRegStage,
    ConvNormAct: FusedConvNormAct,
}
"""timm's classes and what they become; of a Sequential its children decide."""


def _are_relus(*activations: nn.Module) -> bool:
    return all(type(activation) is nn.ReLU and not is_watched(activation) for activation in activations)


def _rest(*modules: nn.Module | None) -> bool:
    """Whether these modules do nothing now, and nobody watches them."""
    return all(module is None or (is_idle(module) and not is_watched(module)) for module in modules)


def is_idle(module: nn.Module) -> bool:
    """Whether a drop layer passes on what it gets."""
    return type(module) is nn.Identity or (isinstance(module, DropPath | DropBlock2d) and not module.training)
