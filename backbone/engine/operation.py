"""Convolution, frozen norm, residual and ReLU as one operation: why we are fast.

A frozen norm is a constant scale and shift per channel, so ``conv(x, w) * scale + shift = conv(x, w * scale) + shift``:
it never needs a pass over activations. ``conv_norm_act`` picks, per call,

* plain PyTorch where the norm trains, the call is being traced, or someone watches (hooks, dispatch modes), except in
  an inference copy, which has no norm left to call;
* where a gradient is needed, one autograd node that saves no folded weight (gradient.py);
* otherwise one fused kernel (kernels.py) on folded weights that are kept and never stale (kept.py).
"""

from collections.abc import Iterable, Sequence
from typing import TypeAlias, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone.engine.cached import unless_changed
from backbone.engine.calls import (
    compute_dtype,
    is_autocast,
    is_seen_through,
    is_watched,
    is_watched_within,
    needs_grad,
    runs_in_order,
)
from backbone.engine.folded import FoldedConv2d
from backbone.engine.gradient import FrozenLayer, scaled, with_gradient
from backbone.engine.kernels import Geometry, conv_bias_act, pack
from backbone.norm import FrozenBatchNorm2d, is_frozen_form

Layer: TypeAlias = tuple[nn.Module, nn.Module]
"""A convolution and its norm."""


def conv_norm_act(
    x: Tensor,
    conv: nn.Module,
    norm: nn.Module,
    residual: Tensor | None = None,
    *,
    relu: bool = True,
    reuse_residual: bool = False,
) -> Tensor:
    """Return ``relu(norm(conv(x)) + residual)``.

    Args:
        x: Features (N, C_in, H, W).
        conv: The convolution.
        norm: Its norm, C_out channels, which may end in an activation.
        residual: Added before the ReLU, shaped like the result.
        relu: Whether a ReLU ends the operation.
        reuse_residual: Whether nobody needs ``residual`` any more, so that the result may take its memory.

    Returns:
        Features (N, C_out, H_out, W_out) in the dtype of the convolution's output.
    """
    ends_in_relu = _ending(norm) is nn.ReLU
    if isinstance(conv, FoldedConv2d) and (
        isinstance(norm, nn.Identity)
        or (ends_in_relu and residual is None and not hasattr(norm, "running_var"))  # with hooks it was not folded
    ):
        return conv.fused(x, residual, relu=relu or ends_in_relu, reuse_residual=reuse_residual)
    layer = (conv, norm)
    if is_seen_through(x) or not is_frozen_layer(layer, x, before_relu=residual is None):
        out: Tensor = norm(conv(x))
        if residual is not None:
            out = out + residual
        return F.relu(out, inplace=not is_watched(norm)) if relu else out
    relu = relu or ends_in_relu
    x = x.to(compute_dtype(x))
    residual = residual if residual is None else residual.to(x.dtype)
    if needs_grad(x, layer[0].weight, residual):
        return with_gradient(x, residual, [layer], None, relu=relu)
    weight, bias = _folded(*layer, x)
    return conv_bias_act(x, weight, bias, Geometry.of(layer[0]), residual, relu=relu, reuse_residual=reuse_residual)


