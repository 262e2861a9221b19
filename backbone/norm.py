"""Norm layers: FrozenBatchNorm2d, and the swaps between it and BatchNorm2d."""

from collections.abc import Callable
from typing import Any, Self, TypeGuard

import torch
from torch import Tensor, nn

from backbone.config import GN_GROUPS, NormName

NormLayer = Callable[[int], nn.Module]
TrainableBatchNorm = nn.BatchNorm2d | nn.SyncBatchNorm


class FrozenBatchNorm2d(nn.Module):
    """Batch norm whose statistics and affine parameters are constants: one scale and one shift per channel.

    It has the parameters, buffers and state-dict keys of nn.BatchNorm2d, so a state dict fits both ways, strictly.
    Fresh, it is an exact identity. No gradient ever reaches ``weight`` and ``bias``, whatever their
    ``requires_grad``; they are parameters so that an optimizer, an EMA or a thaw finds the same objects.

    Args:
        num_features: Number of channels.
        eps: Added to the variance, as in nn.BatchNorm2d.

    Attributes:
        frozen_from: The layer this one stands for until it is thawed, in a tuple so that it is no child of this one;
            None if there is none.
        built_frozen: Whether it is frozen by ``norm="frozen_bn"`` and stays so when its stage thaws.
        generation: Grows where values may have changed unseen (``to()``, ``train()``, ``freeze_stages``); guards what
            is computed from them and kept.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.frozen_from: tuple[TrainableBatchNorm] | None = None
        self.built_frozen = True
        self.generation = 0
        self.weight = nn.Parameter(torch.ones(num_features), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(num_features), requires_grad=False)
        self.register_buffer("running_mean", torch.zeros(num_features))
        # 1 - eps rather than 1: the variance plus eps is then exactly 1, and the fresh layer an exact identity.
        self.register_buffer("running_var", torch.ones(num_features) - eps)
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))

    def constants(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what scale and shift are computed from, besides ``eps``."""
        buffers = self._buffers
        return self.weight, self.bias, buffers["running_mean"], buffers["running_var"]  # type: ignore[return-value]

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Return the constants (C,), (C,) with ``output = input * scale + shift``, in float32 or better."""
        dtype = torch.promote_types(self.running_var.dtype, torch.float32)
        scale = self.weight.detach().to(dtype) * torch.rsqrt(self.running_var.to(dtype) + self.eps)
        return scale, self.bias.detach().to(dtype) - self.running_mean.to(dtype) * scale

    def remainder(self) -> nn.Module:
        """Return what this layer does after scale and shift, in its present mode."""
        return nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, C, H, W), or tokens (N, C) or (N, C, L) -> the same shape and dtype, also under autocast."""
        ones = (1,) * (x.ndim - 2)
        scale, shift = (constant.to(x.dtype).view(-1, *ones) for constant in self.scale_and_shift())
        return torch.addcmul(shift, x, scale)

    def train(self, mode: bool = True) -> Self:
        """Do as every module does; being frozen, only remember that what was computed from it may be out of date."""
        self.generation += mode != self.training
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.generation += 1
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def extra_repr(self) -> str:
        """Show what print(model) needs to tell one norm from another."""
        return f"{self.num_features}, eps={self.eps}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:  # noqa: ANN401
        # Libraries whose own frozen norm does not count batches (torchvision, detectron2) leave the counter out.
        key = f"{prefix}num_batches_tracked"
        if key not in state_dict:
            state_dict = {**state_dict, key: self.num_batches_tracked}
        super()._load_from_state_dict(state_dict, prefix, *args)


_frozen_forms: dict[type[nn.Module], type[FrozenBatchNorm2d]] = {
    nn.BatchNorm2d: FrozenBatchNorm2d,
    nn.SyncBatchNorm: FrozenBatchNorm2d,
}


def register_frozen_form(norm: type[nn.Module], form: type[FrozenBatchNorm2d]) -> None:
    """Let ``freeze_norms`` swap layers of class ``norm``, a batch norm that computes something more, for a ``form``.

    The form is constructed as FrozenBatchNorm2d is and then given the children of the layer it stands for, such as an
    activation. Its ``forward`` must equal the layer's in evaluation mode: scale and shift, then its ``remainder()``.

    Raises:
        TypeError: If the form computes something more than FrozenBatchNorm2d and no ``remainder`` tells what.
    """
    if form.forward is not FrozenBatchNorm2d.forward and form.remainder is FrozenBatchNorm2d.remainder:
        raise TypeError(f"a form with a forward of its own must define remainder(), got {form.__name__}; add it")
    _frozen_forms[norm] = form


def has_frozen_form(norm: nn.Module) -> bool:
    """Whether ``freeze_norms`` can swap layers of this class."""
    return type(norm) in _frozen_forms


