"""Training by Lightning, whole (``train.train``, ``evaluate.evaluate``) and in parts, for a loop of one's own.

from backbone.training import CocoImages, DetectionModule, make_loader, read_annotations
annotations = read_annotations(folder, "train", config)  # checked record by record; what is skipped is named
loader = make_loader(CocoImages(annotations, config, train=True))  # images of 0 to 1, targets as torchvision takes them

Nothing heavy is imported until a name is used; without Lightning and its companions that is one sentence.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from backbone.training.averaging import AveragedWeights
    from backbone.training.callbacks import AtomicCheckpointIO, FreezeByEpoch, History
    from backbone.training.coco.annotations import Annotations, read_annotations
    from backbone.training.coco.data import CocoImages, make_loader
    from backbone.training.coco.metrics import CocoMetrics
    from backbone.training.fine_tuning import StartReport, start_from
    from backbone.training.module import DetectionModule
    from backbone.training.pictures import draw, draw_sheet, save_curves
    from backbone.training.prediction import CocoPredictions, Predictor
    from backbone.training.scale_jitter import jitter_scale

_HOMES = {
    "AveragedWeights": "averaging",
    "AtomicCheckpointIO": "callbacks",
    "FreezeByEpoch": "callbacks",
    "History": "callbacks",
    "Annotations": "coco.annotations",
    "read_annotations": "coco.annotations",
    "CocoImages": "coco.data",
    "make_loader": "coco.data",
    "CocoMetrics": "coco.metrics",
    "StartReport": "fine_tuning",
    "start_from": "fine_tuning",
    "DetectionModule": "module",
    "draw": "pictures",
    "draw_sheet": "pictures",
    "save_curves": "pictures",
    "CocoPredictions": "prediction",
    "Predictor": "prediction",
    "jitter_scale": "scale_jitter",
}
"""Public name -> the module that has it; ``train.train``, ``evaluate.evaluate`` and
``parameter_groups.parameter_groups`` are called as their modules."""
_LIBRARIES = ("lightning", "torchmetrics", "pycocotools", "tensorboard")

__all__ = [
    "Annotations",
    "AtomicCheckpointIO",
    "AveragedWeights",
    "CocoImages",
    "CocoMetrics",
    "CocoPredictions",
    "DetectionModule",
    "FreezeByEpoch",
    "History",
    "Predictor",
    "StartReport",
    "draw",
    "draw_sheet",
    "jitter_scale",
    "make_loader",
    "read_annotations",
    "save_curves",
    "start_from",
]


def __getattr__(name: str) -> object:
    """Import what is asked for.

    Raises:
        ModuleNotFoundError: If a library that training needs is not installed; names it and the extra.
    """
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _LIBRARIES:
            raise
        raise ModuleNotFoundError(
            f"training needs {error.name}, which is not installed: pip install 'backbone[train]'", name=error.name
        ) from None
