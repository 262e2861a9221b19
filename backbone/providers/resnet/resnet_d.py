"""What makes a ResNet-D (arXiv:1812.01187, figures 1 and 2): a deep stem, and shortcuts that average as they stride.

Named as in timm. RT-DETR, PaddleDetection and SMP call it vd, mmdetection v1d.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from backbone.engine import conv_norm_act, has_hook, stem
from backbone.norm import NormLayer
from backbone.providers.resnet.blocks import conv3x3


class DeepStem(nn.Sequential):
    """Three 3x3 convolutions in place of the 7x7, with the norms and ReLUs between them.

    Args:
        in_channels: Channels of the images.
        width: Channels of the first two convolutions.
        out_channels: Channels of the last, whose norm follows this module.
        norm: Constructor of the norm layers.
    """

    def __init__(self, in_channels: int, width: int, out_channels: int, norm: NormLayer) -> None:
        first = conv3x3(in_channels, width, 2, 1), norm(width), nn.ReLU()
        second = conv3x3(width, width, 1, 1), norm(width), nn.ReLU()
        super().__init__(*first, *second, conv3x3(width, out_channels, 1, 1))


def deep_stem(images: Tensor, layers: DeepStem, norm: nn.Module, act: nn.Module, pool: nn.Module) -> Tensor | None:
    """Return ``pool(act(norm(layers(images))))``: (N, C_in, H, W) -> (N, C, H / 4, W / 4); sizes round up.

    None where these are to be called.
    """
    if has_hook(layers) or len(layers) % 3 != 1:  # something was added or taken away
        return None
    *inner, last = layers
    x: Tensor | None = images
    for start in range(0, len(inner), 3):
        conv, between, relu = inner[start : start + 3]
        x = None if x is None else conv_norm_act(x, conv, between, act=relu)
    return None if x is None else stem(x, last, norm, act, pool)


class SameAvgPool2d(nn.AvgPool2d):
    """The mean of 2x2 pixels at every pixel, zeros beyond the right and lower edge: what stride 1 leaves of a pool."""

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, C, H, W) -> the same shape."""
        return super().forward(F.pad(x, (0, 1, 0, 1)))


def pooled_projection(
    in_channels: int, out_channels: int, stride: int, norm: NormLayer, *, dilated: bool = False, always: bool = False
) -> nn.Sequential | None:
    """Return a shortcut whose convolution takes the mean of the pixels that the block strides over.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Stride of the block.
        norm: Constructor of the norm.
        dilated: Whether the stage dilates in place of its stride; timm averages then, too.
        always: Whether there is a convolution also where the shape needs none.

    Returns:
        The shortcut; None where it is the identity.
    """
    if stride == 1 and in_channels == out_channels and not always:
        return None
    pool: nn.Module = SameAvgPool2d(2, 1) if dilated else nn.Identity()
    if stride > 1:
        pool = nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)
    return nn.Sequential(pool, nn.Conv2d(in_channels, out_channels, 1, bias=False), norm(out_channels))
