"""From a photo to what a network takes: its size, and its numbers."""

from typing import Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from backbone.extraction.request import Request
from backbone.features import Preprocessing

MAX_ENLARGED_PIXELS: Final = 2**25
"""An image that is larger than this stays as it is or shrinks; to enlarge one so far is a mistake."""


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


def fit_image(image: Image.Image, request: Request) -> Image.Image:
    """Return the image in the size that is asked for.

    Raises:
        ValueError: If it would have more pixels than are computed.
    """
    if request.shorter_side is not None or request.max_size is not None:
        image = resize_image(image, request.shorter_side or min(image.size), request.max_size)
    multiple = request.multiple_of
    if multiple > 1:
        width, height = (max(1, round(side / multiple)) * multiple for side in image.size)
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling.BILINEAR)
    if image.width * image.height > request.max_pixels:
        raise ValueError(
            f"must have {request.max_pixels:,} pixels at most, got {image.width} x {image.height} (W x H); shrink it "
            f"by --shorter-side or --max-size, or allow more by --max-pixels"
        )
    return image


def normalise(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Return (N, 3, H, W) in float32 of RGB bytes (N, H, W, 3), as the weights expect it, on the same device."""
    low, high = preprocessing.value_range
    mean, std = (torch.tensor(values, device=pixels.device) for values in (preprocessing.mean, preprocessing.std))
    scale, shift = (high - low) / (255 * std), (low - mean) / std
    if preprocessing.channel_order == "bgr":
        pixels = pixels.flip(3)
    count, height, width, channels = pixels.shape
    rows = pixels.reshape(count, height, width * channels).float()  # long rows: three numbers at a time are slow
    rows.mul_(scale.repeat(width)).add_(shift.repeat(width))
    return rows.view(count, height, width, channels).permute(0, 3, 1, 2)


def to_tensor(image: Image.Image, preprocessing: Preprocessing) -> Tensor:
    """Return the image (1, 3, H, W), float32, in the channel order, range and normalisation the weights expect."""
    return normalise(torch.from_numpy(np.array(image))[None], preprocessing).contiguous()
