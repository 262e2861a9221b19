"""C2-C5 from the one map of a plain vision transformer (ViTDet, arXiv:2203.16527, section 3)."""

from collections.abc import Mapping

from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d

from backbone.features import Features, FeatureSpec


class SimplePyramid(nn.Module):
    """Finer maps by transposed convolutions, each halving the channels; coarser ones by max pooling.

    Args:
        channels: Channels of the transformer's map.
        stride: Its stride, in image pixels; a power of two.
        strides: Stride of each map to make.
    """

    def __init__(self, channels: int, stride: int, strides: Mapping[str, int]) -> None:
        super().__init__()
        self.specs: dict[str, FeatureSpec] = {}
        self.levels = nn.ModuleDict()
        for name, wanted in strides.items():
            if wanted >= stride:
                self.levels[name] = nn.Identity() if wanted == stride else nn.MaxPool2d(wanted // stride)
                self.specs[name] = FeatureSpec(channels, wanted)
            else:
                doublings = (stride // wanted).bit_length() - 1
                self.levels[name] = _finer(channels, doublings)
                self.specs[name] = FeatureSpec(channels >> doublings, wanted)

    def forward(self, x: Tensor) -> Features:
        """Features (N, C, H, W) -> one map per name, of its own stride."""
        return {name: level(x) for name, level in self.levels.items()}


def _finer(channels: int, doublings: int) -> nn.Sequential:
    """Return layers that double the resolution ``doublings`` times."""
    layers: list[nn.Module] = []
    for doubling in range(doublings):
        if doubling:
            layers += [LayerNorm2d(channels), nn.GELU()]
        layers.append(nn.ConvTranspose2d(channels, channels // 2, kernel_size=2, stride=2))
        channels //= 2
    return nn.Sequential(*layers)
