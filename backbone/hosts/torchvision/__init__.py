"""torchvision's detectors and segmenters on any backbone."""

from backbone.hosts.torchvision.adapter import TorchvisionBackbone, as_torchvision
from backbone.hosts.torchvision.detectors import ASPECT_RATIOS, ATROUS_REACH, build_detector
from backbone.hosts.torchvision.names import from_torchvision_names, load_torchvision_state, to_torchvision_names
from backbone.hosts.torchvision.transform import (
    BackboneTransform,
    detector_kwargs,
    expect_images,
    torchvision_transform,
    unit_statistics,
)

__all__ = [
    "ASPECT_RATIOS",
    "ATROUS_REACH",
    "BackboneTransform",
    "TorchvisionBackbone",
    "as_torchvision",
    "build_detector",
    "detector_kwargs",
    "expect_images",
    "from_torchvision_names",
    "load_torchvision_state",
    "to_torchvision_names",
    "torchvision_transform",
    "unit_statistics",
]
