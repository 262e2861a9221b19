"""What lets mmdet run on mmcv-lite, which has no compiled operations: torchvision's in their place."""

import sys
import warnings
from types import ModuleType
from typing import Any

from torch import Tensor
from torchvision.ops import nms


class Operations(ModuleType):
    """Stands for ``mmcv._ext``: nms is torchvision's, anything else says that it is missing when it is called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*_: object, **__: object) -> None:
            raise NotImplementedError(f"mmcv._ext.{name} needs a compiled mmcv")

        return missing

    @staticmethod
    def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
        assert offset == 0
        return nms(boxes, scores, iou_threshold)  # type: ignore[no-any-return]


def stand_in() -> None:
    """Let mmdet import; where mmcv is compiled, its operations are its own."""
    try:
        import mmcv._ext  # noqa: F401
    except ModuleNotFoundError:
        sys.modules["mmcv._ext"] = Operations("mmcv._ext")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports itself by names that it calls outdated
        import mmdet.models  # noqa: F401


def with_torchvisions_roi_align(settings: Any) -> None:
    """Let every RoI extractor in a model's config pool by torchvision."""
    if isinstance(settings, dict):
        if settings.get("type") == "RoIAlign":
            settings["use_torchvision"] = True
        for value in settings.values():
            with_torchvisions_roi_align(value)
    elif isinstance(settings, list | tuple):
        for value in settings:
            with_torchvisions_roi_align(value)
