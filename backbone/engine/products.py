"""The convolutions of training: matrix products where the CPU is quicker at those, torch's own kernels elsewhere.

oneDNN's convolutions rearrange the weight or its gradient at every call. A product rearranges the activations, which
is less where the weight is large against them; a 1x1 convolution is a product anyway, as is a linear layer.
"""

from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from backbone.engine import torch_internals
from backbone.engine.kernels import Geometry, has_onednn

# oneDNN has other kernels for other CPUs, on which nobody has measured
HAS_LINEAR: Final = torch_internals.HAS_LINEAR and torch.backends.cpu.get_cpu_capability() == "AVX512"


def convolve(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Return ``conv(x, weight)``: features (N, C_in, H, W) -> (N, C_out, H_out, W_out)."""
    if _is_pointwise(weight, geometry) and _has_product(x):
        seen = _every(x, geometry.stride)
        return _image(_product(_rows(seen), weight.flatten(1).T), seen)
    return F.conv2d(x, weight, None, *geometry)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x @ weight.T + bias`` for float32 on the CPU by oneDNN; torch calls MKL, half as fast on AMD's CPUs."""
    out: Tensor = torch_internals.linear_pointwise(x, weight, bias, "none", [], "")
    return out


def conv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    *,
    needs_x: bool,
    needs_weight: bool,
    onto: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of ``conv(x, weight)`` for its input and its weight, where they are needed.

    Args:
        grad: The gradient of the convolution's output.
        x: The convolution's input.
        weight: (C_out, C_in / groups, kh, kw) in the dtype of ``x``.
        geometry: Stride, padding, dilation, groups.
        needs_x: Whether the input's gradient is needed.
        needs_weight: Whether the weight's is.
        onto: A tensor like ``x``; the input's gradient is added to it, in place, and it is returned for that gradient.
    """
    stride, padding, dilation, groups = geometry
    grad_x = grad_weight = None
    if groups == 1 and _has_product(x):
        if needs_weight and _is_quicker_as_product(weight, grad):
            rows = _product(_rows(grad).T, _patches(x, weight, geometry))
            grad_weight = rows.view(len(weight), *weight.shape[2:], -1).permute(0, 3, 1, 2)
            needs_weight = False
        if needs_x and _is_pointwise(weight, geometry):
            grad_x = _image(_product(_rows(grad), weight.flatten(1)), grad)
            if stride != (1, 1):  # the pixels between have no gradient
                onto = torch.zeros_like(x) if onto is None else onto
            needs_x = False
    if needs_x or needs_weight:
        of_x, of_weight, _ = torch_internals.convolution_backward(
            grad, x, weight, None, stride, padding, dilation, False, (0, 0), groups, (needs_x, needs_weight, False)
        )
        if needs_x:
            grad_x = of_x
        if needs_weight:
            grad_weight = of_weight
    if onto is None or grad_x is None:
        return grad_x, grad_weight
    target = onto if grad_x.shape == onto.shape else _every(onto, stride)
    target += grad_x
    return onto, grad_weight


def _has_product(x: Tensor) -> bool:
    """Whether products of ``x`` are known to be quick, and are as precise as the convolutions they stand in for."""
    if not has_onednn(x):
        return False
    if x.dtype == torch.bfloat16:
        return True
    mkldnn: Any = torch.backends.mkldnn
    is_precise = mkldnn.matmul.fp32_precision in ("none", "ieee", mkldnn.conv.fp32_precision)
    return x.dtype == torch.float32 and HAS_LINEAR and is_precise


def _is_pointwise(weight: Tensor, geometry: Geometry) -> bool:
    return weight.shape[2:] == (1, 1) and geometry.padding == (0, 0) and geometry.groups == 1


def _is_quicker_as_product(weight: Tensor, grad: Tensor) -> bool:
    """Whether a weight's gradient is quicker as a product, which rearranges activations in place of the weight."""
    channels = weight.shape[0]
    activations = grad.numel() // grad.shape[1] * (channels + weight.numel() // channels)
    limit = 32 if grad.dtype == torch.bfloat16 and weight.shape[2:] == (1, 1) else 3  # measured on AVX-512
    return activations < limit * weight.numel()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """(M, K), (K, N) -> (M, N) by oneDNN."""
    return torch.mm(a, b) if a.dtype == torch.bfloat16 else linear(a, b.T, None)


def _every(x: Tensor, stride: tuple[int, int]) -> Tensor:
    """The pixels of (N, C, H, W) that a 1x1 convolution sees, as a view."""
    return x if stride == (1, 1) else x[:, :, :: stride[0], :: stride[1]]


def _rows(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N * H * W, C), contiguous, without a copy in channels_last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).contiguous()


def _image(rows: Tensor, like: Tensor) -> Tensor:
    """(N * H * W, C) -> (N, C, H, W), channels_last, with N, H, W of ``like``."""
    batch, _, height, width = like.shape
    return rows.view(batch, height, width, -1).permute(0, 3, 1, 2)


def _patches(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """(N, C, H, W) -> (N * H_out * W_out, kh * kw * C): what each pixel of the output sees."""
    stride, padding, dilation, _ = geometry
    if _is_pointwise(weight, geometry):
        return _rows(_every(x, stride))
    spans = [step * (size - 1) + 1 for step, size in zip(dilation, weight.shape[2:], strict=True)]
    x = x.permute(0, 2, 3, 1)
    if padding != (0, 0):
        x = F.pad(x, (0, 0, padding[1], padding[1], padding[0], padding[0]))
    seen = x.unfold(1, spans[0], stride[0]).unfold(2, spans[1], stride[1])[..., :: dilation[0], :: dilation[1]]
    return seen.permute(0, 1, 2, 4, 5, 3).reshape(-1, weight[0].numel())
