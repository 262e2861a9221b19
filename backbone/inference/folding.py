"""A batch norm's scale and shift in the weight and bias of the convolution before it."""

from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from backbone.engine.calls import has_hook, is_plain
from backbone.engine.folded import FoldedConv2d
from backbone.inference.foreign_norms import frozen_eps, what_follows
from backbone.norm import FrozenBatchNorm2d, freeze_norms, frozen_form, is_frozen_form


def is_plain_conv(conv: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether ``conv`` is a convolution that another may replace: torch's own, with dense weights, and no hooks."""
    is_known = type(conv) is nn.Conv2d and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    return (
        is_known
        and not has_hook(conv)
        and all(is_plain(each) and each.is_floating_point() for each in conv.parameters())
    )


class Constants(NamedTuple):
    """What a batch norm computes: ``(x - mean) / sqrt(variance + eps) * weight + bias``."""

    mean: Tensor
    variance: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


def constants_of(norm: nn.Module) -> Constants | None:
    """Return what ``norm`` computes; None where it is no batch norm that is known, by its exact class."""
    eps = norm.eps if frozen_form(norm) or is_frozen_form(norm) else frozen_eps(norm)
    mean, variance = getattr(norm, "running_mean", None), getattr(norm, "running_var", None)
    if eps is None or mean is None or variance is None:  # without statistics it depends on the input
        return None
    return Constants(mean, variance, norm.weight, norm.bias, float(eps))  # type: ignore[arg-type]


def remainder_of(norm: nn.Module) -> nn.Module:
    """Return what ``norm`` does besides, such as an activation."""
    form = frozen_form(norm)
    if form is FrozenBatchNorm2d:
        return nn.Identity()
    known = freeze_norms(norm) if form else norm  # the frozen form tells
    return known.remainder() if isinstance(known, FrozenBatchNorm2d) else what_follows(known)


def fold(conv: nn.Conv2d, norm: Constants, keep_weight: bool) -> FoldedConv2d:
    """Fold in double precision and round to the dtype of ``conv``."""
    scale = torch.rsqrt(norm.variance.double() + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight.double()
    mean = norm.mean.double()
    shift = -mean * scale if conv.bias is None else (conv.bias.double() - mean) * scale
    shift = shift if norm.bias is None else shift + norm.bias.double()
    weight = (conv.weight.double() * scale[:, None, None, None]).to(conv.weight.dtype)
    return FoldedConv2d(conv, weight, shift.to(conv.weight.dtype), keep_weight=keep_weight)
