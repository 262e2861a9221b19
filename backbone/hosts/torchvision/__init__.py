"""torchvision's detectors and segmenters on any backbone."""

from backbone.hosts.torchvision.detectors import (
    ASPECT_RATIOS,
    ATROUS_REACH,
    TorchvisionBackbone,
    as_torchvision,
    build_detector,
    expect_images,
    from_torchvision_names,
    load_torchvision_state,
    to_torchvision_names,
    unit_statistics,
)

__all__ = [
    "ASPECT_RATIOS",
    "ATROUS_REACH",
    "TorchvisionBackbone",
    "as_torchvision",
    "build_detector",
    "expect_images",
    "from_torchvision_names",
    "load_torchvision_state",
    "to_torchvision_names",
    "unit_statistics",
]
