"""A backbone in a package of its own: what a third party writes, and all it writes."""

from torch import Tensor, nn

from backbone import Backbone, BackboneConfig, Features, FeatureSpec
from backbone.norm import norm_layer
from backbone.stages import plan_stages


class TinyPyramidNet(Backbone):
    """A stem and four strided convolutions: C2 to C5 with 16 to 128 channels."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        make_norm = norm_layer(config.norm)
        self.stem = nn.Conv2d(config.in_channels, 16, 4, stride=4)
        self.stage_modules = {"stem": ("stem",)}
        channels = 16
        for number, plan in enumerate(plan_stages(config.output_stride, dilate_first_block=config.dilate_first_block)):
            dilation = plan.first_dilation  # the first block of each stage is the only one
            conv = nn.Conv2d(channels, 16 << number, 3, plan.stride, dilation, dilation, bias=False)
            channels = conv.out_channels
            self.add_module(plan.name, nn.Sequential(conv, make_norm(channels), nn.ReLU()))
            self.stage_modules[plan.name] = (plan.name,)
            if plan.name in config.out_features:
                self.feature_specs[plan.name] = FeatureSpec(channels, plan.output_stride)

    def forward(self, images: Tensor) -> Features:
        """Images (N, C, H, W) -> c2 (N, 16, H/4, W/4), ..., c5 (N, 128, H/32, W/32); sizes round up."""
        height, width = images.shape[-2:]
        x = self.stem(nn.functional.pad(images, (0, -width % 4, 0, -height % 4)))
        features: Features = {}
        for name in ("c2", "c3", "c4", "c5"):
            x = self.get_submodule(name)(x)
            if name in self.feature_specs:
                features[name] = x
        return features


def build(config: BackboneConfig) -> TinyPyramidNet:
    """Return the network for ``config``; refuse what it has no way to do."""
    unsupported = {
        "stride_in_1x1": config.stride_in_1x1,
        "num_classes": config.num_classes,
        "zero_init_residual": config.zero_init_residual,
        "checkpoint_stages": config.checkpoint_stages,
    }
    for key, value in unsupported.items():
        if value:
            raise ValueError(f"tiny_pyramid_net has no {key}, got {value!r}; remove the key")
    return TinyPyramidNet(config)
