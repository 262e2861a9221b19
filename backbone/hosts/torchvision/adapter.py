"""A backbone under the names that torchvision's detectors expect."""

from collections.abc import Mapping

from torch import Tensor

from backbone.calling import look_at_detector
from backbone.features import Backbone, Features
from backbone.pyramid import FeaturePyramid


class TorchvisionBackbone(Backbone):
    """A backbone, with or without a pyramid, under the names torchvision's detectors expect.

    Parameters are named as in torchvision's BackboneWithFPN: ``body.*`` and ``fpn.*``.

    Args:
        model: A backbone or a ``FeaturePyramid``.
        names: torchvision's name for each feature of ``model``.

    Attributes:
        out_channels: Channels of each feature map, the same for all where there is a pyramid.
        body: The backbone itself.
        fpn: The pyramid, or None.
        pyramid_settings: How the pyramid was built, or None.
    """

    body: Backbone

    def __init__(self, model: Backbone, names: Mapping[str, str]) -> None:
        super().__init__()
        pyramid = model if isinstance(model, FeaturePyramid) else None
        self.adopt("body", pyramid.body if pyramid else model)
        self.fpn = pyramid.fpn if pyramid else None
        self.pyramid_settings = pyramid.settings if pyramid else None
        self.feature_specs = {names[name]: spec for name, spec in model.feature_specs.items()}
        self.out_channels = next(reversed(self.feature_specs.values())).channels
        look_at_detector(self)

    def forward(self, images: Tensor) -> Features:
        """Images (N, C, H, W) -> "0" (N, 256, H/4, W/4), "1" (N, 256, H/8, W/8), ...; sizes round up."""
        features = self.body(images)
        features = {name: features[name] for name in self.body.feature_specs}
        if self.fpn is not None:
            features = self.fpn(features)
        return dict(zip(self.feature_specs, features.values(), strict=True))


def as_torchvision(model: Backbone) -> TorchvisionBackbone:
    """Return ``model`` as torchvision's ``FasterRCNN(backbone, ...)`` and its siblings take it.

    Feature maps are called "0", "1", ... from the finest, the level above the backbone's last ``pool``, or ``p6`` and
    ``p7`` where there are two, as in torchvision. Modules are shared with ``model``, not copied.

    Args:
        model: A ``FeaturePyramid``, or a backbone with one feature map.

    Raises:
        ValueError: If ``model`` has several feature maps of different channels, which torchvision's heads cannot take.
    """
    channels = {spec.channels for spec in model.feature_specs.values()}
    if len(channels) > 1:
        raise ValueError(
            f"torchvision's heads need the same channels on every level, got {', '.join(model.feature_specs)} with "
            f"{', '.join(map(str, sorted(channels)))}; put a FeaturePyramid on it or name one of out_features"
        )
    num_maps = len(model.body.feature_specs) if isinstance(model, FeaturePyramid) else len(model.feature_specs)
    extra = list(model.feature_specs)[num_maps:]
    names = [*map(str, range(num_maps)), *(["pool"] if len(extra) == 1 else extra)]
    return TorchvisionBackbone(model, dict(zip(model.feature_specs, names, strict=True)))
