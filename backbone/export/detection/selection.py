"""What all detectors share once boxes are predicted: decoding, clipping and choosing, in fixed shapes."""

from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder

from backbone.export.detection.operators import select_best, suppress


class Detections(NamedTuple):
    """A fixed number D of detections for each of N images, best first; zeros after the first ``num_found``.

    Attributes:
        boxes: (N, D, 4), corners in pixels.
        scores: (N, D).
        labels: (N, D), int64.
        num_found: (N,), int64.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    num_found: Tensor


def decode(coder: BoxCoder, codes: Tensor, priors: Tensor) -> Tensor:
    """Predicted codes (N, K, 4) of prior boxes (N, K, 4) -> boxes (N, K, 4), as torchvision's coder decodes them."""
    boxes = coder.decode_single(codes.reshape(-1, 4), priors.reshape(-1, 4))
    return boxes.reshape(codes.shape)  # type: ignore[no-any-return]


def clip(boxes: Tensor, image_size: Tensor) -> Tensor:
    """Boxes (N, K, 4) -> the same within an image of (height, width)."""
    height, width = image_size[0], image_size[1]
    limits = torch.stack((width, height, width, height))
    return torch.minimum(boxes.clamp(min=0), limits)


def has_sides_of(boxes: Tensor, smallest: float) -> Tensor:
    """Boxes (N, K, 4) -> (N, K), whether both sides are at least ``smallest`` pixels."""
    sides = boxes[..., 2:] - boxes[..., :2]
    return (sides[..., 0] >= smallest) & (sides[..., 1] >= smallest)


def gather_rows(values: Tensor, rows: Tensor) -> Tensor:
    """Values (N, n, C), rows (N, k) -> (N, k, C)."""
    return values.gather(1, rows[..., None].expand(-1, -1, values.shape[2]))


def keep_best(
    boxes: Tensor, scores: Tensor, labels: Tensor, num_labels: int, overlap: float, num_detections: int
) -> Detections:
    """Suppress overlaps within each label and keep the best; scores below 0 hold nothing."""
    keep = suppress(boxes, scores, labels, num_labels, overlap)
    scores, best = select_best(torch.where(keep, scores, -1.0), num_detections)
    found = scores >= 0
    boxes = torch.where(found[..., None], gather_rows(boxes, best), 0.0)
    labels = torch.where(found, labels.gather(1, best), 0)
    return Detections(boxes, torch.where(found, scores, 0.0), labels, found.sum(1))
