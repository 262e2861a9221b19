"""Convolution, frozen norm, residual and ReLU as one operation: why we are fast.

A frozen norm is a constant scale and shift per channel, so ``conv(x, w) * scale + shift = conv(x, w * scale) + shift``:
it never needs a pass over activations. ``conv_norm_act`` picks, per call,

* plain PyTorch where the norm trains, the call is being traced, or someone watches (hooks, dispatch modes);
* where a gradient is needed, ``_FoldedConvolution``: it folds the scale into the weight and rebuilds the product in
  backward, so that nothing is saved but the input, the output, the raw weight and the scale;
* otherwise one fused kernel (kernels.py) on folded weights that are cached and never stale.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self, TypeAlias, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from backbone.kept import unless_changed
from backbone.kernels import Geometry, conv_backward, conv_bias_act, pack
from backbone.norm import FrozenBatchNorm2d

Layer: TypeAlias = tuple[nn.Module, nn.Module]
"""A convolution and its norm."""

FrozenLayer: TypeAlias = tuple[nn.Conv2d, FrozenBatchNorm2d]


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
        norm: Its norm, C_out channels.
        residual: Added before the ReLU, shaped like the result.
        relu: Whether a ReLU ends the operation.
        reuse_residual: Whether nobody needs ``residual`` any more, so that the result may take its memory.

    Returns:
        Features (N, C_out, H_out, W_out) in the dtype of the convolution's output.
    """
    if isinstance(conv, FoldedConv2d) and isinstance(norm, nn.Identity):
        return conv.fused(x, residual, relu=relu, reuse_residual=reuse_residual)
    layer = (conv, norm)
    if not _is_fusable(layer, x):
        out: Tensor = norm(conv(x))
        if residual is not None:
            out = out + residual
        return F.relu(out, inplace=True) if relu else out
    x = x.to(_compute_dtype(x))
    residual = residual if residual is None else residual.to(x.dtype)
    if _needs_grad(x, layer[0].weight, residual):
        return _with_gradient(x, residual, [layer], None, relu=relu)
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
    checked = (*layers, *shortcut) if torch.is_grad_enabled() and not watched else ()
    frozen = [layer for layer in checked if _is_fusable(layer, x)]
    if len(frozen) == len(layers) + len(shortcut):
        x = x.to(_compute_dtype(x))
        if _needs_grad(x, *(conv.weight for conv, _ in frozen)):
            return _with_gradient(x, None, frozen[: len(layers)], frozen[len(layers) :])
    out = x
    for conv, norm in layers[:-1]:
        out = conv_norm_act(out, conv, norm)
    conv, norm = layers[-1]
    if projection is None:
        return conv_norm_act(out, conv, norm, x, reuse_residual=reuse_input)
    unseen = not any(is_watched(module) for module in projection.modules())
    return conv_norm_act(out, conv, norm, projection(x), reuse_residual=unseen)


def fold(conv: nn.Conv2d, norm: FrozenBatchNorm2d, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the weight (C_out, C_in / groups, kh, kw) and bias (C_out,) of ``norm(conv(x))`` as one convolution."""
    scale, shift = norm.scale_and_shift()
    return _scaled(conv.weight.detach(), scale, dtype), shift.to(dtype)


class FoldedConv2d(nn.Conv2d):
    """A convolution that carries its norm in weight and bias, for inference.

    ``optimize_for_inference`` puts it where a convolution was; the norm after it becomes an Identity.

    Args:
        conv: The convolution to replace.
        weight: Its weight times the norm's scale.
        bias: The norm's shift.
    """

    def __init__(self, conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
        super().__init__(conv.in_channels, conv.out_channels, 1, groups=conv.groups, device="meta")
        self.kernel_size, self.padding_mode = conv.kernel_size, conv.padding_mode
        self.geometry = Geometry.of(conv)
        self.stride, self.padding, self.dilation, _ = self.geometry
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = nn.Parameter(bias.detach(), requires_grad=False)
        self._packed: tuple[int, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, C_in, H, W) -> (N, C_out, H_out, W_out)."""
        return self.fused(x)

    def fused(
        self, x: Tensor, residual: Tensor | None = None, *, relu: bool = False, reuse_residual: bool = False
    ) -> Tensor:
        """Return ``relu(conv(x) + bias + residual)`` in the dtype of the weight; arguments as ``conv_norm_act``."""
        weight, bias = self._parameters["weight"], self._parameters["bias"]  # 106 look-ups a pass: the short way
        assert weight is not None
        assert bias is not None
        if x.dtype != weight.dtype:
            x = x.to(weight.dtype)
        if _is_seen_through(x) or (x.requires_grad and torch.is_grad_enabled()):
            out = F.conv2d(x, weight, bias, *self.geometry)
            out = out if residual is None else out + residual
            return F.relu(out) if relu else out
        if self._packed is None or self._packed[0] != weight._version:
            with torch.inference_mode(False), torch.no_grad():
                self._packed = weight._version, pack(weight, self.geometry, x)
        packed = self._packed[1]
        return conv_bias_act(x, packed, bias, self.geometry, residual, relu=relu, reuse_residual=reuse_residual)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._packed = None
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        self._packed = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}  # a packed weight can be neither copied nor pickled


