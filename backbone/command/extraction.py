"""From a photo to its feature maps."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from backbone import images as reader
from backbone.extraction.pixels import resize_image, to_tensor
from backbone.features import Features, Preprocessing


def read_image(path: Path, *, shorter_side: int | None = None) -> Image.Image:
    """Return the photo upright and in RGB, resized so that its shorter side has ``shorter_side`` pixels.

    Raises:
        ValueError: If the file cannot be read as an image.
    """
    image = reader.read_image(path)
    return resize_image(image, shorter_side) if shorter_side is not None else image


def extract_features(
    backbone: nn.Module, images: Sequence[Image.Image], preprocessing: Preprocessing
) -> list[Features]:
    """Return the feature maps of each photo, each (1, C, H / stride, W / stride), on the CPU.

    Args:
        backbone: The network, in evaluation mode; a copy of ``optimize_for_inference`` computes in its own dtype.
        images: Photos of one size.
        preprocessing: What the network's weights expect of an image.
    """
    device = next(backbone.parameters()).device
    with torch.inference_mode():
        batch = torch.cat([to_tensor(image, preprocessing) for image in images])
        features = {name: feature.cpu() for name, feature in backbone(batch.to(device)).items()}
    return [{name: feature[n : n + 1].contiguous() for name, feature in features.items()} for n in range(len(images))]
