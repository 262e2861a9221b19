"""From a photo to its feature maps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from backbone import images as reader
from backbone.features import Features, Preprocessing

MAX_ENLARGED_PIXELS: Final = 2**25
"""An image that is larger than this stays as it is or shrinks; to enlarge one so far is a mistake."""


def read_image(path: Path, *, shorter_side: int | None = None) -> Image.Image:
    """Return the photo upright and in RGB, resized so that its shorter side has ``shorter_side`` pixels.

    Raises:
        ValueError: If the file cannot be read as an image.
    """
    image = reader.read_image(path)
    return resize_image(image, shorter_side) if shorter_side is not None else image


def resize_image(image: Image.Image, shorter_side: int, max_size: int | None = None) -> Image.Image:
    """Return the image with ``shorter_side`` pixels on its shorter side, and at most ``max_size`` on its longer.

    Raises:
        ValueError: If it would be enlarged beyond ``MAX_ENLARGED_PIXELS``.
    """
    scale = shorter_side / min(image.size)
    if max_size is not None:
        scale = min(scale, max_size / max(image.size))
    width, height = (max(1, round(side * scale)) for side in image.size)
    if scale > 1 and width * height > MAX_ENLARGED_PIXELS:
        raise ValueError(
            f"resizing {image.width} x {image.height} pixels (W x H) to a shorter side of {shorter_side} would make "
            f"{width} x {height}, more than {MAX_ENLARGED_PIXELS:,} pixels; limit the longer side by --max-size"
        )
    return image.resize((width, height), Image.Resampling.BILINEAR)


def to_tensor(image: Image.Image, preprocessing: Preprocessing) -> Tensor:
    """Return the image (1, 3, H, W), float32, in the channel order, range and normalisation the weights expect."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    if preprocessing.channel_order == "bgr":
        pixels = pixels.flip(0)
    low, high = preprocessing.value_range
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    return ((pixels * (high - low) + low - mean) / std)[None]


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
