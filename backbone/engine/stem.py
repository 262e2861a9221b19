"""What a ResNet begins with, a 7x7 convolution and a 3x3 maximum, without the tensor between them.

That tensor is the largest of the network, 69 MB for 800x1344 in float32, and torch's maximum adds 34 MB of indices,
which only a gradient needs. From 32 MiB on glibc takes memory from the system anew each time, whose page faults take
longer than the convolution. Where no gradient is needed and height and width are multiples of 4, the CPU therefore
takes a few images at a time, and large ones in bands of rows. Once torch's maximum stores no indices without a
gradient, what is left to gain here is the bands.
"""

from typing import Final, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from backbone.engine.calls import compute_dtype, has_hook, is_traced
from backbone.engine.finite import is_finite
from backbone.engine.folded import FoldedConv2d
from backbone.engine.kernels import STEM, Geometry, has_onednn
from backbone.engine.operation import Path, conv_norm_act, decide
from backbone.norm import is_frozen_form

_FRESH_BYTES: Final = 32 * 2**20
_BAND_BYTES: Final = 16 * 2**20  # of the tensor between
_SPOILT: Final = 2  # rows at a band's upper end, one at the lower: there the convolution sees padding, not the image


class Bands(NamedTuple):
    """How many images are taken at a time, and how many rows of the tensor between."""

    images: int
    rows: int


def stem(images: Tensor, conv: nn.Module, norm: nn.Module, act: nn.Module, pool: nn.Module) -> Tensor | None:
    """Return ``pool(act(norm(conv(images))))``: (N, C_in, H, W) -> (N, C, H / 4, W / 4); sizes round up.

    None where these are to be called.
    """
    if is_traced(images):
        return None
    bands = None
    if _is_known(conv, norm, act, pool, images):
        dtype = conv.bias.dtype if isinstance(conv, FoldedConv2d) else compute_dtype(images)  # type: ignore[union-attr]
        batch, height, width, channels = len(images), images.shape[2] // 2, images.shape[3] // 2, conv.out_channels
        bands = plan_bands(batch, height, width, channels, dtype.itemsize)
    if bands is not None:
        out = images.new_empty(batch, height // 2, width // 2, channels, dtype=dtype).permute(0, 3, 1, 2)
        parts = zip(torch.split(images, bands.images), torch.split(out, bands.images), strict=True)
        if all(_in_bands(part, conv, norm, act, bands.rows, pooled) for part, pooled in parts):
            return out
    features = conv_norm_act(images, conv, norm, act=act)
    return None if features is None else pool(features)


def _in_bands(images: Tensor, conv: nn.Module, norm: nn.Module, act: nn.Module, rows: int, out: Tensor) -> bool:
    """Write the stem of ``images`` to ``out`` (N, C, H / 4, W / 4), some rows of the tensor between at a time.

    Returns:
        Whether that was done: False where the folded weight is not finite.
    """
    above, height = None, images.shape[2] // 2
    for start in range(0, height, rows):
        stop, spoilt = min(start + rows, height), min(start, _SPOILT)
        features = conv_norm_act(images[:, :, 2 * (start - spoilt) : 2 * (stop + 1)], conv, norm, act=act)
        if features is None:
            return False
        features = features[:, :, spoilt : spoilt + stop - start]
        _max_pool(features, above, out[:, :, start // 2 : stop // 2])
        above = features[:, :, -1:].clone()
        del features  # the next band may take its memory
    return True


def plan_bands(batch: int, height: int, width: int, channels: int, itemsize: int) -> Bands | None:
    """How to go through a batch; None where it pays to take all at once, with torch's maximum.

    Args:
        batch: Number of images.
        height: Height of the tensor between, even.
        width: Its width.
        channels: Its channels.
        itemsize: Bytes of one of its numbers.
    """
    of_image = channels * height * width * itemsize
    if itemsize > 2 and batch * of_image < _FRESH_BYTES:  # noqa: PLR2004 (in half precision indices are half of it all)
        return None
    if of_image <= _BAND_BYTES:
        return Bands(_BAND_BYTES // of_image, height)
    num_bands = -(-of_image // _BAND_BYTES)
    return Bands(1, 2 * -(-height // (2 * num_bands)))


def _is_known(
    conv: nn.Module, norm: nn.Module, act: nn.Module, pool: nn.Module, images: Tensor
) -> TypeGuard[nn.Conv2d]:
    """Whether this is the stem of ``STEM``, on the CPU, without a gradient, and nobody would notice a band."""
    if images.device.type != "cpu" or images.ndim != 4 or images.shape[2] % 4 or images.shape[3] % 4:  # noqa: PLR2004
        return False
    if type(pool) is not nn.MaxPool2d or has_hook(pool) or not isinstance(conv, nn.Conv2d):
        return False
    settings = (pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode, pool.return_indices)
    if settings != (3, 2, 1, 1, False, False) or conv.kernel_size != (7, 7) or Geometry.of(conv) != STEM:
        return False
    if decide(images, ((conv, norm),), (act,)) not in (Path.FUSED, Path.FOLDED):
        return False
    constants = norm.scale_and_shift() if is_frozen_form(norm) else (conv.bias,)
    return is_finite(conv.weight, *constants)  # ``_max_pool`` knows no NaN


def _max_pool(x: Tensor, above: Tensor | None, out: Tensor) -> None:
    """Write the 3x3 maximum with stride 2 of ``x``, which follows a ReLU, to ``out``.

    Args:
        x: Features (N, C, H, W) with even H and W.
        above: The row above them, (N, C, 1, W), if there is one.
        out: (N, C, H / 2, W / 2).
    """
    if x.dtype.itemsize == 2 and has_onednn(x):  # noqa: PLR2004
        # after oneDNN's ReLU there is no sign and no NaN: the larger number has the larger bits, which compare faster
        bits = None if above is None else above.view(torch.int16)
        x, above, out = x.view(torch.int16), bits, out.view(torch.int16)
    upper, lower = x[:, :, ::2], x[:, :, 1::2]
    tall = torch.maximum(upper, lower)
    torch.maximum(tall[:, :, 1:], lower[:, :, :-1], out=tall[:, :, 1:])
    if above is not None:
        torch.maximum(tall[:, :, :1], above, out=tall[:, :, :1])
    left, right = tall[..., ::2], tall[..., 1::2]
    torch.maximum(left, right, out=out)
    torch.maximum(out[..., 1:], right[..., :-1], out=out[..., 1:])
