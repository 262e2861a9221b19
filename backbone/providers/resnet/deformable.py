"""Deformable 3x3 convolution (arXiv:1703.06211), also modulated (arXiv:1811.11168), on torchvision's kernel."""

from torch import Tensor, nn
from torchvision.ops import DeformConv2d, deform_conv2d


class DeformableConv3x3(DeformConv2d):  # type: ignore[misc]
    """A 3x3 convolution that samples its input where a second one, ``offset``, tells it to.

    Fresh, every offset is zero: it is then the plain convolution, modulated half of it.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Stride.
        dilation: Dilation, of the offsets' convolution too.
        groups: Groups of the convolution.
        modulated: Whether each sample is weighted as well (version 2).
        offset_groups: Groups of input channels that have offsets of their own.

    Attributes:
        offset: Predicts, per group, nine (y, x) offsets in input pixels; after those of all groups the nine weights,
            before their sigmoid, in detectron2's order.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        dilation: int,
        groups: int,
        *,
        modulated: bool = False,
        offset_groups: int = 1,
    ) -> None:
        super().__init__(in_channels, out_channels, 3, stride, dilation, dilation, groups, bias=False)
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")  # as every 3x3 here
        self.num_offsets = 18 * offset_groups
        self.num_weights = 9 * offset_groups if modulated else 0
        self.offset = nn.Conv2d(in_channels, self.num_offsets + self.num_weights, 3, stride, dilation, dilation)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride); sizes round up."""
        offsets, weights = self.offset(x).split([self.num_offsets, self.num_weights], dim=1)
        mask = weights.sigmoid() if self.num_weights else None
        return deform_conv2d(  # type: ignore[no-any-return]
            x, offsets, self.weight, None, self.stride, self.padding, self.dilation, mask
        )
