"""Convolution, frozen norm, residual and ReLU as one operation: why we are fast.

A frozen norm is a constant scale and shift per channel, so ``conv(x, w) * scale + shift = conv(x, w * scale) + shift``:
it never needs a pass over activations. ``conv_norm_act`` picks, per call,

* plain PyTorch where the norm trains, the call is being traced, or someone watches (hooks, dispatch modes);
* where a gradient is needed, ``_FoldedConvolution``: it folds the scale into the weight and rebuilds the product in
  backward, so that nothing is saved but the input, the output, the raw weight and the scale;
* otherwise one fused kernel (kernels.py) on folded weights that are cached and never stale.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode

from backbone.kept import unless_changed
from backbone.kernels import Geometry, conv_bias_act, pack
from backbone.norm import FrozenBatchNorm2d


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
    if not isinstance(conv, nn.Conv2d) or not isinstance(norm, FrozenBatchNorm2d) or not _fusable(x, conv, norm):
        out: Tensor = norm(conv(x))
        if residual is not None:
            out = out + residual
        return F.relu(out, inplace=True) if relu else out
    dtype = _compute_dtype(x)
    x = x.to(dtype)
    residual = residual if residual is None else residual.to(dtype)
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, conv.weight, residual)
    ):
        scale, shift = _scale_and_shift(norm, dtype)
        arguments = (x, conv.weight, scale, shift, residual, relu, Geometry.of(conv))
        return _FoldedConvolution.apply(*arguments)  # type: ignore[no-any-return]
    weight, bias = _folded(conv, norm, x)
    return conv_bias_act(x, weight, bias, Geometry.of(conv), residual, relu=relu, reuse_residual=reuse_residual)


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
        self.stride, self.padding, self.dilation, _ = Geometry.of(conv)
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias: nn.Parameter = nn.Parameter(bias.detach(), requires_grad=False)
        self._packed: tuple[int, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, C_in, H, W) -> (N, C_out, H_out, W_out)."""
        return self.fused(x)

    def fused(
        self, x: Tensor, residual: Tensor | None = None, *, relu: bool = False, reuse_residual: bool = False
    ) -> Tensor:
        """Return ``relu(conv(x) + bias + residual)`` in the dtype of the weight; arguments as ``conv_norm_act``."""
        x = x.to(self.weight.dtype)
        if _is_seen_through(x) or (torch.is_grad_enabled() and x.requires_grad):
            out = F.conv2d(x, self.weight, self.bias, *Geometry.of(self))
            out = out if residual is None else out + residual
            return F.relu(out) if relu else out
        if self._packed is None or self._packed[0] != self.weight._version:
            with torch.inference_mode(False), torch.no_grad():
                self._packed = self.weight._version, pack(self.weight, Geometry.of(self), x)
        weight, geometry = self._packed[1], Geometry.of(self)
        return conv_bias_act(x, weight, self.bias, geometry, residual, relu=relu, reuse_residual=reuse_residual)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._packed = None
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        self._packed = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}  # a packed weight can be neither copied nor pickled


class _FoldedConvolution(torch.autograd.Function):
    """``relu(conv(x, weight * scale) + shift + residual)`` that saves no folded weight and no extra activation.

    ``scale`` and ``shift`` are constants. The output is saved for the ReLU's mask; the next layer saves it as its
    input anyway.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        shift: Tensor,
        residual: Tensor | None,
        relu: bool,
        geometry: Geometry,
    ) -> Tensor:
        folded = _scaled(weight, scale, x.dtype, _memory_format(x))
        out = conv_bias_act(x, folded, shift, geometry, residual, relu=relu)
        ctx.relu, ctx.geometry = relu, geometry
        ctx.save_for_backward(x, weight, scale, out if relu else None)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        x, weight, scale, out = ctx.saved_tensors
        if ctx.relu:
            grad = torch.ops.aten.threshold_backward(grad, out, 0)
        needs_x, needs_weight, _, _, needs_residual, *_ = ctx.needs_input_grad
        layout = _memory_format(x)
        grad = grad.contiguous(memory_format=layout)
        grad_x = grad_weight = None
        if needs_x or needs_weight:
            stride, padding, dilation, groups = ctx.geometry
            folded = _scaled(weight, scale, x.dtype, layout)
            where = (stride, padding, dilation, False, (0, 0), groups)
            grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
                grad, x, folded, None, *where, (needs_x, needs_weight, False)
            )
        if grad_weight is not None:
            grad_weight = _scaled(grad_weight, scale, weight.dtype)
        return grad_x, grad_weight, None, None, grad if needs_residual else None, None, None


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


def _autocasts(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64


def _fusable(x: Tensor, conv: nn.Conv2d, norm: nn.Module) -> bool:
    """Whether nobody would notice that ``conv`` and ``norm`` are not called."""
    return (
        type(conv) is nn.Conv2d  # a parametrized convolution is of another class
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
        or _get_current_dispatch_mode() is not None
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

    def compute() -> tuple[Tensor, Tensor]:
        weight, bias = fold(conv, norm, x.dtype)
        return pack(weight, Geometry.of(conv), x), bias

    return unless_changed(("fold", x.dtype), norm, (conv.weight, *_constants_of(norm)), compute)


def _scale_and_shift(norm: FrozenBatchNorm2d, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The norm's scale, and its shift in ``dtype``."""

    def compute() -> tuple[Tensor, Tensor]:
        scale, shift = norm.scale_and_shift()
        return scale, shift.to(dtype)

    return unless_changed(("scale", dtype), norm, _constants_of(norm), compute)


def _constants_of(norm: FrozenBatchNorm2d) -> tuple[Tensor, ...]:
    return norm.weight, norm.bias, norm.running_mean, norm.running_var
