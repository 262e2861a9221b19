"""Antialiased resizing as two matrix products: ONNX's Resize has it, OpenVINO's does not."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class AntialiasingAsProducts(TorchFunctionMode):
    """While it is on, ``F.interpolate(..., antialias=True)`` to a size is traced as matrix products.

    Position embeddings are resized so.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        """Stand in for that one call."""
        named = dict(kwargs or {})
        known = func is F.interpolate and len(args) == 1 and not named.get("align_corners")
        if known and named.get("antialias") and isinstance(named.get("size"), list | tuple):
            return resample(args[0], named["size"], bicubic=named.get("mode") == "bicubic")
        return func(*args, **named)


def resize(pixels: Tensor, size: tuple[int, int], *, bicubic: bool) -> Tensor:
    """Pixels (N, C, H, W) of 0 to 255 -> (N, C, *size), as ``F.interpolate(..., antialias=True)`` resizes them."""
    return resample(pixels, size, bicubic=bicubic).clamp(min=0.0).clamp(max=255.0)  # bicubic overshoots


def resample(pixels: Tensor, size: Sequence[int], *, bicubic: bool) -> Tensor:
    """Values (N, C, H, W) -> (N, C, *size), as ``F.interpolate(..., antialias=True)`` resizes them."""
    rows = _weights(pixels.shape[2], size[0], bicubic, pixels)
    columns = _weights(pixels.shape[3], size[1], bicubic, pixels)
    return rows @ pixels @ columns.transpose(0, 1)


def _weights(before: int, after: int, bicubic: bool, like: Tensor) -> Tensor:
    """Return how much each old pixel counts in each new one, (after, before), float32."""
    scale = torch.full((1,), 1.0, dtype=like.dtype, device=like.device) * before / after
    reach = scale.clamp(min=1)
    centres = (torch.arange(after, dtype=like.dtype, device=like.device) + 0.5) * scale
    places = torch.arange(before, dtype=like.dtype, device=like.device) + 0.5
    distance = ((places[None, :] - centres[:, None]) / reach).abs()
    weights = _cubic(distance) if bicubic else (1 - distance).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


def _cubic(distance: Tensor) -> Tensor:
    """Keys' kernel with a = -0.5, as Pillow and torch take it when they antialias."""
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))  # noqa: PLR2004
