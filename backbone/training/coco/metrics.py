"""COCO average precision through pycocotools: what a detector found, in all processes, against the annotations."""

import contextlib
import copy
import io
from collections.abc import Mapping
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from backbone.recipe import DetectorName
from backbone.training.coco.data import as_coco

IouType: TypeAlias = Literal["bbox", "segm", "keypoints"]
Result: TypeAlias = dict[str, Any]

IOU_TYPES: Final[dict[str, tuple[IouType, ...]]] = {
    "mask_rcnn": ("bbox", "segm"),
    "keypoint_rcnn": ("bbox", "keypoints"),
}
"""What is measured beside boxes."""

NUM_COCO_KEYPOINTS: Final = 17
OTHER_SIGMA: Final = 0.072
"""Spread of a keypoint, in units of the object's size, where it is not one of COCO's 17: the mean of theirs."""


class CocoMetrics:
    """Collects detections and measures their average precision.

    Args:
        coco: The annotations.
        class_names: Names by label, in the order of the category ids.
        detector: Which detector, for what it predicts.
    """

    def __init__(self, coco: COCO, class_names: Mapping[int, str], detector: DetectorName) -> None:
        self.coco = as_coco(copy.deepcopy(coco.dataset))  # COCOeval changes what it is given
        self.class_names = class_names
        self.category_ids = dict(zip(class_names, sorted(coco.cats), strict=True))  # by label
        self.results: dict[IouType, list[Result]] = {kind: [] for kind in IOU_TYPES.get(detector, ("bbox",))}

    def reset(self) -> None:
        """Forget all detections."""
        for results in self.results.values():
            results.clear()

    def add(self, image_id: int, prediction: dict[str, Tensor]) -> None:
        """Add one image's detections as torchvision gives them: boxes (N, 4) in x1, y1, x2, y2, labels, scores.

        A label of no category counts for nothing: RetinaNet and FCOS have an output for the background too.
        """
        prediction = {name: value.detach().float().cpu() for name, value in prediction.items()}
        corners = prediction["boxes"].numpy()
        boxes = np.concatenate((corners[:, :2], corners[:, 2:] - corners[:, :2]), axis=1).tolist()
        for number, label in enumerate(prediction["labels"].int().tolist()):
            if label not in self.category_ids:
                continue
            score = float(prediction["scores"][number])
            common = {"image_id": image_id, "category_id": self.category_ids[label], "score": score}
            for kind, results in self.results.items():
                results.append({**common, **_geometry(kind, prediction, number, boxes[number])})

    def compute(self) -> dict[str, float]:
        """Return AP, AP50, AP75 by kind and AP by class: ``AP``, ``AP50``, ``AP/circle``, ``segm/AP``, ...

        NaN where a class has no annotation. Every process gives its part and every one gets the answer.
        """
        metrics: dict[str, float] = {}
        for kind, results in self.results.items():
            prefix = "" if kind == "bbox" else f"{kind}/"
            metrics |= {prefix + name: value for name, value in self._evaluate(kind, gathered(results)).items()}
        return metrics

    def _evaluate(self, kind: IouType, results: list[Result]) -> dict[str, float]:
        with contextlib.redirect_stdout(io.StringIO()):  # its own table has no classes
            copies = [dict(result) for result in results]  # loadRes writes into what it is given
            found = self.coco.loadRes(copies) if copies else _nothing(self.coco)
            evaluation = COCOeval(self.coco, found, kind)
            if kind == "keypoints":
                evaluation.params.kpt_oks_sigmas = _sigmas(self.coco, evaluation.params.kpt_oks_sigmas)
            evaluation.evaluate()
            evaluation.accumulate()
        precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (IoU, recall, class), all sizes, most detections
        precision = np.where(precision < 0, np.nan, precision)
        names = {f"AP/{name}": precision[:, :, number] for number, name in enumerate(self.class_names.values())}
        areas = {"AP": precision, "AP50": precision[0], "AP75": precision[5], **names}
        return {name: _mean(values) for name, values in areas.items()}


def _geometry(kind: IouType, prediction: dict[str, Tensor], number: int, box: list[float]) -> Result:
    if kind == "segm":
        mask = prediction["masks"][number, 0].numpy() >= 0.5
        return {"segmentation": rle.encode(np.asfortranarray(mask, dtype=np.uint8))}
    if kind == "keypoints":
        return {"keypoints": prediction["keypoints"][number].flatten().tolist()}
    return {"bbox": box}


def gathered(results: list[Result]) -> list[Result]:
    """Return the results of all processes, in the order of the ranks."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return results
    parts: list[list[Result]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(parts, results)
    return [result for part in parts for result in part]


def _nothing(coco: COCO) -> COCO:
    """Detections of a detector that found nothing, which ``loadRes`` does not take."""
    return as_coco({**coco.dataset, "annotations": []})


def _sigmas(coco: COCO, of_coco: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    count = max((len(annotation["keypoints"]) // 3 for annotation in coco.anns.values()), default=NUM_COCO_KEYPOINTS)
    return of_coco if count == NUM_COCO_KEYPOINTS else np.full(count, OTHER_SIGMA)


def _mean(values: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    return float("nan") if np.isnan(values).all() else float(np.nanmean(values))
