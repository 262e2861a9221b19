"""Faster, Mask and Keypoint R-CNN with a fixed number of detections: torchvision's own heads, fixed shapes between."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import MultiScaleRoIAlign

from backbone.export.detection.operators import NOTHING, find_keypoints, pool_boxes, select_best, suppress
from backbone.export.detection.selection import Detections, clip, decode, gather_rows, has_sides_of, keep_best

_SMALLEST_DETECTION = 1e-2  # of each side in pixels, as in torchvision's RoIHeads


class _Pooler(NamedTuple):
    """A MultiScaleRoIAlign in numbers.

    Attributes:
        names: Of the maps it pools from, finest first.
        scales: Feature pixels per image pixel of each.
        size: Height and width of what is pooled.
        sampling_ratio: Samples in each direction of each pooled pixel.
        canonical_scale: Side in image pixels of a box that belongs to ``canonical_level``.
        canonical_level: Logarithm of the stride that such a box is pooled at.
    """

    names: tuple[str, ...]
    scales: tuple[float, ...]
    size: int
    sampling_ratio: int
    canonical_scale: int
    canonical_level: int

    def __call__(self, maps: Mapping[str, Tensor], boxes: Tensor) -> Tensor:
        """Maps by name, boxes (N, P, 4) -> (N * P, C, size, size)."""
        chosen = [maps[name] for name in self.names]
        return pool_boxes(chosen, boxes, self._levels(boxes), list(self.scales), self.size, self.sampling_ratio)  # type: ignore[no-any-return]

    def _levels(self, boxes: Tensor) -> Tensor:
        """The level of each box by equation 1 of arXiv:1612.03144, counted from the finest map."""
        if len(self.names) == 1:
            return torch.zeros_like(boxes[..., 0], dtype=torch.int64)
        lowest, highest = (-round(torch.tensor(scale).log2().item()) for scale in (self.scales[0], self.scales[-1]))
        sides = torch.sqrt((boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1]))
        levels = torch.floor(self.canonical_level + torch.log2(sides / self.canonical_scale) + 1e-6)
        return levels.clamp(lowest, highest).to(torch.int64) - lowest


class TwoStageCore(nn.Module):
    """A two-stage detector between resized images and boxes in their pixels.

    Args:
        detector: torchvision's, in evaluation mode; its modules are shared.
        strides: Image pixels per feature pixel of each of the backbone's maps, by name.
    """

    def __init__(self, detector: FasterRCNN, strides: Mapping[str, int]) -> None:
        super().__init__()
        self.backbone, self.rpn, self.roi_heads = detector.backbone, detector.rpn, detector.roi_heads
        heads: RoIHeads = detector.roi_heads
        self.box_pooler = _pooler(heads.box_roi_pool, strides)
        self.mask_pooler = _pooler(heads.mask_roi_pool, strides) if heads.has_mask() else None
        self.keypoint_pooler = _pooler(heads.keypoint_roi_pool, strides) if heads.has_keypoint() else None

    def forward(self, images: Tensor, image_size: Tensor) -> tuple[Tensor, ...]:
        """Normalised images (N, 3, H, W), (2,) height and width without padding -> Detections, then masks or keypoints.

        Masks are (N, D, S, S) probabilities within the box; keypoints (N, D, J, 3) and their scores (N, D, J).
        """
        maps = self.backbone(images)
        maps = {"0": maps} if isinstance(maps, Tensor) else maps
        proposals, is_proposal = _propose(self.rpn, images, list(maps.values()), image_size)
        found = self._detect(maps, proposals, is_proposal, image_size)
        more: tuple[Tensor, ...] = ()
        if self.mask_pooler is not None:
            more = (self._masks(maps, found, self.mask_pooler),)
        if self.keypoint_pooler is not None:
            more = (*more, *self._keypoints(maps, found, self.keypoint_pooler))
        return (*found, *more)

    def _detect(
        self, maps: Mapping[str, Tensor], proposals: Tensor, is_proposal: Tensor, image_size: Tensor
    ) -> Detections:
        """Classify and refine the proposals (N, P, 4)."""
        heads = self.roi_heads
        logits, codes = heads.box_predictor(heads.box_head(self.box_pooler(maps, proposals)))
        num_images, num_boxes, num_classes = proposals.shape[0], proposals.shape[1], logits.shape[-1]
        boxes = heads.box_coder.decode_single(codes, proposals.reshape(-1, 4))
        boxes = clip(boxes.reshape(num_images, num_boxes * num_classes, 4), image_size)
        boxes = boxes.reshape(num_images, num_boxes, num_classes, 4)[:, :, 1:].flatten(1, 2)
        scores = logits.softmax(-1).reshape(num_images, num_boxes, num_classes)[:, :, 1:]
        labels = torch.arange(1, num_classes, device=scores.device).expand(num_images, num_boxes, -1).flatten(1, 2)
        is_found = (scores > heads.score_thresh) & is_proposal[..., None]
        is_found = is_found.flatten(1, 2) & has_sides_of(boxes, _SMALLEST_DETECTION)
        scores = torch.where(is_found, scores.flatten(1, 2), -1.0)
        return keep_best(boxes, scores, labels, num_classes, heads.nms_thresh, heads.detections_per_img)

    def _masks(self, maps: Mapping[str, Tensor], found: Detections, pool: _Pooler) -> Tensor:
        logits = self.roi_heads.mask_predictor(self.roi_heads.mask_head(pool(maps, found.boxes)))
        labels = found.labels.reshape(-1, 1, 1, 1).expand(-1, 1, *logits.shape[2:])
        masks: Tensor = logits.gather(1, labels).sigmoid()
        return masks.reshape(found.labels.shape[0], found.labels.shape[1], *logits.shape[2:])

    def _keypoints(self, maps: Mapping[str, Tensor], found: Detections, pool: _Pooler) -> tuple[Tensor, Tensor]:
        heatmaps = self.roi_heads.keypoint_predictor(self.roi_heads.keypoint_head(pool(maps, found.boxes)))
        keypoints, scores = find_keypoints(heatmaps, found.boxes.reshape(-1, 4))
        num_images, num_boxes = found.labels.shape[0], found.labels.shape[1]
        return (
            keypoints.reshape(num_images, num_boxes, *keypoints.shape[1:]),
            scores.reshape(num_images, num_boxes, *scores.shape[1:]),
        )


def _propose(
    rpn: RegionProposalNetwork, images: Tensor, maps: list[Tensor], image_size: Tensor
) -> tuple[Tensor, Tensor]:
    """Return proposals (N, P, 4) and which of them are any (N, P)."""
    objectness, codes = rpn.head(maps)
    image_list = ImageList(images, [(images.shape[2], images.shape[3])])
    anchors = rpn.anchor_generator(image_list, maps)[0]
    anchors = anchors.split([level.shape[1] * level.shape[2] * level.shape[3] for level in objectness])
    boxes, scores, levels = [], [], []
    for index, level in enumerate(zip(objectness, codes, anchors, strict=True)):
        level_boxes, level_scores = _level_proposals(rpn, *level, image_size)
        boxes.append(level_boxes)
        scores.append(level_scores)
        levels.append(torch.full_like(level_scores, index, dtype=torch.int64))
    every_box, every_score, every_level = torch.cat(boxes, 1), torch.cat(scores, 1), torch.cat(levels, 1)
    keep = suppress(every_box, every_score, every_level, len(maps), rpn.nms_thresh)
    best_scores, best = select_best(torch.where(keep, every_score, -1.0), rpn.post_nms_top_n())
    is_any = best_scores >= 0
    return torch.where(is_any[..., None], gather_rows(every_box, best), 0.0), is_any


def _level_proposals(
    rpn: RegionProposalNetwork, objectness: Tensor, codes: Tensor, anchors: Tensor, image_size: Tensor
) -> tuple[Tensor, Tensor]:
    """Objectness (N, A, H, W) and codes (N, 4 A, H, W) of a level -> its best boxes (N, k, 4) and scores (N, k)."""
    num_images, num_anchors = objectness.shape[0], objectness.shape[1]
    codes = (
        codes.reshape(num_images, num_anchors, 4, *codes.shape[2:]).permute(0, 3, 4, 1, 2).reshape(num_images, -1, 4)
    )
    scores, best = select_best(objectness.permute(0, 2, 3, 1).flatten(1), rpn.pre_nms_top_n())
    boxes = clip(decode(rpn.box_coder, gather_rows(codes, best), anchors[best]), image_size)
    is_any = has_sides_of(boxes, rpn.min_size) & (scores > NOTHING / 2)
    scores = torch.sigmoid(scores)
    return boxes, torch.where(is_any & (scores >= rpn.score_thresh), scores, -1.0)


def _pooler(pool: MultiScaleRoIAlign, strides: Mapping[str, int]) -> _Pooler:
    """Read what torchvision's pooler would do; its scales are those that it would infer from a large image."""
    names = tuple(name for name in strides if name in pool.featmap_names)
    height, width = pool.output_size
    if height != width:
        raise ValueError(f"an exported R-CNN pools squares, got MultiScaleRoIAlign of {height} x {width}; make it one")
    scales = tuple(1 / strides[name] for name in names)
    return _Pooler(names, scales, height, pool.sampling_ratio, pool.canonical_scale, pool.canonical_level)
