"""The parts of a detector whose work depends on the data, each an operator of fixed output shape.

torch.export sees a call with a known shape; PyTorch runs what stands here; ``onnx_operators`` says it in ONNX.
"""

from typing import Final

import torch
from torch import Tensor
from torchvision.ops import nms, roi_align

NOTHING: Final = -1e30
"""Score of a place that holds nothing; its sigmoid is 0."""


@torch.library.custom_op("backbone_export::select_best", mutates_args=())
def select_best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Scores (N, n) -> the ``count`` best (N, count), best first, and where they are; NOTHING at 0 where n is less."""
    values, places = scores.topk(min(count, scores.shape[1]), dim=1)
    missing = (0, count - values.shape[1])
    return torch.nn.functional.pad(values, missing, value=NOTHING), torch.nn.functional.pad(places, missing)


@select_best.register_fake
def _(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    return scores.new_empty((scores.shape[0], count)), scores.new_empty((scores.shape[0], count), dtype=torch.int64)


@torch.library.custom_op("backbone_export::suppress", mutates_args=())
def suppress(boxes: Tensor, scores: Tensor, groups: Tensor, num_groups: int, overlap: float) -> Tensor:
    """Say which boxes survive non-maximum suppression within their group.

    Args:
        boxes: (N, K, 4), corners in pixels.
        scores: (N, K); those below 0 take no part.
        groups: (N, K), class or level of each box, below ``num_groups``.
        num_groups: Number of groups.
        overlap: Largest intersection over union of two survivors.

    Returns:
        (N, K), True for survivors.
    """
    keep = torch.zeros_like(scores, dtype=torch.bool)
    for image in range(boxes.shape[0]):
        for group in set(groups[image].tolist()):
            (members,) = torch.where((groups[image] == group) & (scores[image] >= 0))
            keep[image, members[nms(boxes[image, members], scores[image, members], overlap)]] = True
    return keep


@suppress.register_fake
def _(boxes: Tensor, scores: Tensor, groups: Tensor, num_groups: int, overlap: float) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


@torch.library.custom_op("backbone_export::pool_boxes", mutates_args=())
def pool_boxes(
    maps: list[Tensor], boxes: Tensor, levels: Tensor, scales: list[float], size: int, sampling_ratio: int
) -> Tensor:
    """Pool each box from the map of its level.

    Args:
        maps: One for each level, each (N, C, H, W).
        boxes: (N, P, 4), corners in image pixels.
        levels: (N, P), index of the map.
        scales: Feature pixels per image pixel, of each map.
        size: Height and width of what is pooled.
        sampling_ratio: Samples in each direction of each pooled pixel.

    Returns:
        (N * P, C, size, size).
    """
    images = torch.arange(boxes.shape[0], dtype=boxes.dtype, device=boxes.device)
    images = images[:, None].expand(boxes.shape[:2]).reshape(-1, 1)
    regions, levels = torch.cat((images, boxes.reshape(-1, 4)), 1), levels.reshape(-1)
    pooled = boxes.new_zeros((len(regions), maps[0].shape[1], size, size))
    for level, (features, scale) in enumerate(zip(maps, scales, strict=True)):
        (here,) = torch.where(levels == level)
        pooled[here] = roi_align(features, regions[here], size, scale, sampling_ratio)
    return pooled


@pool_boxes.register_fake
def _(maps: list[Tensor], boxes: Tensor, levels: Tensor, scales: list[float], size: int, sampling_ratio: int) -> Tensor:
    return boxes.new_empty((boxes.shape[0] * boxes.shape[1], maps[0].shape[1], size, size))


@torch.library.custom_op("backbone_export::find_keypoints", mutates_args=())
def find_keypoints(heatmaps: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Heat maps (R, J, S, S) of boxes (R, 4) -> keypoints (R, J, 3) as (x, y, 1) in image pixels, scores (R, J)."""
    from torchvision.models.detection.roi_heads import heatmaps_to_keypoints

    return heatmaps_to_keypoints(heatmaps, boxes)  # type: ignore[no-any-return]


@find_keypoints.register_fake
def _(heatmaps: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    rows, joints = heatmaps.shape[:2]
    return heatmaps.new_empty((rows, joints, 3)), heatmaps.new_empty((rows, joints))
