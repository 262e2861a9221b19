"""What a ResNet begins with, a 7x7 convolution and a 3x3 maximum, without the tensor between them.

That tensor is the largest of the network, 69 MB for 800x1344 in float32, and torch's maximum adds 34 MB of indices,
which only a gradient needs. From 32 MiB on glibc takes memory from the system anew each time, whose page faults take
longer than the convolution. Where no gradient is needed, the CPU therefore goes through the images in bands of rows.
"""

from typing import Final

import torch
from torch import Tensor, nn

from backbone.calls import compute_dtype, is_seen_through, is_watched, needs_grad
from backbone.folded import FoldedConv2d
from backbone.fused import conv_norm_act, is_frozen_layer
from backbone.kernels import Geometry, has_onednn

_FRESH_BYTES: Final = 32 * 2**20
_BAND_BYTES: Final = 16 * 2**20  # of the tensor between
_CONV: Final = Geometry((2, 2), (3, 3), (1, 1), 1)
_SPOILT: Final = 2  # rows at a band's upper end: there the convolution sees its padding in place of the image


def stem(images: Tensor, conv: nn.Module, norm: nn.Module, pool: nn.Module) -> Tensor:
    """Return ``pool(relu(norm(conv(images))))``: (N, C_in, H, W) -> (N, C, H / 4, W / 4); sizes round up."""
    bands = _bands(images, conv, norm, pool)
    if not bands:
        pooled: Tensor = pool(conv_norm_act(images, conv, norm))
        return pooled
    height = images.shape[2] // 2
    rows = 2 * -(-height // (2 * bands))
    parts: list[Tensor] = []
    above: Tensor | None = None
    for start in range(0, height, rows):
        stop, spoilt = min(start + rows, height), min(start, _SPOILT)
        features = conv_norm_act(images[:, :, 2 * (start - spoilt) : 2 * (stop + 1)], conv, norm)
        features = features[:, :, spoilt : spoilt + stop - start]
        parts.append(_max_of_pairs(features, above))
        above = features[:, :, -1:]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _bands(images: Tensor, conv: nn.Module, norm: nn.Module, pool: nn.Module) -> int:
    """How many bands of rows to go in; 0 where it is not worth it, or where someone would notice."""
    if images.device.type != "cpu" or is_seen_through(images) or images.shape[2] % 4 or images.shape[3] % 4:
        return 0
    if type(pool) is not nn.MaxPool2d or is_watched(pool):
        return 0
    settings = (pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode, pool.return_indices)
    is_folded = isinstance(conv, FoldedConv2d) and type(norm) is nn.Identity
    if settings != (3, 2, 1, 1, False, False) or not (is_folded or is_frozen_layer((conv, norm), images)):
        return 0
    assert isinstance(conv, nn.Conv2d)
    if conv.kernel_size != (7, 7) or Geometry.of(conv) != _CONV or needs_grad(images, conv.weight):
        return 0
    dtype = conv.weight.dtype if is_folded else compute_dtype(images)
    between = len(images) * conv.out_channels * images[0, 0].numel() // 4 * dtype.itemsize
    if dtype.itemsize > 2 and between < _FRESH_BYTES:  # noqa: PLR2004 (in half precision the indices are most of it)
        return 0
    return -(-between // _BAND_BYTES)


def _max_of_pairs(x: Tensor, above: Tensor | None) -> Tensor:
    """(N, C, H, W) with even H and W -> its 3x3 maximum with stride 2, (N, C, H / 2, W / 2).

    Args:
        x: Rows of features after a ReLU.
        above: The row above them, (N, C, 1, W), if there is one.
    """
    if x.dtype.itemsize == 2 and has_onednn(x):  # noqa: PLR2004
        # after oneDNN's ReLU there is no NaN and no sign: the larger number has the larger bits, which compare faster
        bits = None if above is None else above.view(torch.int16)
        return _max_of_pairs(x.view(torch.int16), bits).view(x.dtype)
    upper, lower = x[:, :, ::2], x[:, :, 1::2]
    tall = torch.maximum(upper, lower)
    torch.maximum(tall[:, :, 1:], lower[:, :, :-1], out=tall[:, :, 1:])
    if above is not None:
        torch.maximum(tall[:, :, :1], above, out=tall[:, :, :1])
    left, right = tall[..., ::2], tall[..., 1::2]
    out = torch.maximum(left, right)
    torch.maximum(out[..., 1:], right[..., :-1], out=out[..., 1:])
    return out