def _with_gradient(
    x: Tensor,
    residual: Tensor | None,
    layers: Sequence[FrozenLayer],
    shortcut: Sequence[FrozenLayer] | None,
    *,
    relu: bool = True,
) -> Tensor:
    """Run layers, and a block's shortcut where there is one (empty for the identity), as one autograd node."""
    everything = [*layers, *(shortcut or ())]
    norms = [norm for _, norm in everything]

    def compute() -> tuple[Tensor, ...]:
        pairs = [norm.scale_and_shift() for norm in norms]
        return (*(scale for scale, _ in pairs), *(shift.to(x.dtype) for _, shift in pairs))

    constants = unless_changed(norms, (), ("scales and shifts", x.dtype, len(norms)), compute)
    plan = _Plan(
        geometries=tuple(Geometry.of(conv) for conv, _ in layers),
        projection=Geometry.of(shortcut[0][0]) if shortcut else None,
        adds_input=shortcut is not None and not shortcut,
        relu=relu,
    )
    weights = [conv.weight for conv, _ in everything]
    return _FoldedLayers.apply(plan, constants, x, residual, *weights)  # type: ignore[no-any-return]


class _Plan(NamedTuple):
    """The shape of one autograd node: its layers, and what is added before the last ReLU."""

    geometries: tuple[Geometry, ...]
    projection: Geometry | None
    adds_input: bool
    relu: bool


