"""Preparing pixels as one order of channels, one factor and one offset each."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from backbone.features import Preprocessing
from backbone.hosts.torchvision import unit_statistics

BYTE = 255.0


@dataclass(frozen=True)
class PixelAffine:
    """``prepared[c] = image[order[c]] * factor[c] + offset[c]`` for images of 0 to 1.

    Attributes:
        order: For each prepared channel the image's.
        factor: (C,), float64.
        offset: (C,), float64.
    """

    order: tuple[int, ...]
    factor: Tensor
    offset: Tensor

    @classmethod
    def of(cls, prepare: Callable[[Tensor], Tensor], channels: int) -> "PixelAffine":
        """Find what ``prepare``, (C, H, W) -> (C, H, W), does to each channel.

        Raises:
            ValueError: If it is no reordering, scaling and shifting of channels.
        """
        probes = torch.cat((torch.zeros(1, channels), torch.eye(channels)))[..., None, None].double()
        offset, *responses = (prepare(probe).flatten() for probe in probes)
        matrix = torch.stack(responses, 1) - offset[:, None]  # [prepared, image]
        order = matrix.abs().argmax(1)
        factor = matrix.gather(1, order[:, None])[:, 0]
        if not torch.equal(torch.zeros_like(matrix).scatter(1, order[:, None], factor[:, None]), matrix):
            raise ValueError("a file's preprocessing may reorder, scale and shift channels, got one that mixes them")
        return cls(tuple(order.tolist()), factor, offset)

    @classmethod
    def from_preprocessing(cls, preprocessing: Preprocessing, channels: int) -> "PixelAffine":
        """Say what the weights expect of an RGB image."""
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in unit_statistics(preprocessing, channels))
        order = range(channels)[::-1] if preprocessing.channel_order == "bgr" else range(channels)
        return cls(tuple(order), 1 / std, -mean / std)

    def scale(self, *, takes_bytes: bool) -> Tensor:
        """The factor (C,) for images of 0 to 255, or of 0 to 1."""
        return self.factor / BYTE if takes_bytes else self.factor
