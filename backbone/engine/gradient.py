"""Layers with fixed statistics where a gradient is needed: one autograd node per block, which keeps no folded weight.

Autograd on its own would save a copy of every folded weight, or an activation more per norm. Here the product of weight
and scale is made in forward, dropped, and made again in backward; the gradient of the weight is that of the product
times the scale. Where scale and shift train (``norm: bn_eval``), no norm's input is kept for them either. The gradient
of a channel's scale is that of the product times the weight, summed; that of its shift is the output's, summed.
Where autograd would refuse a norm edited in place between forward and backward, the gradients are the forward's.
"""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone.bn_eval import EvalBatchNorm2d
from backbone.engine.cached import unless_changed
from backbone.engine.calls import is_transformed
from backbone.engine.finite import is_finite
from backbone.engine.kernels import Geometry, conv_bias_act
from backbone.engine.products import conv_backward, convolve
from backbone.engine.torch_internals import convolution_backward, is_batched, threshold_backward
from backbone.norm import FrozenBatchNorm2d

CONSTANTS: Final = "scales and shifts"
_PRODUCTS: Final = 2**20
"""Numbers of weights multiplied by their gradients at a time."""
FixedLayer: TypeAlias = tuple[nn.Conv2d, FrozenBatchNorm2d | EvalBatchNorm2d]
"""A convolution and its norm, whose statistics are fixed."""


def with_gradient(
    x: Tensor,
    residual: Tensor | None,
    layers: Sequence[FixedLayer],
    shortcut: Sequence[FixedLayer] | None,
    *,
    relu: bool = True,
) -> Tensor | None:
    """Run layers, with a ReLU after each, as one autograd node.

    Args:
        x: Features (N, C_in, H, W), in the dtype to compute in.
        residual: Added before the last ReLU.
        layers: The convolutions and their norms, in order.
        shortcut: What is added instead, computed from ``x``: by one layer, or ``x`` itself where there is none;
            None where nothing is.
        relu: Whether a ReLU follows the last layer.

    Returns:
        Features; None where a weight or a norm is not finite.
    """
    everything = [*layers, *(shortcut or ())]
    weights = [conv.weight for conv, _ in everything]
    constants, trained = _scales_and_shifts([norm for _, norm in everything], x.dtype)
    if constants is None or not is_finite(*weights):
        return None
    plan = _Plan(
        geometries=tuple(Geometry.of(conv) for conv, _ in layers),
        projection=Geometry.of(shortcut[0][0]) if shortcut else None,
        adds_input=shortcut is not None and not shortcut,
        relu=relu,
    )
    return _FoldedLayers.apply(plan, constants, x, residual, *weights, *trained)  # type: ignore[no-any-return]


def _scales_and_shifts(
    norms: Sequence[FrozenBatchNorm2d | EvalBatchNorm2d], dtype: torch.dtype
) -> tuple[tuple[Tensor, ...] | None, tuple[Tensor, ...]]:
    """Return all scales and then all shifts: as constants, which are kept, or else, if one of them trains, as it is.

    None in place of constants says that one of all is not finite.
    """
    frozen = [norm for norm in norms if isinstance(norm, FrozenBatchNorm2d)]

    def compute() -> tuple[Tensor, ...]:
        pairs = [norm.scale_and_shift() for norm in norms]
        finite = torch.tensor(is_finite(*(constant for pair in pairs for constant in pair)), device="cpu")
        return (finite, *(scale for scale, _ in pairs), *(shift.to(dtype) for _, shift in pairs))

    if len(frozen) == len(norms):
        finite, *constants = unless_changed(frozen, (), CONSTANTS, (dtype, len(norms)), compute)
        return tuple(constants) if finite else None, ()
    scales, shifts = zip(*[norm.scale_and_shift() for norm in norms], strict=True)
    return () if is_finite(*scales, *shifts) else None, (*scales, *shifts)


class _Plan(NamedTuple):
    """The shape of one autograd node: its layers, and what is added before the last ReLU."""

    geometries: tuple[Geometry, ...]
    projection: Geometry | None
    adds_input: bool
    relu: bool

    @property
    def num_layers(self) -> int:
        """Number of convolutions, that of the shortcut among them."""
        return len(self.geometries) + (self.projection is not None)


