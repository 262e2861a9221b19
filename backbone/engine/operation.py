"""Convolution, frozen norm, residual and ReLU as one operation: why we are fast.

A norm with fixed statistics is a scale and a shift per channel: ``conv(x, w) * scale + shift`` equals
``conv(x, w * scale) + shift``. It never needs a pass over activations. ``decide`` answers, once per call of a block,
which way it goes:

* PLAIN where a norm's statistics move, the call is traced, somebody watches or ``x`` is not finite: the modules are
  called;
* GRADIENT where a gradient is needed: one autograd node that saves no folded weight (gradient.py);
* FUSED where none is and norms are frozen: one kernel a layer (kernels.py), on folded weights that are never out of
  date (cached.py);
* FOLDED in an inference copy: one kernel a layer, on the layers' own weights (folded.py).

The functions return None for PLAIN: the caller, an ordinary ``forward``, then calls its modules.
"""

import enum
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from backbone.bn_eval import EvalBatchNorm2d
from backbone.engine import torch_internals
from backbone.engine.cached import drop, unless_changed
from backbone.engine.calls import (
    compute_dtype,
    has_hook,
    has_hook_within,
    is_autocast,
    is_plain,
    is_traced,
    needs_grad,
)
from backbone.engine.finite import is_finite
from backbone.engine.folded import FoldedConv2d
from backbone.engine.gradient import scaled, with_gradient
from backbone.engine.kernels import Geometry, conv_bias_act, pack
from backbone.engine.known import Layer, is_block, parts_of, runs_in_order
from backbone.norm import FrozenBatchNorm2d, is_frozen_form

FOLDED_WEIGHT: Final = "folded weight"


class Path(enum.Enum):
    """How a block, or a layer, is computed."""

    PLAIN = enum.auto()
    GRADIENT = enum.auto()
    FUSED = enum.auto()
    FOLDED = enum.auto()


class _Folded(NamedTuple):
    """A convolution that carries its norm.

    Attributes:
        weight: (C_out, C_in / groups, kh, kw), perhaps packed for its kernel.
        bias: (C_out,).
        finite: Whether both are, a truth on the CPU.
    """

    weight: Tensor
    bias: Tensor
    finite: Tensor


def decide(x: Tensor, layers: Sequence[Layer], activations: Sequence[nn.Module], *, ends_in_act: bool = False) -> Path:
    """Return how ``layers`` are to be computed for an ``x`` that is not traced.

    Args:
        x: Features (N, C_in, H, W).
        layers: Convolutions and their norms.
        activations: What follows them.
        ends_in_act: Whether a ReLU inside of the norm may be taken along.
    """
    for activation in activations:
        if type(activation) is not nn.ReLU or has_hook(activation):
            return Path.PLAIN
    is_folded = type(layers[0][0]) is FoldedConv2d
    is_known = _is_folded if is_folded else _is_fixed
    if not all(is_known(conv, norm, x, ends_in_act) for conv, norm in layers):
        return Path.PLAIN
    if not is_finite(x):
        return Path.PLAIN
    if is_folded:
        return Path.FOLDED if all(conv.is_finite() for conv, _ in layers) else Path.PLAIN  # type: ignore[operator]
    trained = [norm for _, norm in layers if type(norm) is EvalBatchNorm2d]
    affine = [parameter for norm in trained for parameter in (norm.weight, norm.bias)]
    if not needs_grad(x, *[conv.weight for conv, _ in layers], *affine):  # type: ignore[arg-type]
        return Path.PLAIN if trained else Path.FUSED
    return Path.GRADIENT if torch_internals.HAS_GRADIENT else Path.PLAIN


