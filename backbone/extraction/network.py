"""The network of an extraction: bytes of images in, maps or vectors out."""

from collections.abc import Sequence
from typing import Final, Self

import torch
from torch import Tensor

from backbone.extraction.pixels import normalise
from backbone.extraction.request import Request
from backbone.features import Backbone, Features, input_channels
from backbone.inference.optimize import forget_shapes, optimize_for_inference

GEM_POWER: Final = 3.0
_GEM_LEAST: Final = 1e-6
_PART: Final = 2**17
"""Numbers that are summed at a time on the CPU: half a megabyte, which stays in a processor's cache."""
_CHANNELS: Final = 3


class Network:
    """Computes what a request asks for, by an optimised copy of a backbone.

    Args:
        model: The backbone; stays as it is.
        request: What to compute.
        device: Where; by default where the backbone is.

    Raises:
        ValueError: If the backbone takes no RGB images, or lacks a level that is asked for.
    """

    def __init__(self, model: Backbone, request: Request, device: torch.device | str | None = None) -> None:
        if input_channels(model) != _CHANNELS:
            raise ValueError(
                f"images are read as RGB: the backbone's in_channels must be {_CHANNELS}, got {input_channels(model)}"
            )
        self.levels = request.levels_of(list(model.feature_specs))
        self.specs = {level: model.feature_specs[level] for level in self.levels}
        self.request, self.preprocessing = request, model.preprocessing
        own = next(model.parameters()).device
        self.device = own if device is None else torch.device(device)
        dtype = None if request.dtype == "float32" else getattr(torch, request.dtype)
        self._copy = optimize_for_inference(model, dtype=dtype).to(self.device)
        self._stored: torch.dtype = getattr(torch, request.stored_dtype)

    def __call__(self, pixels: Tensor) -> Features:
        """Bytes (N, H, W, 3) in RGB -> maps (N, C, H / stride, W / stride), or vectors (N, C) where pooled."""
        with torch.inference_mode():
            maps = self._copy(normalise(pixels.to(self.device, non_blocking=True), self.preprocessing))
            return {level: self._pooled(maps[level]).to(self._stored) for level in self.levels}

    def start_anew(self) -> Self:
        """Forget the sizes of images that came before, which decide by which kernels the next are computed."""
        forget_shapes(self._copy)
        return self

    def images_at_once(self, height: int, width: int) -> int:
        """Return how many images of this size, in pixels, make a batch."""
        return self.request.images_at_once(height, width, self.device.type)

    def _pooled(self, maps: Tensor) -> Tensor:
        if self.request.pool == "none":
            return maps
        return pool(maps, gem=self.request.pool == "gem")


def pool(maps: Tensor, *, gem: bool) -> Tensor:
    """Maps (N, C, H, W) -> vectors (N, C) in float32: the average, or the generalised mean of power 3 (GeM).

    GeM is arXiv:1711.02512, with values below 1e-6 raised to it.
    """
    if maps.is_cuda:
        values = maps.float()
        means = (values.clamp(min=_GEM_LEAST).pow(GEM_POWER) if gem else values).mean((2, 3))
    else:
        means = torch.stack([_mean_in_parts(each.permute(1, 2, 0).flatten(0, 1), gem=gem) for each in maps])
    return means.pow(1 / GEM_POWER) if gem else means


def _mean_in_parts(rows: Tensor, *, gem: bool) -> Tensor:
    """Pixels (H x W, C) -> their mean (C,) in float32, few pixels at a time in memory that stays the same.

    A copy of a whole map in float32 is new memory each time, whose pages cost the CPU several times the sums.
    """
    count, channels = rows.shape
    step = max(1, _PART // channels)
    part = torch.empty(min(step, count), channels)
    total = torch.zeros(channels)
    for start in range(0, count, step):
        values = part[: min(step, count - start)].copy_(rows[start : start + step])
        if gem:
            values.clamp_(min=_GEM_LEAST).pow_(GEM_POWER)
        total += values.sum(0)
    return total / count


def stacked(images: Sequence[Tensor]) -> Tensor:
    """Images (H, W, 3) of one size -> (N, H, W, 3)."""
    return torch.stack(list(images))
