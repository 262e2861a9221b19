"""A detector of torchvision from resized images to boxes of the original: the part that torch.export traces."""

from collections.abc import Mapping

from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, KeypointRCNN, MaskRCNN, RetinaNet

from backbone.export.detection.dense import DenseCore
from backbone.export.detection.r_cnn import TwoStageCore


class DetectorCore(nn.Module):
    """Resized images -> a fixed number D of detections, and how many of them there are.

    Args:
        detector: torchvision's, in evaluation mode; its modules are shared.
        strides: Image pixels per feature pixel of each of the backbone's maps, by name.
    """

    def __init__(self, detector: FasterRCNN | RetinaNet | FCOS, strides: Mapping[str, int]) -> None:
        super().__init__()
        is_two_stage = isinstance(detector, FasterRCNN)
        self.core: nn.Module = TwoStageCore(detector, strides) if is_two_stage else DenseCore(detector)
        self.has_keypoints = is_two_stage and detector.roi_heads.has_keypoint()

    def forward(self, images: Tensor, image_size: Tensor, ratio: Tensor) -> tuple[Tensor, ...]:
        """Detect.

        Args:
            images: (N, C, H, W), normalised, padded to a multiple of the detector's divisor.
            image_size: (2,), height and width without padding.
            ratio: (4,), pixels of the original per pixel, of x, y, x and y.

        Returns:
            boxes (N, D, 4), scores (N, D), labels (N, D), count (N,), then masks (N, D, S, S), or keypoints
            (N, D, J, 3) and their scores (N, D, J).
        """
        boxes, *others = self.core(images, image_size)
        if self.has_keypoints:
            keypoints = others[-2]
            places = keypoints[..., :2] * ratio[:2]
            others[-2] = keypoints.new_ones(keypoints.shape).slice_scatter(places, -1, 0, 2)
        return (boxes * ratio, *others)


def fixed_shapes(detector: nn.Module) -> dict[str, list[int]]:
    """Return the shape of each output of a detector's file, without the batch; a mask's sides are -1."""
    if not isinstance(detector, FasterRCNN):
        num_detections = int(detector.detections_per_img)  # type: ignore[arg-type]
    else:
        num_detections = int(detector.roi_heads.detections_per_img)
    shapes = {"boxes": [num_detections, 4], "scores": [num_detections], "labels": [num_detections], "count": [1]}
    if isinstance(detector, MaskRCNN):
        shapes["masks"] = [num_detections, -1, -1]
    if isinstance(detector, KeypointRCNN):
        predictor = detector.roi_heads.keypoint_predictor
        num_keypoints = next(module.out_channels for module in predictor.modules() if hasattr(module, "out_channels"))
        shapes["keypoints"] = [num_detections, num_keypoints, 3]
        shapes["keypoints_scores"] = [num_detections, num_keypoints]
    return shapes