def conv_norm_act(
    x: Tensor,
    conv: nn.Module,
    norm: nn.Module,
    residual: Tensor | None = None,
    act: nn.Module | None = None,
    *,
    reuse_residual: bool = False,
) -> Tensor | None:
    """Return ``act(norm(conv(x)) + residual)``; None where these are to be called.

    Args:
        x: Features (N, C_in, H, W).
        conv: The convolution.
        norm: Its norm, C_out channels, which may end in an activation of its own where there is no residual.
        residual: Added before the activation, shaped like the result.
        act: The activation.
        reuse_residual: Whether nobody needs ``residual`` any more, so that the result may take its memory.

    Returns:
        Features (N, C_out, H_out, W_out) in the dtype of the convolution's output.
    """
    if is_traced(x) or (residual is not None and not is_plain(residual)):
        return None
    path = decide(x, ((conv, norm),), () if act is None else (act,), ends_in_act=residual is None)
    if path is Path.FUSED and needs_grad(residual):
        path = Path.GRADIENT if torch_internals.HAS_GRADIENT else Path.PLAIN
    if path is Path.PLAIN or (path is Path.FOLDED and needs_grad(residual)) or not is_finite(residual):
        return None
    relu = act is not None or _ending(norm) is nn.ReLU
    layer = (conv, norm)
    if path is Path.GRADIENT:
        return _with_gradient(x, residual, [layer], None, relu=relu)
    x = x.to(compute_dtype(x)) if path is Path.FUSED else x
    weights = _weights((layer,), x, path)
    if weights is None:
        return None
    return _layer(layer, weights[0], x, residual, relu=relu, reuse_residual=reuse_residual)


def residual_block(block: nn.Module, x: Tensor, *, reuse_input: bool = False) -> Tensor | None:
    """Return ``relu(layers(x) + shortcut(x))`` of a registered block's parts; None where its modules are to be called.

    Args:
        block: The block, perhaps of a subclass whose own ``forward`` calls that of the registered class.
        x: Features (N, C_in, H, W).
        reuse_input: Whether nobody needs ``x`` any more, so that the result may take its memory.
    """
    if is_traced(x):
        return None
    parts = parts_of(block)
    if parts is None:
        return None
    layers, activations, shortcut = parts
    pool, projection = _projection(shortcut)
    everything = layers if projection is None else (*layers, projection)
    path = decide(x, everything, activations)
    ends_like_input = layers[-1][0].out_channels == x.shape[1]
    if path is Path.PLAIN or (projection is None and (shortcut is not None or not ends_like_input)):
        return None
    pooled = x if pool is None else pool(x)
    if path is Path.GRADIENT:
        return _block_with_gradient(x, pooled, layers, projection)
    x = x.to(compute_dtype(x)) if path is Path.FUSED else x
    weights = _weights(everything, x, path)
    if weights is None:
        return None
    residual = x if projection is None else _layer(projection, weights[-1], pooled, relu=False)
    out, last = x, len(layers) - 1
    for layer, weight in zip(layers[:last], weights[:last], strict=True):
        out = _layer(layer, weight, out)
    return _layer(layers[last], weights[last], out, residual, reuse_residual=reuse_input or projection is not None)


def run_blocks(blocks: Iterable[nn.Module], x: Tensor) -> Tensor:
    """Return what ``blocks`` make of ``x`` one after the other.

    A block of a registered class may take its input's memory where that is nothing but the engine's output for the
    block before: nobody else has it. Only the CPU's kernels make use of it, and only where no gradient is needed.
    """
    is_ours = False
    for block in blocks:
        out = None
        if not is_traced(x) and is_block(block):
            out = residual_block(block, x, reuse_input=is_ours and x.device.type == "cpu")
        is_ours = out is not None and not out.requires_grad
        x = block(x) if out is None else out
    return x


