"""A COCO annotation file, read with care: what cannot be used is named, and skipped where the rest can go on."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from backbone.recipe import SEGMENTERS, DetectorConfig

NEEDS_MASKS: Final = ("mask_rcnn", *SEGMENTERS)
NEEDS_KEYPOINTS: Final = ("keypoint_rcnn",)
_SHOWN: Final = 10


@dataclass
class Annotations:
    """One split of a data set, cleaned.

    Attributes:
        folder: Where the images are.
        file: The annotation file.
        content: The file's content without what was skipped; area and iscrowd are always there.
        skipped: One line for each image and annotation left out: which, and why.
        num_annotations: Annotations in the file, those of skipped images included.
        notes: What else there is to know before training.
        labels: The detector's class for each category id, in the ids' order; 0 is the background.
    """

    folder: Path
    file: Path
    content: dict[str, Any]
    skipped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    num_annotations: int = 0
    labels: dict[int, int] = field(default_factory=dict)

    @property
    def class_names(self) -> dict[int, str]:
        """Names of the categories by label, in the order of the labels and of the category ids."""
        names = {category["id"]: str(category.get("name", category["id"])) for category in self.content["categories"]}
        return {label: names[number] for number, label in self.labels.items()}

    @property
    def keypoint_names(self) -> list[str]:
        """Names of the keypoints that the categories have; empty where the file tells none."""
        return next((list(c["keypoints"]) for c in self.content["categories"] if c.get("keypoints")), [])

    def summary(self) -> str:
        """Return what is there and what was skipped, a line for each of the first."""
        images, annotations = len(self.content["images"]), len(self.content["annotations"])
        lines = [f"{self.file}: {images} images, {annotations} annotations, {len(self.skipped)} skipped"]
        lines += [f"  skipped {line}" for line in self.skipped[:_SHOWN]]
        hidden = len(self.skipped) - _SHOWN
        return "\n".join([*lines, *([f"  ... and {hidden} more"] if hidden > 0 else []), *self.notes])


def read_annotations(data: Path, split: str, config: DetectorConfig) -> Annotations:
    """Read ``data/annotations/<split>.json`` for the images in ``data/<split>``, and check it against the recipe.

    Skipped, each by name: an image that is missing or unreadable, an annotation whose box has no area, is not finite
    or lies outside of its image, and one without the mask that the detector learns from. Images without annotations
    stay: a detector learns from them what is background.

    Raises:
        FileNotFoundError: If the folder or the file does not exist.
        ValueError: If the file is not COCO's format or does not fit the recipe, or nothing usable is left.
    """
    folder, file = data / split, data / "annotations" / f"{split}.json"
    for path, kind in ((data, "a folder"), (folder, "a folder of images"), (file, "a file in COCO's format")):
        if not path.exists():
            raise FileNotFoundError(
                f"--data must hold train/, val/ and annotations/train.json and val.json; {path} ({kind}) does not exist"
            )
    found = Annotations(folder, file, _read_json(file))
    found.num_annotations = len(found.content["annotations"])
    found.labels = _labels(found, config.num_classes)
    _check_category_ids(found)
    _skip_unreadable_images(found)
    _skip_unusable_annotations(found, config)
    if not found.content["images"]:
        raise ValueError(f"nothing is left to read\n{found.summary()}")
    _check_for_head(found, config)
    return found


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON, it may be truncated ({error}); write it again") from None
    lists = ("images", "annotations", "categories")
    absent = [key for key in lists if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if absent:
        raise ValueError(f"{file}: must have the lists images, annotations and categories; absent: {', '.join(absent)}")
    needed = {"images": ("id", "file_name"), "annotations": ("id", "image_id", "category_id"), "categories": ("id",)}
    for name, keys in needed.items():
        for number, record in enumerate(content[name]):
            if missing := [key for key in keys if key not in record]:
                raise ValueError(f"{file}: number {number} of {name} must have {', '.join(missing)}, got {record}")
        ids = [record["id"] for record in content[name]]
        if len(set(ids)) != len(ids):
            raise ValueError(f"{file}: ids of {name} must differ, got {len(ids) - len(set(ids))} repetitions")
    return content


def _labels(found: Annotations, num_classes: int) -> dict[int, int]:
    """Number the categories from 1, or keep their ids where the detector has room for them, as torchvision's for COCO.

    COCO's 80 categories have ids up to 90, and torchvision's weights 91 classes: a class for each id, and 0.
    """
    ids = sorted(category["id"] for category in found.content["categories"])
    if not all(type(number) is int and number >= 0 for number in ids):
        raise ValueError(f"{found.file}: ids of categories must be integers of at least 0, got {ids}")
    if num_classes == len(ids) + 1:
        return {number: label for label, number in enumerate(ids, start=1)}
    if ids and ids[0] > 0 and ids[-1] < num_classes:
        return {number: number for number in ids}
    raise ValueError(
        f"num_classes must be {len(ids) + 1}, for the {len(ids)} categories of {found.file} numbered from 1 and the "
        f"background, or above {max(ids, default=0)}, to keep their ids (from 1) as labels; got {num_classes}"
    )


def _check_category_ids(found: Annotations) -> None:
    for annotation in found.content["annotations"]:
        if annotation["category_id"] not in found.labels:
            raise ValueError(
                f"{found.file}: category_id must be one of {[*found.labels]}, annotation {annotation['id']} has "
                f"{annotation['category_id']!r}; mend it or add the category"
            )


def _skip_unreadable_images(found: Annotations) -> None:
    """Drop images whose file is missing or no picture, and note the sizes of the others."""
    kept = []
    for image in found.content["images"]:
        path = found.folder / image["file_name"]
        try:
            with Image.open(path) as picture:  # reads the header only
                kept.append({**image, "width": picture.width, "height": picture.height})
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            why = "does not exist" if not path.exists() else "is empty" if not path.stat().st_size else str(error)
            found.skipped.append(f"image {image['id']}: {path}: {why}")
    found.content["images"] = kept


def _skip_unusable_annotations(found: Annotations, config: DetectorConfig) -> None:
    images = {image["id"]: image for image in found.content["images"]}
    kept = []
    for annotation in found.content["annotations"]:
        image = images.get(annotation["image_id"])
        if image is None:
            continue  # the image itself was named
        problem = next(_problems(annotation, image, config), None)
        if problem:
            found.skipped.append(f"annotation {annotation['id']} of {image['file_name']}: {problem}")
        else:
            width, height = annotation["bbox"][2:]
            kept.append({"area": width * height, "iscrowd": 0, **annotation})
    found.content["annotations"] = kept


def _problems(annotation: Mapping[str, Any], image: Mapping[str, Any], config: DetectorConfig) -> Iterator[str]:
    """Yield why an annotation cannot be used."""
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(value, int | float) for value in box):
        yield f"bbox must be [x, y, width, height], got {box}"
        return
    width, height = box[2:]
    if not all(map(math.isfinite, box)):
        yield f"bbox {box} is not finite"
    elif width <= 0 or height <= 0:
        yield f"bbox {box} has no area"
    elif not _has_extent(box, (image["width"], image["height"])):
        yield f"bbox {box} lies outside of its image of {image['width']} x {image['height']}, or has no extent in it"
    if config.detector in NEEDS_MASKS and not _is_mask(annotation.get("segmentation")):
        yield "it has no mask (segmentation)"


def _has_extent(box: Sequence[float], size: tuple[int, int]) -> bool:
    """Whether something is left of a box that is cut to its image, in the detectors' arithmetic of 32 bits."""
    with np.errstate(over="ignore"):
        near = np.array(box[:2], np.float32)
        far = near + np.array(box[2:], np.float32)
    return bool((np.clip(far, 0, size) > np.clip(near, 0, size)).all())


