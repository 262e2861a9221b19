"""State dicts of torchvision's own detectors and segmenters, and ours: only segmenters differ in names."""

import re
from collections.abc import Mapping

from torch import Tensor, nn

from backbone.norm import FrozenBatchNorm2d


def load_torchvision_state(
    detector: nn.Module, state: Mapping[str, Tensor], *, frozen_norm_eps: float | None = None
) -> None:
    """Load, strictly, a state dict of torchvision's own detector into one of ``build_detector``.

    Args:
        detector: The same detector on the same backbone.
        state: ``state_dict()`` of torchvision's model, or its file's content.
        frozen_norm_eps: Set on every frozen norm. torchvision's COCO_V1 weights of Faster, Mask and Keypoint R-CNN
            and RetinaNet were trained with 0.0.

    Raises:
        RuntimeError: (torch's) If a key is missing, unexpected or of another shape.
    """
    detector.load_state_dict(from_torchvision_names(state))
    for module in detector.modules():
        if isinstance(module, FrozenBatchNorm2d) and frozen_norm_eps is not None:
            module.eps = frozen_norm_eps


def from_torchvision_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of torchvision's detector or segmenter under our names: only segmenters differ."""
    renamed = {}
    for key, value in state.items():
        inside = key.removeprefix("backbone.")
        rename = inside != key and not inside.startswith(("body.", "fpn."))
        renamed[f"backbone.body.{inside}" if rename else key] = value
    return renamed


def to_torchvision_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of ours under the names of torchvision's own detector or segmenter."""
    if any(key.startswith("backbone.fpn.") for key in state):
        return dict(state)
    return {re.sub(r"^backbone\.body\.", "backbone.", key): value for key, value in state.items()}