class _FoldedLayers(torch.autograd.Function):
    """Convolutions with fixed norms, a shortcut and ReLUs, saving no folded weight and no extra activation.

    Scales and shifts are constants or, where norms train, inputs behind the weights. What is saved is each
    convolution's input and the output (for the ReLU's mask; the next node saves it as its input anyway) and the raw
    weights. Where a second derivative may follow (``create_graph=True``), or gradients come in batches, backward goes
    through operations that allow it.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        plan: _Plan,
        constants: tuple[Tensor, ...],
        x: Tensor,
        residual: Tensor | None,
        *tensors: Tensor,
    ) -> Tensor:
        count = plan.num_layers
        weights, trained = tensors[:count], tensors[count:]
        scales, shifts = _halves(trained or constants)
        last = len(plan.geometries) - 1
        inputs = [x]
        for index in range(last):
            inputs.append(_layer(inputs[-1], weights[index], scales[index], shifts[index], plan.geometries[index]))
        if plan.projection:
            residual = _layer(x, weights[-1], scales[-1], shifts[-1], plan.projection, relu=False)
        out = _layer(
            inputs[-1], weights[last], scales[last], shifts[last], plan.geometries[last],
            x if plan.adds_input else residual, relu=plan.relu, reuse_residual=plan.projection is not None,
        )  # fmt: skip
        ctx.plan, ctx.constants = plan, constants  # kept anyway, between the steps as well
        ctx.save_for_backward(*tensors, *inputs, out if plan.relu else None)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        plan, (_, _, needs_x, needs_residual, *needs) = ctx.plan, ctx.needs_input_grad
        count, saved = plan.num_layers, ctx.saved_tensors
        weights, trained, inputs, out = saved[:count], saved[count : len(needs)], saved[len(needs) : -1], saved[-1]
        factors = trained or ctx.constants
        if torch.is_grad_enabled() or is_transformed() or is_batched(grad):
            first, second, *others = _plain_backward(plan, factors, inputs[0], weights, out, grad)
            return None, None, first, second if needs_residual else None, *others[: len(needs)]
        scales, _ = _halves(factors)
        needs_weights = needs[:count]
        needs_scales, needs_shifts = _halves(needs[count:] or [False] * (2 * count))
        needs_any = list(map(any, zip(needs_weights, needs_scales, needs_shifts, strict=True)))
        layout = _memory_format(inputs[0])
        grads: list[Tensor | None] = [None] * len(needs)

        def through(
            index: int, grad: Tensor, x: Tensor, geometry: Geometry, needs_x: bool, onto: Tensor | None = None
        ) -> Tensor | None:
            """Take ``grad`` back through layer ``index``, add it to ``onto``, and keep what its parameters get."""
            weight, scale, needs_weight = weights[index], scales[index], needs_weights[index]
            if needs_shifts[index]:
                grads[2 * count + index] = _sum_of_pixels(grad, scale.dtype)
            if not (needs_x or needs_weight or needs_scales[index]):
                return onto
            late = not needs_scales[index] and _scales_late(weight, grad.numel() // grad.shape[1])
            if late:
                grad = (grad * scale.view(-1, 1, 1)).to(grad.dtype)
            factor = weight.to(x.dtype, memory_format=layout) if late or not needs_x else scaled(weight, scale, x)
            grad_x, grad_weight = conv_backward(
                grad, x, factor, geometry, needs_x=needs_x, needs_weight=needs_weight or needs_scales[index], onto=onto
            )
            if grad_weight is not None and needs_scales[index]:
                grad_weight = grad_weight.to(scale.dtype)
                grads[count + index] = _products_by_channel(grad_weight, weight)
            if grad_weight is not None and needs_weight:
                dtype = weight.dtype
                grad_weight = grad_weight.to(dtype) if late else _scaled_gradient(grad_weight, scale, dtype)
                if weight.shape[2:] == (1, 1) and grad_weight.stride()[:2] == weight.stride()[:2]:
                    # the same memory under the weight's own strides: DistributedDataParallel copies what differs
                    grad_weight = grad_weight.as_strided(weight.shape, weight.stride())
                grads[index] = grad_weight
            return grad_x

        if plan.relu:
            grad = threshold_backward(grad, out, 0)
        at_end: Tensor = grad.contiguous(memory_format=layout)
        current: Tensor | None = at_end
        for index in reversed(range(len(plan.geometries))):
            x, needs_input = inputs[index], needs_x or any(needs_any[:index])
            if current is None or not (needs_input or needs_any[index]):
                current = None
                break
            current = through(index, current, x, plan.geometries[index], needs_input)
            if current is not None and index > 0:
                threshold_backward.grad_input(current, x, 0, grad_input=current)
        grad_x = current if needs_x else None
        if plan.projection and (needs_x or needs_any[-1]):
            grad_x = through(count - 1, at_end, inputs[0], plan.projection, needs_x, onto=grad_x)
        elif plan.adds_input and grad_x is not None:
            grad_x += at_end
        return None, None, grad_x, at_end if needs_residual else None, *grads


Half = TypeVar("Half")


def _halves(values: Sequence[Half]) -> tuple[Sequence[Half], Sequence[Half]]:
    """Return what concerns scales, and what concerns shifts."""
    half = len(values) // 2
    return values[:half], values[half:]


def _sum_of_pixels(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, C, H, W) -> (C,) in ``dtype``: the gradient of what is added to every pixel."""
    if grad.device.type == "cpu" and grad.dtype == torch.bfloat16:  # which torch adds up slowly there
        rows = grad.permute(0, 2, 3, 1).reshape(-1, grad.shape[1])
        return torch.mm(rows.new_ones(1, len(rows)), rows)[0].to(dtype)
    return grad.sum((0, 2, 3), dtype=dtype)


