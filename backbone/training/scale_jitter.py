"""Large-scale jitter: a training image is resized at random, then cropped or padded to a square."""

from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

PADDING: Final = (124, 116, 104)
"""Color of what lies beside the image: ImageNet's mean."""
_SMALLEST: Final = 1.0  # pixels; a box of which less is left is dropped


def jitter_scale(
    image: Tensor, target: dict[str, Any], chance: np.random.Generator, scale: tuple[float, float], side: int
) -> tuple[Tensor, dict[str, Any]]:
    """Return image and target resized at random, and cropped or padded to ``side`` x ``side`` pixels.

    The image is first made to fit the square with its longer side, then takes a factor drawn from ``scale``: larger
    than the square it is cropped at a random place, smaller it is padded at the right and below. As arXiv:2012.07177,
    section 3; there 0.1 to 2.0 and 1024 pixels.

    Args:
        image: (3, H, W), uint8 of 0 to 255.
        target: boxes, labels, and maybe masks and keypoints (N, K, 3), changed along. Objects that are not in the
            crop are left out.
        chance: Decides.
        scale: Smallest and largest factor.
        side: Of the square, in pixels.
    """
    height, width = functional.get_size(image)
    factor = side / max(height, width) * chance.uniform(*scale)
    size = [max(1, round(height * factor)), max(1, round(width * factor))]
    top, left = (int(chance.integers(max(each - side, 0) + 1)) for each in size)
    keypoints = target.pop("keypoints", None)
    image, target = v2.Resize(size, antialias=True)(image, target)
    image, target = _crop(image, target, top, left, side)
    if keypoints is not None:
        target["keypoints"] = _moved(keypoints, (size[1] / width, size[0] / height), (left, top), side)
    return image, _without_the_lost(target)


def _crop(image: Tensor, target: dict[str, Any], top: int, left: int, side: int) -> tuple[Tensor, dict[str, Any]]:
    height, width = (min(each, side) for each in functional.get_size(image))
    padding = [0, 0, side - width, side - height]
    transformed = {name: functional.crop(value, top, left, height, width) for name, value in _located(target).items()}
    transformed = {name: functional.pad(value, padding) for name, value in transformed.items()}
    image = functional.crop(image, top, left, height, width)
    fill = list(PADDING) if image.shape[0] == len(PADDING) else None
    image, boxes = functional.pad(image, padding, fill=fill), {**target, **transformed}
    return v2.ClampBoundingBoxes()(image, boxes)  # type: ignore[no-any-return]


def _located(target: dict[str, Any]) -> dict[str, Any]:
    return {name: target[name] for name in ("boxes", "masks") if name in target}


def _moved(keypoints: Tensor, factors: tuple[float, float], corner: tuple[int, int], side: int) -> Tensor:
    """Return the keypoints in the crop; those outside of it are not visible and lie at 0, as COCO has it."""
    places = keypoints[..., :2] * torch.tensor(factors) - torch.tensor(corner)
    inside = ((places >= 0) & (places < side)).all(-1) & (keypoints[..., 2] > 0)
    moved = torch.cat((places, keypoints[..., 2:]), dim=-1)
    return torch.where(inside[..., None], moved, torch.zeros_like(moved))


def _without_the_lost(target: dict[str, Any]) -> dict[str, Any]:
    boxes = target["boxes"]
    extent = boxes[:, 2:] - boxes[:, :2]
    kept = (extent >= _SMALLEST).all(1)
    if "masks" in target:
        kept &= target["masks"].flatten(1).bool().any(1)
    per_object = {name: target[name] for name in ("boxes", "labels", "masks", "keypoints") if name in target}
    return {**target, **{name: _selected(value, kept) for name, value in per_object.items()}}


def _selected(value: Tensor, kept: Tensor) -> Tensor:
    chosen = value[kept.as_subclass(Tensor)]
    return tv_tensors.wrap(chosen, like=value) if isinstance(value, tv_tensors.TVTensor) else chosen
