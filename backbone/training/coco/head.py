"""Whether a split holds what a detector's head learns from."""

from typing import Any

from backbone.recipe import DetectorConfig
from backbone.training.coco.cleaned import NEEDS_KEYPOINTS, NEEDS_MASKS, Annotations


def check_for_head(found: Annotations, config: DetectorConfig, records: list[Any]) -> None:
    """Refuse a file without anything that the detector learns from.

    Raises:
        ValueError: If it is one.
    """
    if config.detector in NEEDS_KEYPOINTS:
        _check_keypoints(found, config, records)
    if not found.content["annotations"]:
        needs = "masks (segmentation)" if config.detector in NEEDS_MASKS else "boxes"
        raise ValueError(f"detector {config.detector} learns from {needs}, and none is left\n{found.summary()}")


def _check_keypoints(found: Annotations, config: DetectorConfig, records: list[Any]) -> None:
    """Refuse a file without keypoints, or with none of the recipe's number; tell of sides that have no names."""
    points = [record.get("keypoints") for record in records if isinstance(record, dict)]
    counts = {len(each) for each in points if isinstance(each, list) and each}
    if not counts:
        raise ValueError(f"detector {config.detector} learns from keypoints, and {found.file} has none")
    if 3 * config.num_keypoints not in counts:
        raise ValueError(
            f"num_keypoints must be the number of keypoints (x, y, visibility) of every annotation in {found.file}, "
            f"{' or '.join(f'{count / 3:g}' for count in sorted(counts))}; got {config.num_keypoints}"
        )
    names = found.keypoint_names
    if names and len(names) != config.num_keypoints:
        found.notes.append(f"{found.file} names {len(names)} keypoints, and objects have {config.num_keypoints}")
        for category in found.content["categories"]:
            category.pop("keypoints", None)
    if not any(side in name for name in found.keypoint_names for side in ("left", "right")):
        found.notes.append(f"{found.file} names no left and right keypoints; a mirrored image keeps their order")
