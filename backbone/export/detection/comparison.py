"""Detections of a file and of the model, matched one by one: equal scores may come in another order."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.models.detection.roi_heads import paste_masks_in_image

from backbone.export.checking import BOX_TOLERANCE, SCORE_TOLERANCE, Arrays, Case, Difference, ExportMismatchError
from backbone.export.network import Outputs

_MASK_TOLERANCE = 1e-3  # mean over the image of a probability's difference; a pasted mask's edge may jump a pixel


def detection_difference(expected: Outputs, actual: Arrays, case: Case) -> Difference:
    """Return the largest differences over the images of a case.

    Args:
        expected: ``boxes/0`` (n, 4), ``scores/0`` (n,), ``labels/0`` (n,), ... for each image.
        actual: ``boxes`` (N, D, 4), ``scores`` (N, D), ``labels`` (N, D), ``count`` (N,), ...
        case: The images.

    Raises:
        ExportMismatchError: If a detection has no counterpart.
    """
    largest = Difference()
    for image in range(case.batch):
        reference = {key.split("/")[0]: value for key, value in expected.items() if key.endswith(f"/{image}")}
        found = {name: value[image] for name, value in actual.items()}
        largest = largest.larger(_image_difference(reference, found, case))
    return largest


def _image_difference(reference: Outputs, found: Arrays, case: Case) -> Difference:
    count = int(found["count"])
    if count != len(reference["boxes"]):
        raise ExportMismatchError(
            f"the file finds {count} objects and the model {len(reference['boxes'])} in an image of {case.height} x "
            f"{case.width} pixels; no file was kept"
        )
    if any(found[name][count:].any() for name in ("boxes", "scores", "labels")):
        raise ExportMismatchError(f"places after the first {count} detections must be zeros; no file was kept")
    pairs, largest = [], Difference(num_detections=count)
    free = set(range(count))
    for index in range(count):
        best, corner, score = _nearest(reference, found, index, free)
        if best is None:
            raise ExportMismatchError(
                f"detection {index} of the model (score {float(reference['scores'][index]):.3f}) has no counterpart in "
                f"the file within {BOX_TOLERANCE} pixels and {SCORE_TOLERANCE} of its score; no file was kept"
            )
        free.discard(best)
        pairs.append(best)
        largest = largest.larger(Difference(boxes=corner, scores=score))
    if count and "masks" in reference:
        _compare_masks(reference, {name: value[pairs] for name, value in found.items() if name != "count"}, case)
    if count and "keypoints" in reference:
        largest = largest.larger(_compare_keypoints(reference, found["keypoints_scores"][pairs]))
    return largest


def _nearest(reference: Outputs, found: Arrays, index: int, free: set[int]) -> tuple[int | None, float, float]:
    """Return the free detection nearest to number ``index`` of the model, and how far its corners and score are."""
    best: tuple[int | None, float, float] = (None, BOX_TOLERANCE, 0.0)
    box, label = reference["boxes"][index].numpy(), int(reference["labels"][index])
    for candidate in sorted(free, key=lambda place: abs(place - index))[:16]:
        score = abs(float(reference["scores"][index]) - float(found["scores"][candidate]))
        corner = float(np.abs(box - found["boxes"][candidate]).max())
        if label == int(found["labels"][candidate]) and score <= SCORE_TOLERANCE and corner <= best[1]:
            best = (candidate, corner, score)
    return best


def _compare_masks(reference: Outputs, found: Arrays, case: Case) -> None:
    """Paste the file's masks as torchvision does, and compare pixels."""
    boxes, masks = torch.from_numpy(found["boxes"]), torch.from_numpy(found["masks"])[:, None]
    pasted = paste_masks_in_image(masks, boxes, (case.height, case.width))
    difference = float((pasted - reference["masks"]).abs().mean((1, 2, 3)).max())
    if not difference <= _MASK_TOLERANCE:
        raise ExportMismatchError(f"masks differ by {difference:.1e} on average over an image; no file was kept")


def _compare_keypoints(reference: Outputs, scores: NDArray[Any]) -> Difference:
    expected = reference["keypoints_scores"].numpy()
    difference = float((np.abs(scores - expected) / (1 + np.abs(expected))).max())
    if not difference <= SCORE_TOLERANCE:
        raise ExportMismatchError(f"scores of keypoints differ by {difference:.1e}; no file was kept")
    return Difference(scores=difference)