def fold(conv: nn.Conv2d, norm: FrozenBatchNorm2d, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight (C_out, C_in / groups, kh, kw) and bias (C_out,) of ``norm(conv(x))``, in the dtype of ``like``."""
    scale, shift = norm.scale_and_shift()
    return scaled(conv.weight.detach(), scale, like), shift.to(like.dtype)


def _projection(shortcut: nn.Module | None) -> tuple[nn.Module | None, Layer | None]:
    """Return a shortcut's pooling, if any, and its convolution and norm; (None, None) where it is another thing."""
    if shortcut is None or not runs_in_order(shortcut) or has_hook(shortcut):
        return None, None
    match list(shortcut.children()):
        case [conv, norm]:
            return None, (conv, norm)
        case [nn.AvgPool2d() | nn.Identity() as pool, conv, norm] if type(pool) in (nn.AvgPool2d, nn.Identity):
            return pool, (conv, norm)
    return None, None


def _ending(norm: nn.Module) -> type[nn.Module]:
    """The class of what follows scale and shift in a norm, or is left of the norm by folding."""
    if type(norm) is EvalBatchNorm2d:
        return nn.Identity
    return type(norm.remainder()) if isinstance(norm, FrozenBatchNorm2d) else type(norm)


def _is_folded(conv: nn.Module, norm: nn.Module, x: Tensor, ends_in_act: bool) -> bool:
    """Whether nobody would notice that a layer of an inference copy, and the rest of its norm, are not called."""
    rest = (nn.Identity, nn.ReLU) if ends_in_act else (nn.Identity,)
    return (
        type(conv) is FoldedConv2d
        and type(norm) in rest
        and conv.takes(x)
        and not has_hook(conv)
        and not has_hook(norm)
    )


def _is_fixed(conv: nn.Module, norm: nn.Module, x: Tensor, ends_in_act: bool) -> bool:
    """Whether nobody would notice that convolution and norm, and a ReLU in the norm, are not called."""
    if type(conv) is not nn.Conv2d:  # a parametrized one is of another class
        return False
    if not (is_frozen_form(norm) or type(norm) is EvalBatchNorm2d):
        return False
    weight = conv.weight
    return (
        conv.bias is None
        and x.ndim == 4  # noqa: PLR2004
        and weight.device == x.device
        and (x.dtype == weight.dtype or (is_autocast(x) and is_autocast(weight)))
        and all(map(is_plain, (weight, *norm.constants())))
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and not has_hook(conv)
        and not has_hook_within(norm)
        and _ending(norm) in ((nn.Identity, nn.ReLU) if ends_in_act else (nn.Identity,))
    )


def _weights(layers: Sequence[Layer], x: Tensor, path: Path) -> list[_Folded | None] | None:
    """Return what the layers are computed with, FUSED; of a copy, FOLDED, they have it. None where NaN is in it."""
    if path is Path.FOLDED:
        return [None] * len(layers)
    folded = [_folded(conv, norm, x) for conv, norm in layers]  # type: ignore[arg-type]
    return list(folded) if all(each.finite for each in folded) else None


def _layer(
    layer: Layer,
    folded: _Folded | None,
    x: Tensor,
    residual: Tensor | None = None,
    *,
    relu: bool = True,
    reuse_residual: bool = False,
) -> Tensor:
    """Compute a layer, FUSED or FOLDED, by one kernel."""
    conv, _ = layer
    if folded is None:
        assert isinstance(conv, FoldedConv2d)
        return conv.fused(x, residual, relu=relu, reuse_residual=reuse_residual)
    assert isinstance(conv, nn.Conv2d)
    x = x.to(folded.bias.dtype)
    residual = residual if residual is None else residual.to(x.dtype)
    geometry = Geometry.of(conv)
    return conv_bias_act(x, folded.weight, folded.bias, geometry, residual, relu=relu, reuse_residual=reuse_residual)


def _block_with_gradient(x: Tensor, pooled: Tensor, layers: Sequence[Layer], projection: Layer | None) -> Tensor | None:
    """Compute a block as one autograd node; where its shortcut pools, as two. None where weights are not finite."""
    if pooled is x:
        return _with_gradient(x, None, layers, [] if projection is None else [projection])
    assert projection is not None
    residual = _with_gradient(pooled, None, [projection], None, relu=False)
    if residual is None:
        return None
    return _with_gradient(x, residual, layers, None)


def _with_gradient(
    x: Tensor, residual: Tensor | None, layers: Sequence[Layer], shortcut: Sequence[Layer] | None, *, relu: bool = True
) -> Tensor | None:
    """Compute layers as one autograd node; what inference kept of them no longer serves."""
    known: Any = layers, shortcut
    for _, norm in (*layers, *(shortcut or ())):
        if isinstance(norm, FrozenBatchNorm2d):
            drop(norm, FOLDED_WEIGHT)
    x = x.to(compute_dtype(x))
    residual = residual if residual is None else residual.to(x.dtype)
    return with_gradient(x, residual, *known, relu=relu)


def _folded(conv: nn.Conv2d, norm: FrozenBatchNorm2d, x: Tensor) -> _Folded:
    """Return weight and bias for images of any size, in the dtype of ``x``."""

    def compute() -> tuple[Tensor, ...]:
        weight, bias = fold(conv, norm, x)
        finite = torch.tensor(is_finite(weight, bias), device="cpu")
        return weight if x.device.type == "cpu" else pack(weight, Geometry.of(conv), x), bias, finite

    return _Folded(*unless_changed([norm], [conv.weight], FOLDED_WEIGHT, x.dtype, compute))
