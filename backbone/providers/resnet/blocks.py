"""The two residual blocks of the ResNet family (arXiv:1512.03385, figure 5), under torchvision's names."""

from collections.abc import Callable
from typing import ClassVar, TypeAlias

from torch import Tensor, nn

from backbone.engine.operation import conv_norm_act, residual_block
from backbone.norm import NormLayer

Conv3x3: TypeAlias = Callable[[int, int, int, int, int], nn.Module]
"""Constructor of a 3x3 convolution: in_channels, out_channels, stride, dilation, groups."""


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (ResNet-18 and -34).

    Args:
        in_channels: Channels of the input.
        width: Channels of both convolutions and of the output.
        stride: Stride of the first convolution and of the shortcut.
        first_dilation: Dilation of the first convolution.
        dilation: Dilation of the second.
        norm: Constructor of the norm layers.
    """

    conv_norm_pairs: ClassVar = (("conv1", "bn1"), ("conv2", "bn2"))

    def __init__(
        self, in_channels: int, width: int, stride: int, first_dilation: int, dilation: int, norm: NormLayer
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, width, stride, first_dilation)
        self.bn1 = norm(width)
        self.conv2 = conv3x3(width, width, 1, dilation)
        self.bn2 = norm(width)
        self.downsample = _projection(in_channels, width, stride, norm)

    @property
    def last_norm(self) -> nn.Module:
        """The norm before the shortcut is added."""
        return self.bn2

    def forward(self, x: Tensor, *, reuse_input: bool = False) -> Tensor:
        """Features (N, in_channels, H, W) -> (N, width, H / stride, W / stride); sizes round up.

        ``reuse_input`` says that nobody needs ``x`` any more, so that the output may take its memory.
        """
        layers = ((self.conv1, self.bn1), (self.conv2, self.bn2))
        return residual_block(x, layers, self.downsample, reuse_input=reuse_input)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around a shortcut (ResNet-50 and deeper, ResNeXt, Wide ResNet).

    Args:
        in_channels: Channels of the input.
        width: Channels of the first two convolutions.
        out_channels: Channels of the output.
        stride: Stride of the block.
        dilation: Dilation of the 3x3 convolution.
        groups: Groups of the 3x3 convolution (ResNeXt's cardinality, arXiv:1611.05431).
        stride_in_1x1: Whether the first 1x1 strides (v1) rather than the 3x3 (v1.5).
        norm: Constructor of the norm layers.
        make_conv3x3: Constructor of the 3x3 convolution; ``conv3x3`` where None.
    """

    conv_norm_pairs: ClassVar = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))

    def __init__(
        self,
        in_channels: int,
        width: int,
        out_channels: int,
        stride: int,
        dilation: int,
        groups: int,
        stride_in_1x1: bool,
        norm: NormLayer,
        make_conv3x3: Conv3x3 | None = None,
    ) -> None:
        super().__init__()
        stride_1x1, stride_3x3 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = nn.Conv2d(in_channels, width, 1, stride_1x1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = (make_conv3x3 or conv3x3)(width, width, stride_3x3, dilation, groups)
        self.bn2 = norm(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = norm(out_channels)
        self.downsample = _projection(in_channels, out_channels, stride, norm)

    @property
    def last_norm(self) -> nn.Module:
        """The norm before the shortcut is added."""
        return self.bn3

    def forward(self, x: Tensor, *, reuse_input: bool = False) -> Tensor:
        """Features (N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride); sizes round up.

        ``reuse_input`` says that nobody needs ``x`` any more, so that the output may take its memory.
        """
        layers = ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3))
        return residual_block(x, layers, self.downsample, reuse_input=reuse_input)


class Projection(nn.Sequential):
    """The 1x1 convolution and norm of a shortcut that changes shape (option B of the paper)."""

    conv_norm_pairs: ClassVar = (("0", "1"),)

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride); sizes round up."""
        conv, norm, *more = self
        x = conv_norm_act(x, conv, norm, relu=False)
        for module in more:
            x = module(x)
        return x


def conv3x3(in_channels: int, out_channels: int, stride: int, dilation: int, groups: int = 1) -> nn.Conv2d:
    """Return a 3x3 convolution whose output is the input size divided by ``stride``, rounded up."""
    return nn.Conv2d(in_channels, out_channels, 3, stride, dilation, dilation, groups, bias=False)


def _projection(in_channels: int, out_channels: int, stride: int, norm: NormLayer) -> Projection | None:
    """Return the shortcut's projection, or None where the shortcut is the identity."""
    if stride == 1 and in_channels == out_channels:
        return None
    return Projection(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), norm(out_channels))