def is_frozen_form(norm: nn.Module) -> TypeGuard[FrozenBatchNorm2d]:
    """Whether ``norm`` is a FrozenBatchNorm2d, or another form whose ``remainder()`` tells what it does besides."""
    return type(norm) in _frozen_forms.values()


def norm_layer(name: NormName | NormLayer) -> NormLayer:
    """Return the constructor (number of channels -> module) of the norm called ``name`` in a config.

    A constructor is returned as it is: a detector library may bring norms of its own.
    """
    if not isinstance(name, str):
        return name
    layers: dict[NormName, NormLayer] = {
        "frozen_bn": FrozenBatchNorm2d,
        "bn": nn.BatchNorm2d,
        "sync_bn": nn.SyncBatchNorm,
        "gn": lambda channels: nn.GroupNorm(GN_GROUPS, channels),
    }
    return layers[name]


def freeze_norms(module: nn.Module, *, built_frozen: bool = False) -> nn.Module:
    """Swap every BatchNorm2d and SyncBatchNorm in ``module`` for a FrozenBatchNorm2d, in place.

    Parameters and buffers stay the same objects and now require no grad.

    Args:
        module: Any module.
        built_frozen: Whether the layers count as built frozen (``norm="frozen_bn"``), so that thawing a stage leaves
            them frozen.

    Returns:
        ``module``, or its replacement where it is a batch norm itself.

    Raises:
        ValueError: If a batch norm cannot be frozen by a swap: it has no running statistics, no affine parameters,
            or is a subclass that computes something more. Nothing is swapped then.
    """
    require_freezable(module)

    def frozen(child: nn.Module) -> nn.Module | None:
        if type(child) not in _frozen_forms:
            return None
        new = _frozen(child)  # type: ignore[arg-type]
        new.built_frozen = built_frozen
        return new

    return _swap(module, frozen)


def require_freezable(module: nn.Module, path: str = "") -> None:
    """Raise ValueError if a batch norm in ``module``, found at ``path``, cannot be frozen by a swap."""
    for name, child in module.named_modules(prefix=path):
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and not (
            type(child) in _frozen_forms and child.bias is not None and child.track_running_stats
        ):
            raise ValueError(
                f"only a BatchNorm2d or SyncBatchNorm with running statistics and affine parameters can be frozen, "
                f"got {child!r} at {name or 'the top'!r}; replace it by one of these"
            )


def thaw_norms(module: nn.Module, *, built_frozen: bool = True) -> nn.Module:
    """Swap FrozenBatchNorm2d in ``module`` back for the trainable batch norm it was, in place.

    Parameters and buffers stay the same objects, and the parameters require grad again.

    Args:
        module: Any module.
        built_frozen: Whether layers that were frozen from the start thaw too, into BatchNorm2d.

    Returns:
        ``module``, or its replacement where it is a frozen norm itself.
    """

    def thawed(child: nn.Module) -> nn.Module | None:
        if isinstance(child, FrozenBatchNorm2d) and (built_frozen or not child.built_frozen):
            return _thawed(child)
        return None

    return _swap(module, thawed)


def _frozen(norm: TrainableBatchNorm) -> FrozenBatchNorm2d:
    frozen = _frozen_forms[type(norm)](norm.num_features, norm.eps)
    frozen.frozen_from = (norm,)
    for name, child in norm.named_children():
        frozen.add_module(name, child)
    _share_state(norm, frozen, requires_grad=False)
    return frozen


def _thawed(frozen: FrozenBatchNorm2d) -> TrainableBatchNorm:
    norm = frozen.frozen_from[0] if frozen.frozen_from else nn.BatchNorm2d(frozen.num_features)
    norm.eps = frozen.eps
    _share_state(frozen, norm, requires_grad=True)
    return norm


def _share_state(source: nn.Module, target: nn.Module, *, requires_grad: bool) -> None:
    """Give ``target`` the very parameters and buffers of ``source``."""
    for name, parameter in source.named_parameters(recurse=False):
        target.register_parameter(name, parameter)
        parameter.requires_grad_(requires_grad)
    for name, buffer in source.named_buffers(recurse=False):
        setattr(target, name, buffer)
    target.train(source.training)


def _swap(module: nn.Module, replacement: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """Replace ``module`` and its descendants where ``replacement`` gives one; a shared module stays shared."""
    replaced: dict[nn.Module, nn.Module] = {}

    def visit(current: nn.Module) -> nn.Module:
        if current not in replaced:
            replaced[current] = new = replacement(current) or current
            if new is current:
                for name, child in current._modules.items():  # named_children() would skip a shared one
                    if child is not None:
                        current._modules[name] = visit(child)
        return replaced[current]

    return visit(module)
