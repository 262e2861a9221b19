"""The pieces of the ResNet family (arXiv:1512.03385): two residual blocks (figure 5) and what is in and before them."""

from collections.abc import Callable
from typing import ClassVar, Final, TypeAlias

import torch
from torch import Tensor, nn

from backbone.calls import is_seen_through, needs_grad
from backbone.fused import conv_norm_act, residual_block
from backbone.norm import NormLayer

Conv3x3: TypeAlias = Callable[[int, int, int, int, int], nn.Module]
"""Constructor of a 3x3 convolution: in_channels, out_channels, stride, dilation, groups."""

_FRESH_BYTES: Final = 32 * 2**20
_POOL_BYTES: Final = 8 * 2**20  # of features at a time, so that what is between stays in the cache


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


class StemPool(nn.MaxPool2d):
    """The 3x3 maximum with stride 2 after a ResNet's first convolution.

    torch's kernel also stores where each maximum was, in 64 bits, which only a gradient needs. On the CPU that is most
    of its time in half precision, and in any where glibc takes such memory from the system anew each time: from 32 MiB.
    """

    def __init__(self) -> None:
        super().__init__(3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, C, H, W) -> (N, C, H / 2, W / 2); sizes round up."""
        if x.device.type == "cpu" and not (is_seen_through(x) or needs_grad(x)):
            height, width = x.shape[2:]
            stores_much = x.element_size() == 2 or x.numel() // 4 * 8 >= _FRESH_BYTES  # noqa: PLR2004
            if stores_much and height % 2 == width % 2 == 0:
                return _max_of_pairs(x)
        out: Tensor = super().forward(x)
        return out


class Projection(nn.Sequential):
    """The 1x1 convolution and norm of a shortcut that changes shape (option B of the paper)."""

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


def _max_of_pairs(x: Tensor) -> Tensor:
    """(N, C, H, W) with even H and W -> the maximum of every 3x3 with stride 2: of pairs of rows, then of columns."""
    upper, lower = x[:, :, ::2], x[:, :, 1::2]
    out = torch.empty_like(upper[..., ::2])
    rows = max(1, upper.shape[2] * _POOL_BYTES // x.nbytes)
    for start in range(0, upper.shape[2], rows):
        stop, first = min(start + rows, upper.shape[2]), max(start, 1)
        tall = torch.maximum(upper[:, :, start:stop], lower[:, :, start:stop])
        inner = tall[:, :, first - start :]  # the first row of all has no row above
        torch.maximum(inner, lower[:, :, first - 1 : stop - 1], out=inner)
        left, right = tall[..., ::2], tall[..., 1::2]
        done = torch.maximum(left, right, out=out[:, :, start:stop])
        torch.maximum(done[..., 1:], right[..., :-1], out=done[..., 1:])
    return out
