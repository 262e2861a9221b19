"""A detector of torchvision from resized images to boxes in pixels of the original: the part that torch.export traces."""

from collections.abc import Mapping

from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet

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