def _is_mask(segmentation: object) -> bool:
    if isinstance(segmentation, dict):
        return {"size", "counts"} <= segmentation.keys()
    return isinstance(segmentation, list) and bool(segmentation) and all(
        isinstance(polygon, list) and len(polygon) >= 6 for polygon in segmentation
    )  # fmt: skip


def _check_for_head(found: Annotations, config: DetectorConfig) -> None:
    annotations = found.content["annotations"]
    if not annotations:
        needs = "masks (segmentation)" if config.detector in NEEDS_MASKS else "boxes"
        raise ValueError(f"detector {config.detector} learns from {needs}, and none is left\n{found.summary()}")
    if config.detector not in NEEDS_KEYPOINTS:
        return
    counts = {len(annotation["keypoints"]) for annotation in annotations if annotation.get("keypoints")}
    if not counts:
        raise ValueError(f"detector {config.detector} learns from keypoints, and {found.file} has none")
    if counts != {3 * config.num_keypoints}:
        raise ValueError(
            f"num_keypoints must be the number of keypoints (x, y, visibility) of every annotation in {found.file}, "
            f"{' or '.join(f'{count / 3:g}' for count in sorted(counts))}; got {config.num_keypoints}"
        )
    if not any(side in name for name in found.keypoint_names for side in ("left", "right")):
        found.notes.append(f"  {found.file} names no left and right keypoints; a mirrored image keeps their order")
    for annotation in annotations:
        annotation["keypoints"] = annotation.get("keypoints") or [0] * 3 * config.num_keypoints
        annotation["num_keypoints"] = sum(visibility > 0 for visibility in annotation["keypoints"][2::3])