def residual_block(
    x: Tensor, layers: Sequence[Layer], projection: nn.Sequential | None, *, reuse_input: bool = False
) -> Tensor:
    """Return ``relu(layers(x) + shortcut(x))``, with a ReLU after each layer but the last.

    Args:
        x: Features (N, C_in, H, W).
        layers: The branch: convolutions and their norms.
        projection: Convolution and norm of the shortcut; None where it is the identity.
        reuse_input: Whether nobody needs ``x`` any more, so that the result may take its memory.
    """
    shortcut: list[Layer] = [] if projection is None else [(projection[0], projection[1])]
    watched = projection is not None and is_watched(projection)
    known = projection is None or len(projection) == 2  # noqa: PLR2004
    checked = (*layers, *shortcut) if torch.is_grad_enabled() and known and not watched else ()
    seen_through = len(checked) > 0 and is_seen_through(x)  # torch 2.11 compiles no bool(tuple)
    is_known = not seen_through and (projection is None or runs_in_order(projection))
    frozen = [layer for layer in checked if is_frozen_layer(layer, x)] if is_known else []
    if len(frozen) == len(layers) + len(shortcut):
        x = x.to(compute_dtype(x))
        if needs_grad(x, *[conv.weight for conv, _ in frozen]):
            return with_gradient(x, None, frozen[: len(layers)], frozen[len(layers) :])
    out = x
    for conv, norm in layers[:-1]:
        out = conv_norm_act(out, conv, norm)
    conv, norm = layers[-1]
    if projection is None:
        return conv_norm_act(out, conv, norm, x, reuse_residual=reuse_input)
    unseen = not is_watched_within(projection)
    return conv_norm_act(out, conv, norm, projection(x), reuse_residual=unseen)


def blocks_in_row(blocks: Iterable[nn.Module], fused: tuple[type[nn.Module], ...], x: Tensor) -> Tensor:
    """Return what ``blocks`` make of ``x`` one after the other.

    Those of the classes ``fused``, not of their subclasses, are told to reuse their input where it is nothing but the
    output of another of them: nobody else has it, unless someone watches a module of either. Only the CPU's kernel
    makes use of it, and only where no gradient is needed.
    """
    last_was_unseen = False
    for block in blocks:
        is_unseen = (
            not x.requires_grad and x.device.type == "cpu" and type(block) in fused and not is_watched_within(block)
        )
        x = block(x, reuse_input=True) if is_unseen and last_was_unseen else block(x)
        last_was_unseen = is_unseen
    return x


def fold(conv: nn.Conv2d, norm: FrozenBatchNorm2d, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight (C_out, C_in / groups, kh, kw) and bias (C_out,) of ``norm(conv(x))``, in the dtype of ``like``."""
    scale, shift = norm.scale_and_shift()
    return scaled(conv.weight.detach(), scale, like), shift.to(like.dtype)


def _ending(norm: nn.Module) -> type[nn.Module] | None:
    """The class of what follows scale and shift in a frozen norm, or is left of the norm by folding.

    None where someone watches it, so that it must be called.
    """
    if type(norm) in (FrozenBatchNorm2d, nn.Identity):
        return nn.Identity
    if not is_frozen_form(norm):
        return None if is_watched(norm) else type(norm)
    return None if any(map(is_watched, norm.children())) else type(norm.remainder())


def is_frozen_layer(layer: Layer, x: Tensor, *, before_relu: bool = False) -> TypeGuard[FrozenLayer]:
    """Whether nobody would notice that convolution and norm are not called; ``before_relu``: nor a ReLU in the norm.

    In a call that is not seen through (``is_seen_through``).
    """
    conv, norm = layer
    if type(conv) is not nn.Conv2d or not isinstance(norm, FrozenBatchNorm2d):  # a parametrized one is of another class
        return False
    weight = conv.weight
    return (
        conv.bias is None
        and type(weight) in (Tensor, nn.Parameter)
        and (x.dtype == weight.dtype or is_autocast(x))
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and not is_watched(conv)
        and not is_watched(norm)
        and _ending(norm) in ((nn.Identity, nn.ReLU) if before_relu else (nn.Identity,))
    )


def _folded(conv: nn.Conv2d, norm: FrozenBatchNorm2d, x: Tensor) -> tuple[Tensor, Tensor]:
    """The folded weight and bias, for images of any size."""

    def compute() -> tuple[Tensor, ...]:
        weight, bias = fold(conv, norm, x)
        return weight if x.device.type == "cpu" else pack(weight, Geometry.of(conv), x), bias

    weight, bias = unless_changed([norm], [conv.weight], ("fold", x.dtype), compute)
    return weight, bias
