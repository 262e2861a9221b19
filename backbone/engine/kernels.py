"""One convolution with its bias, residual and ReLU, by the fastest kernel the device has. No autograd here."""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone.engine import torch_internals

_ONEDNN_DTYPES: Final = torch_internals.onednn_dtypes()


class Geometry(NamedTuple):
    """How a convolution walks over its input; each pair is (vertical, horizontal)."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @classmethod
    def of(cls, conv: nn.Conv2d) -> "Geometry":
        """Read the geometry off a convolution with numeric padding."""
        stride, padding, dilation = conv.stride, conv.padding, conv.dilation
        if not (type(stride) is type(padding) is type(dilation) is tuple):  # set afterwards: to a number, say
            stride, padding, dilation = _pair(stride), _pair(padding), _pair(dilation)
        return cls(stride, padding, dilation, conv.groups)  # type: ignore[arg-type]


def _pair(value: Any) -> Any:  # noqa: ANN401
    """Return a convolution's setting for both directions."""
    return tuple(value) if isinstance(value, Sequence) else (value, value)


STEM: Final = Geometry((2, 2), (3, 3), (1, 1), 1)
"""How the 7x7 convolution walks that ResNets begin with."""


def conv_bias_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    geometry: Geometry,
    residual: Tensor | None = None,
    *,
    relu: bool = True,
    reuse_residual: bool = False,
) -> Tensor:
    """Return ``relu(conv(x, weight) + bias + residual)``, in channels_last where the kernel prefers it.

    Args:
        x: Features (N, C_in, H, W).
        weight: (C_out, C_in / groups, kh, kw) in the dtype of ``x``, as it is or from ``pack``.
        bias: (C_out,) in the dtype of ``x``.
        geometry: Stride, padding, dilation, groups.
        residual: Added before the ReLU, shaped like the result.
        relu: Whether a ReLU ends the operation.
        reuse_residual: Whether the result may take the memory of ``residual``.
    """
    if residual is not None and not _fits(residual, x, weight, geometry):
        out = conv_bias_act(x, weight, bias, geometry, relu=False) + residual  # broadcast, or refused, by torch
        return out.relu_() if relu else out
    if has_onednn(x):
        return _onednn(x, weight, bias, geometry, residual, relu=relu, reuse_residual=reuse_residual)
    if _is_packed_stem(x, weight, geometry):
        x, geometry = _space_to_depth(x), Geometry((1, 1), (0, 0), (1, 1), 1)
    if relu and _has_cudnn(x) and _cudnn_fuses(x, weight) and torch_internals.has_cudnn(x.device):
        if residual is None:
            return torch_internals.cudnn_convolution_relu(x, weight, bias, *geometry)
        if _is_dense(residual):
            return torch_internals.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *geometry)
    out = F.conv2d(x, weight, bias, *geometry)
    if residual is not None:
        out = out.add_(residual)
    return out.relu_() if relu else out


