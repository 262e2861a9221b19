"""Convolution, frozen norm, residual and ReLU as one operation: why we are fast.

A frozen norm is a constant scale and shift per channel, so ``conv(x, w) * scale + shift = conv(x, w * scale) + shift``:
it never needs a pass over activations. ``conv_norm_act`` picks, per call,

* plain PyTorch where the norm trains, the call is being traced, or someone watches (hooks, dispatch modes), except in
  an inference copy, which has no norm left to call;
* where a gradient is needed, one autograd node that saves no folded weight (gradient.py);
* otherwise one fused kernel (kernels.py) on folded weights that are kept and never stale (kept.py).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, Self, TypeAlias, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from backbone.gradient import FrozenLayer, scaled, with_gradient
from backbone.kept import unless_changed
from backbone.kernels import Geometry, conv_bias_act, has_onednn, layout_depends_on, pack
from backbone.norm import FrozenBatchNorm2d, is_frozen_form
from backbone.products import HAS_LINEAR, linear
from backbone.winograd import WinogradConv, suits

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
    if isinstance(conv, FoldedConv2d) and (isinstance(norm, nn.Identity) or (ends_in_relu and residual is None)):
        return conv.fused(x, residual, relu=relu or ends_in_relu, reuse_residual=reuse_residual)
    layer = (conv, norm)
    if _is_seen_through(x) or not _is_frozen_layer(layer, x, before_relu=residual is None):
        out: Tensor = norm(conv(x))
        if residual is not None:
            out = out + residual
        return F.relu(out, inplace=not is_watched(norm)) if relu else out
    relu = relu or ends_in_relu
    x = x.to(_compute_dtype(x))
    residual = residual if residual is None else residual.to(x.dtype)
    if _needs_grad(x, layer[0].weight, residual):
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
    seen_through = bool(checked) and _is_seen_through(x)
    frozen = [] if seen_through else [layer for layer in checked if _is_frozen_layer(layer, x)]
    if len(frozen) == len(layers) + len(shortcut):
        x = x.to(_compute_dtype(x))
        if _needs_grad(x, *[conv.weight for conv, _ in frozen]):
            return with_gradient(x, None, frozen[: len(layers)], frozen[len(layers) :])
    out = x
    for conv, norm in layers[:-1]:
        out = conv_norm_act(out, conv, norm)
    conv, norm = layers[-1]
    if projection is None:
        return conv_norm_act(out, conv, norm, x, reuse_residual=reuse_input)
    unseen = not any(map(is_watched, projection.modules()))
    return conv_norm_act(out, conv, norm, projection(x), reuse_residual=unseen)


def blocks_in_row(blocks: Iterable[nn.Module], fused: tuple[type[nn.Module], ...], x: Tensor) -> Tensor:
    """Return what ``blocks`` make of ``x`` one after the other.

    Those of the classes ``fused`` are told to reuse their input where it is nothing but the output of another of them:
    nobody else has it, unless someone watches a module of either. Only the CPU's kernel makes use of it, and only where
    no gradient is needed.
    """
    last_was_unseen = False
    for block in blocks:
        is_unseen = (
            not x.requires_grad
            and x.device.type == "cpu"
            and isinstance(block, fused)
            and not any(map(is_watched, block.modules()))
        )
        x = block(x, reuse_input=True) if is_unseen and last_was_unseen else block(x)
        last_was_unseen = is_unseen
    return x


def fold(conv: nn.Conv2d, norm: FrozenBatchNorm2d, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight (C_out, C_in / groups, kh, kw) and bias (C_out,) of ``norm(conv(x))``, in the dtype of ``like``."""
    scale, shift = norm.scale_and_shift()
    return scaled(conv.weight.detach(), scale, like), shift.to(like.dtype)


_PATIENCE: Final = 8  # calls of smaller shapes in a row
_UNPREPARED: Final = {
    "_prepared_shape": None,
    "_prepared_values": None,
    "_prepared_size": 0,
    "_passed_over": 0,
    "_packed": None,
    "_winograd": None,
}


