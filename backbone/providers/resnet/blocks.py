"""The two residual blocks of the ResNet family (arXiv:1512.03385, figure 5), under torchvision's names."""

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor, nn

from backbone.engine import Parts, register_block, register_pairs, residual_block
from backbone.norm import NormLayer

Projection: TypeAlias = Callable[[int, int, int, NormLayer], nn.Sequential | None]
"""Constructor of a shortcut: in_channels, out_channels, stride, norm; it returns None for the identity."""

Conv3x3: TypeAlias = Callable[[int, int, int, int, int], nn.Module]
"""Constructor of a 3x3 convolution: in_channels, out_channels, stride, dilation, groups."""


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (ResNet-18 and -34).

    Args:
        in_channels: Channels of the input.
        width: Channels of both convolutions and of the output.
        norm: Constructor of the norm layers.
        stride: Stride of the first convolution and of the shortcut.
        first_dilation: Dilation of the first convolution.
        dilation: Dilation of the second.
        make_shortcut: Constructor of the shortcut; ``projection`` where None.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        *,
        norm: NormLayer,
        stride: int = 1,
        first_dilation: int = 1,
        dilation: int = 1,
        make_shortcut: Projection | None = None,
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, width, stride, first_dilation)
        self.bn1 = norm(width)
        self.relu = nn.ReLU()
        self.conv2 = conv3x3(width, width, 1, dilation)
        self.bn2 = norm(width)
        self.downsample = (make_shortcut or projection)(in_channels, width, stride, norm)

    @property
    def last_norm(self) -> nn.Module:
        """The norm before the shortcut is added."""
        return self.bn2

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, in_channels, H, W) -> (N, width, H / stride, W / stride); sizes round up."""
        out = residual_block(self, x)
        if out is not None:
            return out
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(out + shortcut)  # type: ignore[no-any-return]


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around a shortcut (ResNet-50 and deeper, ResNeXt, Wide ResNet).

    Args:
        in_channels: Channels of the input.
        width: Channels of the first two convolutions.
        out_channels: Channels of the output.
        norm: Constructor of the norm layers.
        stride: Stride of the block.
        dilation: Dilation of the 3x3 convolution.
        groups: Groups of the 3x3 convolution (ResNeXt's cardinality, arXiv:1611.05431).
        stride_in_1x1: Whether the first 1x1 strides (v1) rather than the 3x3 (v1.5).
        make_conv3x3: Constructor of the 3x3 convolution; ``conv3x3`` where None.
        make_shortcut: Constructor of the shortcut; ``projection`` where None.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        out_channels: int,
        *,
        norm: NormLayer,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        stride_in_1x1: bool = False,
        make_conv3x3: Conv3x3 | None = None,
        make_shortcut: Projection | None = None,
    ) -> None:
        super().__init__()
        stride_1x1, stride_3x3 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = nn.Conv2d(in_channels, width, 1, stride_1x1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = (make_conv3x3 or conv3x3)(width, width, stride_3x3, dilation, groups)
        self.bn2 = norm(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = norm(out_channels)
        self.relu = nn.ReLU()
        self.downsample = (make_shortcut or projection)(in_channels, out_channels, stride, norm)

    @property
    def last_norm(self) -> nn.Module:
        """The norm before the shortcut is added."""
        return self.bn3

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride); sizes round up."""
        out = residual_block(self, x)
        if out is not None:
            return out
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(out + shortcut)  # type: ignore[no-any-return]


def conv3x3(in_channels: int, out_channels: int, stride: int, dilation: int, groups: int = 1) -> nn.Conv2d:
    """Return a 3x3 convolution whose output is the input size divided by ``stride``, rounded up."""
    return nn.Conv2d(in_channels, out_channels, 3, stride, dilation, dilation, groups, bias=False)


def projection(in_channels: int, out_channels: int, stride: int, norm: NormLayer) -> nn.Sequential | None:
    """Return the shortcut's 1x1 convolution and norm (option B of the paper), or None where it is the identity."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), norm(out_channels))


def _basic_parts(block: BasicBlock) -> Parts:
    layers = (block.conv1, block.bn1), (block.conv2, block.bn2)
    return Parts(layers, (block.relu,), block.downsample)


def _bottleneck_parts(block: Bottleneck) -> Parts:
    layers = (block.conv1, block.bn1), (block.conv2, block.bn2), (block.conv3, block.bn3)
    return Parts(layers, (block.relu,), block.downsample)


register_block(BasicBlock, _basic_parts)
register_pairs(BasicBlock, ("conv1", "bn1"), ("conv2", "bn2"))
register_block(Bottleneck, _bottleneck_parts)
register_pairs(Bottleneck, ("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))
