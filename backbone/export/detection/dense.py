"""RetinaNet and FCOS with a fixed number of detections: torchvision's own network, its decoding in fixed shapes."""

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.image_list import ImageList

from backbone.export.detection.operators import select_best
from backbone.export.detection.selection import Detections, clip, decode, gather_rows, keep_best


class DenseCore(nn.Module):
    """A dense detector between resized images and boxes in their pixels.

    Args:
        detector: torchvision's, in evaluation mode; its modules are shared.
    """

    def __init__(self, detector: RetinaNet | FCOS) -> None:
        super().__init__()
        self.backbone, self.head, self.anchor_generator = detector.backbone, detector.head, detector.anchor_generator
        self.box_coder, self.is_fcos = detector.box_coder, isinstance(detector, FCOS)
        self.score_threshold, self.overlap = detector.score_thresh, detector.nms_thresh
        self.num_candidates, self.num_detections = detector.topk_candidates, detector.detections_per_img

    def forward(self, images: Tensor, image_size: Tensor) -> Detections:
        """Normalised images (N, 3, H, W), (2,) height and width without padding -> boxes (N, D, 4), scores, ..."""
        maps = self.backbone(images)
        maps = [maps] if isinstance(maps, Tensor) else list(maps.values())
        outputs = self.head(maps)
        anchors = self.anchor_generator(ImageList(images, [(images.shape[2], images.shape[3])]), maps)[0]
        places = [level.shape[2] * level.shape[3] * self._anchors_a_place(index) for index, level in enumerate(maps)]
        levels = {name: values.split(places, dim=1) for name, values in outputs.items()}
        found = [
            self._candidates({name: values[index] for name, values in levels.items()}, level_anchors, image_size)
            for index, level_anchors in enumerate(anchors.split(places))
        ]
        boxes, scores, labels = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
        num_classes = outputs["cls_logits"].shape[-1]
        return keep_best(boxes, scores, labels, num_classes, self.overlap, self.num_detections)

    def _anchors_a_place(self, level: int) -> int:
        return int(self.anchor_generator.num_anchors_per_location()[level])

    def _candidates(
        self, level: dict[str, Tensor], anchors: Tensor, image_size: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the best boxes (N, k, 4), scores (N, k) and labels (N, k) of one level."""
        logits = level["cls_logits"]
        num_classes = logits.shape[-1]
        if self.is_fcos:
            scores = torch.sqrt(torch.sigmoid(logits) * torch.sigmoid(level["bbox_ctrness"]))
            scores, best = select_best(scores.flatten(1), self.num_candidates)
        else:
            scores, best = select_best(logits.flatten(1), self.num_candidates)
            scores = torch.sigmoid(scores)
        place, labels = torch.div(best, num_classes, rounding_mode="floor"), best % num_classes
        codes, priors = gather_rows(level["bbox_regression"], place), anchors[place]
        boxes = self.box_coder.decode(codes, priors) if self.is_fcos else decode(self.box_coder, codes, priors)
        return clip(boxes, image_size), torch.where(scores > self.score_threshold, scores, -1.0), labels
