"""Images as a backbone's weights expect them: torchvision's v2 transforms in the order that training used."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from backbone.features import RGB_CHANNELS, Preprocessing

_LARGEST = 1.5  # bicubic resizing overshoots 1 by some percent; pixels of 0 to 255 do so by far
_MODES = {1: "L", RGB_CHANNELS: "RGB"}


class Batch(NamedTuple):
    """Images of different sizes in one tensor.

    Attributes:
        images: (N, C, H, W), each image at the top left and zeros beyond it.
        sizes: Height and width of each image within it, in pixels.
    """

    images: Tensor
    sizes: list[tuple[int, int]]


class ImageTransforms(v2.Transform):  # type: ignore[misc]
    """Resizes, scales to 0 to 1 and normalises as a backbone's weights expect it, in BGR where they do.

    An image is a PIL image, an array (H, W, C), or a tensor (C, H, W), of uint8 or of floats from 0 to 1, in RGB.
    It becomes a float tensor (C, H, W); a tensor (N, C, H, W) becomes one of the same shape. With targets beside it, as
    ``transform(image, target)``, boxes and masks of torchvision's tv_tensors are resized along. A list of images, whose
    sizes may differ, becomes a ``Batch``: padded to a common size that ``size_divisibility`` divides.

    Args:
        expected: What the weights expect of an image. ``Backbone.transforms`` gives it as it is then.
        in_channels: Channels of the images.
        size_divisibility: Lists are padded to multiples of this, in pixels.
        resize: Shorter side, or height and width, in pixels; None keeps the images' size.

    Raises:
        ValueError: (when called) for floats that are not of 0 to 1, and for other channels than the backbone's.
    """

    def __init__(
        self,
        expected: Preprocessing,
        in_channels: int,
        size_divisibility: int = 1,
        resize: int | tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        sides = (resize,) if isinstance(resize, int) else resize
        if sides is not None and not (len(sides) in (1, 2) and all(type(side) is int and side > 0 for side in sides)):
            raise ValueError(f"resize must be a shorter side or (height, width) in pixels, or None, got {resize!r}")
        self.expected, self.in_channels, self.resize = expected, in_channels, resize
        self.size_divisibility = max(size_divisibility, 1)
        self.steps = v2.Compose(list(_steps(expected, in_channels, sides)))

    def forward(self, *inputs: Any) -> Any:  # noqa: ANN401
        """One image -> (C, H, W); a list of them -> ``Batch``; an image and targets -> the same, transformed."""
        if len(inputs) == 1 and isinstance(inputs[0], list):
            return self._batch([self.steps(self._checked(image)) for image in inputs[0]])
        image, *targets = inputs
        return self.steps(self._checked(image), *targets)

    def _checked(self, image: object) -> object:
        """Return ``image`` as torchvision takes it, its channels those of the backbone."""
        channels = self.in_channels
        if isinstance(image, Image.Image):
            if channels not in _MODES:
                raise ValueError(
                    f"a PIL image has 1 or 3 channels, got one for a backbone of {channels}; give a tensor"
                )
            return image.convert(_MODES[channels])
        if isinstance(image, np.ndarray):
            image = torch.from_numpy(np.ascontiguousarray(image if image.ndim > 2 else image[..., None]))  # noqa: PLR2004
            image = image.movedim(-1, -3)
        if not isinstance(image, Tensor):
            raise ValueError(
                f"an image must be a PIL image, an array (H, W, C) or a tensor (C, H, W), got {type(image).__name__}; "
                f"give several as a list"
            )
        if image.ndim not in (3, 4) or image.shape[-3] != channels:
            last = image.ndim in (3, 4) and image.shape[-1] == channels
            raise ValueError(
                f"an image must be a tensor ({channels}, H, W) or (N, {channels}, H, W), got {tuple(image.shape)}; "
                f"{'put its channels first: image.movedim(-1, -3)' if last else 'give it as many channels'}"
            )
        if image.is_floating_point() and image.numel() and image.max() > _LARGEST:
            raise ValueError(
                f"a float image must be of 0 to 1, got values up to {float(image.max()):g}; divide by its largest "
                f"possible value, or give uint8"
            )
        return tv_tensors.Image(image)

    def _batch(self, images: Sequence[Tensor]) -> Batch:
        """Put images (C, H_i, W_i) into one tensor."""
        if not images or any(image.ndim != 3 for image in images):  # noqa: PLR2004
            raise ValueError(f"a list must hold one or more images (C, H, W), got {[tuple(i.shape) for i in images]}")
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        multiple = self.size_divisibility
        height, width = (-(-max(sides) // multiple) * multiple for sides in zip(*sizes, strict=True))
        padded = [F.pad(image, (0, width - w, 0, height - h)) for image, (h, w) in zip(images, sizes, strict=True)]
        return Batch(torch.stack(padded), sizes)


def _steps(expected: Preprocessing, channels: int, sides: Sequence[int] | None) -> Iterator[v2.Transform]:
    mean, std = expected.unit_statistics(channels)
    if sides is not None:
        yield v2.Resize(list(sides), _interpolation(expected.interpolation))
    yield v2.ToImage()
    yield v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)
    if expected.turns_to_bgr(channels):
        yield _TurnToBgr()
    yield v2.Normalize(list(mean), list(std))
    yield v2.ToPureTensor()


class _TurnToBgr(v2.Transform):  # type: ignore[misc]
    """RGB to BGR."""

    _transformed_types = (tv_tensors.Image,)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:  # noqa: ANN401
        return tv_tensors.wrap(inpt.flip(-3), like=inpt)


def _interpolation(name: str) -> InterpolationMode:
    modes = {mode.value: mode for mode in InterpolationMode}
    return modes.get(name, InterpolationMode.BILINEAR)  # timm calls some "random", of which bilinear is one