def _fits(residual: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether ``residual`` has the shape of the convolution's output; of a packed stem the shape is not asked."""
    if _is_packed_stem(x, weight, geometry):
        return True
    stride, padding, dilation, _ = geometry
    spans = [step * (size - 1) for step, size in zip(dilation, weight.shape[2:], strict=True)]
    size = [
        (side + 2 * pad - span - 1) // step + 1
        for side, pad, span, step in zip(x.shape[2:], padding, spans, stride, strict=True)
    ]
    return residual.shape == (x.shape[0], weight.shape[0], *size)


def pack(weight: Tensor, geometry: Geometry, x: Tensor) -> Tensor:
    """Return ``weight`` in the layout the device's kernel wants for inputs of the shape of ``x``.

    Other shapes work as well, but oneDNN may then rearrange the weight at every call, at many times the convolution's
    own cost: pack again when ``layout_depends_on`` changes.
    """
    if has_onednn(x) and torch_internals.PACKS:
        stride, padding, dilation, groups = geometry
        packed: Tensor = torch_internals.reorder_convolution_weight(
            weight.contiguous(), padding, stride, dilation, groups, list(x.shape)
        )
        return packed
    if _is_slow_stem(x, weight, geometry):
        weight = _stem_weight(weight)
    return weight.contiguous(memory_format=torch.channels_last) if x.is_cuda else weight


def unpack(packed: Tensor | None) -> Tensor:
    """Return a weight that ``pack`` rearranged for the CPU, or left in its shape, as it was."""
    assert packed is not None
    return packed if packed.layout is torch.strided else packed.to_dense()


def layout_depends_on(x: Tensor) -> object:
    """Return what ``pack`` looks at in ``x``, besides its dtype."""
    return x.shape if x.device.type == "cpu" else x.device


def has_onednn(x: Tensor) -> bool:
    """Whether oneDNN's fused convolution takes ``x``."""
    return x.device.type == "cpu" and x.dtype in _ONEDNN_DTYPES and bool(torch.backends.mkldnn.enabled)


def _onednn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    geometry: Geometry,
    residual: Tensor | None,
    *,
    relu: bool,
    reuse_residual: bool,
) -> Tensor:
    stride, padding, dilation, groups = geometry
    where = (padding, stride, dilation, groups)
    x = x.contiguous(memory_format=torch.channels_last)
    out: Tensor
    if residual is None:
        out = torch_internals.convolution_pointwise(x, weight, bias, *where, "relu" if relu else "none", [], "")
        return out
    reuse = reuse_residual and residual.is_contiguous(memory_format=torch.channels_last)
    residual = residual.contiguous(memory_format=torch.channels_last)
    add_relu: tuple[object, ...] = ("add", 1.0, "relu" if relu else None, [], None)
    if reuse:
        out = torch_internals.convolution_pointwise_(residual, x, weight, bias, *where, *add_relu)
    else:
        out = torch_internals.convolution_pointwise(x, residual, weight, bias, *where, *add_relu)
    return out


def _has_cudnn(x: Tensor) -> bool:
    return x.is_cuda and torch.backends.cudnn.enabled and torch.version.hip is None


def _cudnn_fuses(x: Tensor, weight: Tensor) -> bool:
    """Whether fused kernels may take this convolution.

    They are known to take more than one channel a group, and in half precision channels by eights. They compute in
    float32 at most, and torch lets them choose algorithms that are not deterministic.
    """
    if torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled():
        return False
    by_eights = x.shape[1] % 8 == 0 and weight.shape[0] % 8 == 0
    takes = x.dtype == torch.float32 or (x.dtype in (torch.float16, torch.bfloat16) and by_eights)
    return weight.shape[1] > 1 and takes


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) or x.is_contiguous()


# --- the stem ---------------------------------------------------------------------------------------------------------
# cuDNN is slow at 7x7 convolutions of few channels in half precision (pytorch#68506). Two by two pixels of C channels
# are one pixel of 4C, and the 7x7 with stride 2 is a 4x4 with stride 1: the same products, 2 to 3 times as fast.


def _is_slow_stem(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    return (
        _has_cudnn(x)
        and x.dtype in (torch.float16, torch.bfloat16)
        and weight.shape[1:] == (x.shape[1], 7, 7)
        and x.shape[1] <= 4  # noqa: PLR2004
        and geometry == STEM
    )


def _is_packed_stem(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    return geometry == STEM and weight.shape[2:] == (4, 4) and weight.shape[1] != x.shape[1]


def _stem_weight(weight: Tensor) -> Tensor:
    """(C_out, C, 7, 7) -> (C_out, 4C rounded up to 8s, 4, 4)."""
    out_channels, channels = weight.shape[:2]
    taps = F.pad(weight, (1, 0, 1, 0)).view(out_channels, channels, 4, 2, 4, 2).permute(0, 1, 3, 5, 2, 4)
    return F.pad(taps.reshape(out_channels, 4 * channels, 4, 4), (0, 0, 0, 0, 0, -4 * channels % 8))


def _space_to_depth(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, 4C rounded up to 8s, H / 2 + 3, W / 2 + 3), channels_last, with the stem's padding around."""
    batch, channels, height, width = x.shape
    if height % 2 or width % 2:
        x = F.pad(x, (0, width % 2, 0, height % 2))
        height, width = x.shape[2:]
    x = x.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    x = x.reshape(batch, height // 2, width // 2, 4 * channels)
    return F.pad(x, (0, -4 * channels % 8, 2, 1, 2, 1)).permute(0, 3, 1, 2)
