"""What a trained detector finds on a photo, and how COCO's format writes it."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as rle
from torch import Tensor, nn

from backbone.inference.optimize import optimize_for_inference
from backbone.recipe import SEGMENTERS, DetectorConfig
from backbone.training.coco.data import resized
from backbone.training.facts import RunFacts
from backbone.training.module import normalised
from backbone.training.parameter_groups import backbone_of

Found = dict[str, Tensor]
"""boxes (N, 4), labels, scores, masks (N, 1, H, W), keypoints (N, K, 3); a segmenter's classes (H, W)."""


class Predictor:
    """A trained detector or segmenter that takes photos one by one.

    Args:
        detector: As ``build_detector`` makes it, with its trained weights; it runs as an optimised copy.
        config: The recipe that it was trained from.
        device: Where to compute.
    """

    def __init__(self, detector: nn.Module, config: DetectorConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.backbone = backbone_of(detector)
        self.detector = optimize_for_inference(detector.to(device))

    @torch.inference_mode()
    def __call__(self, image: Tensor) -> Found:
        """Image (3, H, W) of 0 to 1, RGB -> what was found, on the CPU, in the image's own pixels."""
        if self.config.detector in SEGMENTERS:
            return {"classes": self._classes(image)}
        (found,) = self.detector([image.to(self.device)])
        return {name: value.cpu() for name, value in found.items()}

    def _classes(self, image: Tensor) -> Tensor:
        """Return the class of each pixel (H, W), computed at the size of validation."""
        size = resized(image.shape[-2:], self.config.min_size[-1], self.config.max_size)
        smaller = F.interpolate(image[None], size, mode="bilinear", antialias=True, align_corners=False)
        batch = normalised(self.backbone, self.config, list(smaller)).to(self.device)
        scores = self.detector(batch)["out"]
        scores = F.interpolate(scores, image.shape[-2:], mode="bilinear", align_corners=False)
        return scores[0].argmax(0).cpu()


def above(found: Found, min_score: float) -> Found:
    """Return the objects with at least that score; a segmenter's classes as they are."""
    if "scores" not in found:
        return found
    kept = found["scores"] >= min_score
    return {name: value[kept] for name, value in found.items()}


class CocoPredictions:
    """Collects what was found as the content of a COCO file, which pycocotools and labelling tools read.

    Objects carry a ``score``. A segmenter's classes are one annotation for each class of an image.

    Args:
        facts: Of the run, for names and ids of the categories; None numbers them by label.
        num_classes: Classes of the detector, the background among them.
    """

    def __init__(self, facts: RunFacts | None, num_classes: int) -> None:
        names = facts.class_names if facts else {}
        ids = {label: number for number, label in facts.labels.items()} if facts else {}
        labels = sorted(ids) or range(1, num_classes)
        self.names = {label: names.get(label, str(label)) for label in labels}
        self.ids = {label: ids.get(label, label) for label in labels}
        categories = [{"id": self.ids[label], "name": self.names[label]} for label in labels]
        self.content: dict[str, Any] = {"images": [], "annotations": [], "categories": categories}

    def add(self, file_name: str, size: tuple[int, int], found: Found) -> None:
        """Add one image of ``size`` (height, width). A label of no category counts for nothing."""
        images, annotations = self.content["images"], self.content["annotations"]
        image_id = len(images) + 1
        images.append({"id": image_id, "file_name": file_name, "height": size[0], "width": size[1]})
        records = _regions(found["classes"]) if "classes" in found else _objects(found)
        for label, record in records:
            if label in self.ids:
                common = {"id": len(annotations) + 1, "image_id": image_id, "category_id": self.ids[label]}
                annotations.append({**common, "iscrowd": 0, **record})


def _objects(found: Mapping[str, Tensor]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, label in enumerate(found["labels"].tolist()):
        left, top, right, bottom = found["boxes"][number].tolist()
        width, height = right - left, bottom - top
        record = {"bbox": [left, top, width, height], "area": width * height, "score": float(found["scores"][number])}
        if "masks" in found:
            record |= _segmentation(found["masks"][number, 0] >= 0.5)
        if "keypoints" in found:
            points = found["keypoints"][number]
            record |= {"keypoints": points.flatten().tolist(), "num_keypoints": int((points[:, 2] > 0).sum())}
        yield label, record


def _regions(classes: Tensor) -> Iterator[tuple[int, dict[str, Any]]]:
    for label in torch.unique(classes).tolist():
        if label:
            record = _segmentation(classes == label)
            yield label, {**record, "bbox": rle.toBbox(record["segmentation"]).tolist()}


def _segmentation(mask: Tensor) -> dict[str, Any]:
    """Return a mask (H, W) as COCO's run lengths, in letters that JSON takes, and its pixels."""
    encoded = rle.encode(np.asfortranarray(mask.numpy(), dtype=np.uint8))
    return {"segmentation": {**encoded, "counts": encoded["counts"].decode()}, "area": int(mask.sum())}