def _products_by_channel(grad: Tensor, weight: Tensor) -> Tensor:
    """Return ``(grad * weight).sum((1, 2, 3))``, (C_out,), a few channels at a time: the products stay in the cache."""
    channels = max(1, _PRODUCTS // weight[0].numel())
    parts = zip(torch.split(grad, channels), torch.split(weight, channels), strict=True)
    return torch.cat([(of_grad * of_weight).sum((1, 2, 3)) for of_grad, of_weight in parts])


def _plain_backward(
    plan: _Plan,
    factors: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    out: Tensor | None,
    grad: Tensor,
) -> tuple[Tensor, ...]:
    """Return the gradients by operations that can be differentiated again and batched.

    Those of x, residual, weights, scales and shifts. Each is a formula of ``x``, the weights, scales, shifts and
    ``grad``, whatever made these: ``x`` may depend on the same weights.
    """
    scales, shifts = _halves(factors)
    folded = [(w * scale.view(-1, 1, 1, 1)).to(x.dtype) for w, scale in zip(weights, scales, strict=True)]
    inputs = [x]
    for index, geometry in enumerate(plan.geometries[:-1]):
        inputs.append(F.relu(F.conv2d(inputs[-1], folded[index], shifts[index].to(x.dtype), *geometry)))
    at_end = grad if out is None else grad * (out > 0)  # the ReLU, whose mask holds the residual's part as well
    of_weights: list[Tensor] = [x] * len(weights)
    of_scales, of_shifts = list(scales), list(shifts)

    def through(index: int, grad: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
        stride, padding, dilation, groups = geometry
        needs = (True, True, False)
        of_x, of_folded, _ = convolution_backward(
            grad, x, folded[index], None, stride, padding, dilation, False, (0, 0), groups, needs
        )
        weight, scale = weights[index], scales[index]
        of_weights[index] = (of_folded * scale.view(-1, 1, 1, 1)).to(weight.dtype)
        of_scales[index] = (of_folded * weight).sum((1, 2, 3)).to(scale.dtype)
        of_shifts[index] = grad.sum((0, 2, 3)).to(scale.dtype)
        return of_x  # type: ignore[no-any-return]

    current = at_end
    for index in reversed(range(len(plan.geometries))):
        current = through(index, current, inputs[index], plan.geometries[index])
        current = current * (inputs[index] > 0) if index else current
    if plan.projection:
        current = current + through(len(weights) - 1, at_end, x, plan.projection)
    elif plan.adds_input:
        current = current + at_end
    return current, at_end, *of_weights, *of_scales, *of_shifts


def _layer(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    geometry: Geometry,
    residual: Tensor | None = None,
    *,
    relu: bool = True,
    reuse_residual: bool = False,
) -> Tensor:
    """Return ``relu(conv(x, weight) * scale + shift + residual)`` in the dtype of ``x``."""
    shift = shift.to(x.dtype)
    height, width = (-(-size // step) for size, step in zip(x.shape[2:], geometry.stride, strict=True))
    if not _scales_late(weight, x.shape[0] * height * width):
        folded = scaled(weight, scale, x)
        return conv_bias_act(x, folded, shift, geometry, residual, relu=relu, reuse_residual=reuse_residual)
    raw = convolve(x, weight.to(x.dtype, memory_format=_memory_format(x)), geometry)
    out = torch.addcmul(shift.view(-1, 1, 1), raw, scale.view(-1, 1, 1))
    if residual is not None:
        out += residual
    return (out.relu_() if relu else out).to(x.dtype)


def _scales_late(weight: Tensor, pixels: int) -> bool:
    """Whether a channel's output of so many pixels is quicker to scale than the channel's weight, on the CPU."""
    return weight.device.type == "cpu" and weight.numel() > pixels * weight.shape[0]


def scaled(weight: Tensor, scale: Tensor, like: Tensor) -> Tensor:
    """Return ``weight * scale`` per output channel, rounded once to the dtype and in the layout of ``like``."""
    factor, layout = scale.view(-1, 1, 1, 1), _memory_format(like)
    if weight.dtype == like.dtype == scale.dtype and weight.is_contiguous(memory_format=layout):
        return weight * factor
    if weight.device.type == "cpu" and weight.dtype != like.dtype:  # where an ``out`` of another dtype takes a detour
        return (weight * factor).to(like.dtype, memory_format=layout)
    return torch.mul(weight, factor, out=torch.empty_like(weight, dtype=like.dtype, memory_format=layout))


def _scaled_gradient(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``grad * scale`` per output channel, for a gradient that nobody else needs."""
    factor = scale.view(-1, 1, 1, 1)
    if grad.device.type == "cpu" and dtype == scale.dtype:
        return grad.to(dtype).mul_(factor)
    return (grad * factor).to(dtype)


def _memory_format(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format