class _FoldedLayers(torch.autograd.Function):
    """Convolutions with frozen norms, a shortcut and ReLUs, saving no folded weight and no extra activation.

    Scales and shifts are constants. What is saved is each convolution's input and the output (for the ReLU's mask; the
    next node saves it as its input anyway), the raw weights and the scales.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        plan: _Plan,
        constants: tuple[Tensor, ...],
        x: Tensor,
        residual: Tensor | None,
        *weights: Tensor,
    ) -> Tensor:
        scales, shifts = constants[: len(weights)], constants[len(weights) :]
        layout = _memory_format(x)
        folded = [_scaled(w, scale, x.dtype, layout) for w, scale in zip(weights, scales, strict=True)]
        inputs = [x]
        for weight, shift, geometry in zip(folded, shifts, plan.geometries[:-1], strict=False):
            inputs.append(conv_bias_act(inputs[-1], weight, shift, geometry))
        if plan.projection:
            residual = conv_bias_act(x, folded[-1], shifts[-1], plan.projection, relu=False)
        last = len(plan.geometries) - 1
        out = conv_bias_act(
            inputs[-1], folded[last], shifts[last], plan.geometries[last],
            x if plan.adds_input else residual, relu=plan.relu, reuse_residual=plan.projection is not None,
        )  # fmt: skip
        ctx.plan = plan
        ctx.save_for_backward(*weights, *scales, *inputs, out if plan.relu else None)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        plan, (_, _, needs_x, needs_residual, *needs_weights) = ctx.plan, ctx.needs_input_grad
        count = len(needs_weights)
        saved = ctx.saved_tensors
        weights, scales, inputs, out = saved[:count], saved[count : 2 * count], saved[2 * count : -1], saved[-1]
        layout = _memory_format(inputs[0])
        grads: list[Tensor | None] = [None] * count

        def through(index: int, grad: Tensor, x: Tensor, geometry: Geometry, needs_x: bool) -> Tensor | None:
            """Take ``grad`` back through convolution ``index``, keeping its weight's gradient."""
            folded = _scaled(weights[index], scales[index], x.dtype, layout) if needs_x else weights[index].to(x.dtype)
            needs_weight = needs_weights[index]
            grad_x, grad_weight = conv_backward(grad, x, folded, geometry, needs_x=needs_x, needs_weight=needs_weight)
            if grad_weight is not None:
                grads[index] = _scaled(grad_weight, scales[index], weights[index].dtype)
            return grad_x

        if plan.relu:
            grad = torch.ops.aten.threshold_backward(grad, out, 0)
        at_end: Tensor = grad.contiguous(memory_format=layout)
        current: Tensor | None = at_end
        for index in reversed(range(len(plan.geometries))):
            if current is None:
                break
            x, needs_input = inputs[index], needs_x or any(needs_weights[:index])
            if needs_input or needs_weights[index]:
                current = through(index, current, x, plan.geometries[index], needs_input)
            if current is not None and index > 0:
                current = torch.ops.aten.threshold_backward(current, x, 0)
        grad_x = current if needs_x else None
        if plan.projection and (needs_x or needs_weights[-1]):
            grad_shortcut = through(count - 1, at_end, inputs[0], plan.projection, needs_x)
        else:
            grad_shortcut = at_end if plan.adds_input else None
        if grad_x is not None and grad_shortcut is not None:
            grad_x = grad_x + grad_shortcut
        return None, None, grad_x, at_end if needs_residual else None, *grads


def _scaled(
    weight: Tensor, scale: Tensor, dtype: torch.dtype, memory_format: torch.memory_format = torch.preserve_format
) -> Tensor:
    """Scale each output channel in the better of the dtypes and round once to ``dtype``, in one pass."""
    scale = scale[:, None, None, None]
    if torch.is_grad_enabled():  # a second derivative is wanted
        return (weight * scale).to(dtype, memory_format=memory_format)
    return torch.mul(weight, scale, out=torch.empty_like(weight, dtype=dtype, memory_format=memory_format))


def _memory_format(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype a convolution of ``x`` runs in: autocast's, where it is on."""
    return torch.get_autocast_dtype(x.device.type) if _autocasts(x) else x.dtype


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _autocasts(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64


def _is_fusable(layer: Layer, x: Tensor) -> TypeGuard[FrozenLayer]:
    """Whether nobody would notice that convolution and norm are not called."""
    conv, norm = layer
    return (
        type(conv) is nn.Conv2d  # a parametrized convolution is of another class
        and isinstance(norm, FrozenBatchNorm2d)
        and not _is_seen_through(x)
        and conv.bias is None
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and (x.dtype == conv.weight.dtype or _autocasts(x))
        and type(conv.weight) in (Tensor, nn.Parameter)
        and not is_watched(conv)
        and not is_watched(norm)
    )


def _is_seen_through(x: Tensor) -> bool:
    """Whether the call is traced, transformed or counted, or ``x`` is of a kind that no kernel takes."""
    return (
        torch.compiler.is_compiling()
        or type(x) not in (Tensor, nn.Parameter)
        or x.device.type not in ("cpu", "cuda")
        or x.numel() == 0
        or bool(torch._C._get_tracing_state())
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
    )


def is_watched(module: nn.Module) -> bool:
    """Whether a hook would see this module's inputs or outputs."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()  # type: ignore[no-untyped-call]
    )


def _folded(conv: nn.Conv2d, norm: FrozenBatchNorm2d, x: Tensor) -> tuple[Tensor, Tensor]:
    """The folded weight, packed for inputs like ``x``, and the bias."""

    def compute() -> tuple[Tensor, ...]:
        weight, bias = fold(conv, norm, x.dtype)
        return pack(weight, Geometry.of(conv), x), bias

    weight, bias = unless_changed([norm], [conv.weight], ("fold", x.dtype), compute)
    return weight, bias