class FoldedConv2d(nn.Conv2d):
    """A convolution that carries its norm in weight and bias, for inference.

    ``optimize_for_inference`` puts it where a convolution was; the norm after it becomes an Identity.

    Args:
        conv: The convolution to replace.
        weight: Its weight times the norm's scale.
        bias: The norm's shift.
    """

    _prepared_shape: object
    _prepared_values: object
    _prepared_size: int
    _passed_over: int
    _packed: Tensor | None
    _winograd: WinogradConv | None

    def __init__(self, conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
        super().__init__(conv.in_channels, conv.out_channels, 1, groups=conv.groups, device="meta")
        self.kernel_size, self.padding_mode = conv.kernel_size, conv.padding_mode
        self.geometry = Geometry.of(conv)
        self.stride, self.padding, self.dilation, _ = self.geometry
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = nn.Parameter(bias.detach(), requires_grad=False)
        self._forget()

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
        autocasts = _autocasts(x) and torch.get_autocast_dtype(x.device.type) != weight.dtype
        if not autocasts and x.dtype != weight.dtype:
            x = x.to(weight.dtype)
        if autocasts or x.ndim != 4 or _is_seen_through(x) or _needs_grad(x, weight, residual):  # noqa: PLR2004
            out = F.conv2d(x, weight, bias, *self.geometry)
            out = out if residual is None else out + residual
            return F.relu(out) if relu else out
        # read once: another thread may prepare for another shape meanwhile
        packed, winograd = (self._packed, self._winograd) if self._prepare_for(x, weight, bias) else (None, None)
        if winograd is not None and residual is None:
            return winograd(x, relu=relu)
        best = weight if packed is None else packed
        return conv_bias_act(x, best, bias, self.geometry, residual, relu=relu, reuse_residual=reuse_residual)

    def _prepare_for(self, x: Tensor, weight: Tensor, bias: Tensor) -> bool:
        """Pack the weight once a shape comes twice, consider Winograd when it comes again; return whether it came.

        Both pay only where shapes repeat; a detector whose images all differ runs on the plain weight. A smaller shape
        takes over only after some calls in a row: a head that all levels of a pyramid share is prepared for the finest.
        """
        shape = layout_depends_on(x)
        values = (
            torch.backends.mkldnn.enabled,
            *((t.data_ptr(), 0 if t.is_inference() else t._version) for t in (weight, bias)),
        )
        came = self._prepared_shape == shape and self._prepared_values == values
        if not came:
            self._passed_over += 1
            is_smaller = x.numel() < self._prepared_size and self._prepared_values == values
            if is_smaller and self._passed_over <= _PATIENCE:
                return False
            self._forget()
            self._prepared_shape, self._prepared_values, self._prepared_size = shape, values, x.numel()
            if x.device.type == "cpu":
                return False
        self._passed_over = 0
        if self._packed is None:
            with torch.inference_mode(False), torch.no_grad():
                self._packed = pack(weight, self.geometry, x)
        elif self._winograd is None and suits(x, weight, self.geometry):
            self._winograd = WinogradConv(weight, bias, x)
        return True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._forget()
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)

    def _forget(self) -> None:
        self.__dict__.update(_UNPREPARED)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, **_UNPREPARED}  # what is prepared can be neither copied nor pickled


class QuickLinear(nn.Linear):
    """A linear layer for inference, which runs by oneDNN where that is the quicker library.

    ``optimize_for_inference`` makes every ``nn.Linear`` one.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        weight, bias = self.weight, self.bias
        plain = not HAS_LINEAR or x.dtype != torch.float32 or weight.dtype != torch.float32 or not has_onednn(x)
        if plain or _autocasts(x) or _is_seen_through(x) or _needs_grad(x, weight, bias):
            return F.linear(x, weight, bias)
        return linear(x, weight, bias)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype a convolution of ``x`` runs in: autocast's, where it is on."""
    return torch.get_autocast_dtype(x.device.type) if _autocasts(x) else x.dtype


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _autocasts(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64


def _ending(norm: nn.Module) -> type[nn.Module] | None:
    """The class of what follows scale and shift in a frozen norm, or is left of the norm by folding.

    None where someone watches it, so that it must be called.
    """
    if type(norm) in (FrozenBatchNorm2d, nn.Identity):
        return nn.Identity
    if not is_frozen_form(norm):
        return None if is_watched(norm) else type(norm)
    return None if any(map(is_watched, norm.children())) else type(norm.remainder())


def _is_frozen_layer(layer: Layer, x: Tensor, *, before_relu: bool = False) -> TypeGuard[FrozenLayer]:
    """Whether nobody would notice that convolution and norm are not called; ``before_relu``: nor a ReLU in the norm.

    In a call that is not seen through (``_is_seen_through``).
    """
    conv, norm = layer
    if type(conv) is not nn.Conv2d or not isinstance(norm, FrozenBatchNorm2d):  # a parametrized one is of another class
        return False
    weight = conv.weight
    return (
        conv.bias is None
        and type(weight) in (Tensor, nn.Parameter)
        and (x.dtype == weight.dtype or _autocasts(x))
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and not is_watched(conv)
        and not is_watched(norm)
        and _ending(norm) in ((nn.Identity, nn.ReLU) if before_relu else (nn.Identity,))
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
        or forward_ad._current_level >= 0
    )


def is_watched(module: nn.Module) -> bool:
    """Whether a hook would see this module's inputs or outputs."""
    state = module.__dict__
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state  # replaced on this very object
        or _has_any_global_hook()  # type: ignore[no-untyped-call]
    )


def _folded(conv: nn.Conv2d, norm: FrozenBatchNorm2d, x: Tensor) -> tuple[Tensor, Tensor]:
    """The folded weight and bias, for images of any size."""

    def compute() -> tuple[Tensor, ...]:
        weight, bias = fold(conv, norm, x)
        return weight if x.device.type == "cpu" else pack(weight, Geometry.of(conv), x), bias

    weight, bias = unless_changed([norm], [conv.weight], ("fold", x.dtype), compute)
    return weight, bias
