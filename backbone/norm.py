"""Norm layers: FrozenBatchNorm2d, and how a batch norm turns into one and back, in place."""

from collections.abc import Callable, Iterator
from typing import Any, Final, Self, TypeAlias, TypeGuard

import torch
import torch.fx
from torch import Tensor, nn

from backbone.bn_eval import EvalBatchNorm2d, uncounted
from backbone.config import GN_GROUPS, NormName

NormLayer = Callable[[int], nn.Module]
AnyBatchNorm: TypeAlias = nn.modules.batchnorm._BatchNorm
"""The class of all of torch's batch norms; FrozenBatchNorm2d is none of them, so that no converter takes it for one."""

_THAWED: Final = "thawed"


class FrozenBatchNorm2d(nn.Module):
    """Batch norm whose statistics and affine parameters are constants: one scale and one shift per channel.

    It has the parameters, buffers and state-dict keys of nn.BatchNorm2d, so a state dict fits both ways, strictly.
    Fresh, it is an exact identity. No gradient ever reaches ``weight`` and ``bias``, whatever their ``requires_grad``.
    They are parameters so that an optimizer, an EMA or a thaw finds the same objects.

    ``freeze_norms`` turns a batch norm into one in place: the same module, its class changed. Converters of batch norms
    (``convert_sync_batchnorm``) cannot thaw it; but they change what it thaws to, which they find as its child
    ``thawed`` while they walk through ``named_children()``.

    Args:
        num_features: Number of channels.
        eps: Added to the variance, as in nn.BatchNorm2d.

    Attributes:
        thawed_class: The class that ``thaw_norms`` gives it.
        built_frozen: Whether it is frozen by ``norm="frozen_bn"`` and stays so when its stage thaws.
        derived: Results that others compute from the constants and keep here, by name. It is emptied where values may
            have changed: by ``train()`` and ``eval()``, ``to()``, loading, freezing and thawing.
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
        self.momentum, self.affine, self.track_running_stats = 0.1, True, True  # nn.BatchNorm2d's, for after a thaw
        self.thawed_class: type[nn.Module] = nn.BatchNorm2d
        self.built_frozen = True
        self.derived: dict[str, object] = {}
        self.weight = nn.Parameter(torch.ones(num_features), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(num_features), requires_grad=False)
        self.register_buffer("running_mean", torch.zeros(num_features))
        # 1 - eps rather than 1: the variance plus eps is then exactly 1, and the fresh layer an exact identity.
        self.register_buffer("running_var", torch.ones(num_features) - eps)
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))

    def constants(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what scale and shift are computed from, besides ``eps``."""
        return self.weight, self.bias, self.running_mean, self.running_var

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Return the constants (C,), (C,) with ``output = input * scale + shift``, in float32 or better."""
        dtype = torch.promote_types(self.running_var.dtype, torch.float32)
        scale = self.weight.detach().to(dtype) * torch.rsqrt(self.running_var.to(dtype) + self.eps)
        return scale, self.bias.detach().to(dtype) - self.running_mean.to(dtype) * scale

    def remainder(self) -> nn.Module:
        """Return what this layer does after scale and shift, in its present mode."""
        return nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, C, ...), of any number of dimensions -> the same shape and dtype, also under autocast."""
        scale, shift = self.scale_and_shift()
        return torch.addcmul(_for_channels(shift, x), x, _for_channels(scale, x))

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the children and, as ``thawed``, the layer this one would thaw to, with the same parameters.

        ``modules()``, ``children()`` and the state dict leave ``thawed`` out.
        """
        self._take_thawed()
        yield from super().named_children()
        yield _THAWED, self._as_thawed()

    def children(self) -> Iterator[nn.Module]:
        """Yield the children: what ``apply``, ``to`` and ``train`` reach."""
        self._take_thawed()
        yield from (child for _, child in super().named_children())

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Add a child; one called ``thawed`` says what this layer thaws to, such as a SyncBatchNorm."""
        if name != _THAWED:
            super().add_module(name, module)
        elif isinstance(module, AnyBatchNorm):
            self.thawed_class = type(module)
            known = {"training", *_INTERNAL}
            self.__dict__.update({key: value for key, value in vars(module).items() if key not in known})

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:  # noqa: ANN401
        """Yield this layer and what is below it, as of every module."""
        self._take_thawed()
        yield from super().named_modules(*args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        """Do as every module does; being frozen, only forget what was computed from values that may have changed."""
        if mode != self.training:
            self.derived.clear()
        return super().train(mode)

    def extra_repr(self) -> str:
        """Show what print(model) needs to tell one norm from another."""
        return f"{self.num_features}, eps={self.eps}"

    def _as_thawed(self) -> nn.Module:
        norm = self.thawed_class.__new__(self.thawed_class)
        norm.__dict__.update({key: value for key, value in vars(self).items() if key not in _OWN})
        for name in ("_parameters", "_buffers", "_modules"):
            norm.__dict__[name] = dict(vars(self)[name])
        return norm

    def _take_thawed(self) -> None:
        """Take what a converter wrote into the children as ``thawed`` for what it is: not a child."""
        if _THAWED in self._modules:
            self.add_module(_THAWED, self._modules.pop(_THAWED))

    def __setattr__(self, name: str, value: Any) -> None:  # noqa: ANN401
        if name == _THAWED and isinstance(value, nn.Module):
            self.add_module(name, value)  # wrappers set what ``named_children()`` gave them
        else:
            super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.derived.clear()
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def _save_to_state_dict(self, *args: Any) -> None:  # noqa: ANN401
        self._take_thawed()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:  # noqa: ANN401
        self.derived.clear()
        self._take_thawed()
        # Libraries whose own frozen norm does not count batches (torchvision, detectron2) leave the counter out.
        key = f"{prefix}num_batches_tracked"
        if key not in state_dict:
            state_dict = {**state_dict, key: uncounted(self)}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _replicate_for_data_parallel(self) -> Self:
        replica = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica.derived = {}
        return replica  # type: ignore[no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "derived": {}}  # a copy or a pickle starts afresh


@torch.fx.wrap  # the number of dimensions is not known in a trace
def _for_channels(constant: Tensor, x: Tensor) -> Tensor:
    """(C,) -> (C, 1, ...) in the dtype of ``x``, one dimension for each of (C, ...) of ``x``."""
    return constant.to(x.dtype).view(-1, *[1] * (x.ndim - 2))


_OWN: Final = ("thawed_class", "built_frozen", "derived")
_INTERNAL: Final = frozenset(vars(nn.Module()))

_frozen_forms: dict[type[nn.Module], type[FrozenBatchNorm2d]] = {
    nn.BatchNorm1d: FrozenBatchNorm2d,
    nn.BatchNorm2d: FrozenBatchNorm2d,
    EvalBatchNorm2d: FrozenBatchNorm2d,
    nn.SyncBatchNorm: FrozenBatchNorm2d,
}
_REVERTED: Final = (
    "lightning.pytorch.plugins.layer_sync._BatchNormXd",
    "pytorch_lightning.plugins.layer_sync._BatchNormXd",
)
"""What Lightning makes of a SyncBatchNorm at the end of a run: a batch norm of any number of dimensions."""


def register_frozen_form(norm: type[nn.Module], form: type[FrozenBatchNorm2d]) -> None:
    """Let ``freeze_norms`` turn layers of class ``norm``, a batch norm that computes something more, into a ``form``.

    The layer keeps its children, such as an activation. The form's ``forward`` must equal the layer's in evaluation
    mode: scale and shift, then its ``remainder()``.

    Raises:
        TypeError: If the form computes something more than FrozenBatchNorm2d and no ``remainder`` tells what.
    """
    if form.forward is not FrozenBatchNorm2d.forward and form.remainder is FrozenBatchNorm2d.remainder:
        raise TypeError(f"a form with a forward of its own must define remainder(), got {form.__name__}; add it")
    _frozen_forms[norm] = form


def frozen_form(norm: nn.Module) -> type[FrozenBatchNorm2d] | None:
    """Return the class that ``freeze_norms`` gives ``norm``; None where it is no batch norm that is known.

    Classes are known exactly: BatchNorm1d, BatchNorm2d, SyncBatchNorm and those of ``register_frozen_form``. Their
    subclasses may compute more.
    """
    cls = type(norm)
    if f"{cls.__module__}.{cls.__qualname__}" in _REVERTED:
        return FrozenBatchNorm2d
    return _frozen_forms.get(cls)


def is_frozen_form(norm: nn.Module) -> TypeGuard[FrozenBatchNorm2d]:
    """Whether ``norm`` is exactly a FrozenBatchNorm2d, or another form whose ``remainder()`` tells what it does."""
    return type(norm) is FrozenBatchNorm2d or type(norm) in _frozen_forms.values()


def norm_layer(name: NormName | NormLayer) -> NormLayer:
    """Return the constructor (number of channels -> module) of the norm called ``name`` in a config.

    A constructor is returned as it is: a detector library may bring norms of its own.
    """
    if not isinstance(name, str):
        return name
    layers: dict[NormName, NormLayer] = {
        "frozen_bn": FrozenBatchNorm2d,
        "bn_eval": EvalBatchNorm2d,
        "bn": nn.BatchNorm2d,
        "sync_bn": nn.SyncBatchNorm,
        "gn": lambda channels: nn.GroupNorm(GN_GROUPS, channels),
    }
    return layers[name]


def freeze_norms(module: nn.Module, *, built_frozen: bool = False) -> nn.Module:
    """Turn every batch norm in ``module`` into a FrozenBatchNorm2d, in place.

    Modules, parameters and buffers stay the same objects; the parameters now require no grad.

    Args:
        module: Any module.
        built_frozen: Whether the layers count as built frozen (``norm="frozen_bn"``), so that thawing a stage leaves
            them frozen.

    Returns:
        ``module``.

    Raises:
        ValueError: If a batch norm cannot be frozen: it has no running statistics, no affine parameters, or is of a
            class that computes something more. Nothing is touched then.
    """
    require_freezable(module)
    for child in module.modules():
        form = frozen_form(child)
        if form is not None:
            child.thawed_class = type(child)  # type: ignore[assignment]
            child.__class__ = form
            child.built_frozen = built_frozen  # type: ignore[assignment]
            _set_trainable(child, False)
        if isinstance(child, FrozenBatchNorm2d):
            child.derived = {}
    return module


def require_freezable(module: nn.Module, path: str = "") -> None:
    """Raise ValueError if a batch norm in ``module``, found at ``path``, cannot be frozen."""
    for name, child in module.named_modules(prefix=path):
        if isinstance(child, AnyBatchNorm) and not (
            frozen_form(child) and child.bias is not None and child.track_running_stats
        ):
            raise ValueError(
                f"only a BatchNorm1d, BatchNorm2d or SyncBatchNorm with running statistics and affine parameters "
                f"can be frozen, got {_one_line(child)} at {name or 'the top'!r}; replace it, or remove what "
                f"parametrizes it"
            )


def thaw_norms(module: nn.Module, *, built_frozen: bool = True) -> nn.Module:
    """Turn each FrozenBatchNorm2d in ``module`` back into the trainable batch norm it was, in place.

    Modules, parameters and buffers stay the same objects, and the parameters require grad again. What was changed
    meanwhile (momentum, buffers, what a converter made of ``thawed``) is there.

    Args:
        module: Any module.
        built_frozen: Whether layers that were frozen from the start thaw too, into BatchNorm2d.

    Returns:
        ``module``.

    Raises:
        ValueError: If one of them is of a subclass that is not known to be a batch norm's frozen form. Nothing is
            touched then.
    """
    frozen = frozen_norms(module, built_frozen=built_frozen)
    require_thawable(frozen)
    for norm in frozen.values():
        norm.__class__ = norm.thawed_class  # type: ignore[assignment]
        for name in _OWN:
            del norm.__dict__[name]
        _set_trainable(norm, True)
    for child in module.modules():
        if isinstance(child, FrozenBatchNorm2d):
            child.derived = {}
    return module


def frozen_norms(module: nn.Module, path: str = "", *, built_frozen: bool = True) -> dict[str, FrozenBatchNorm2d]:
    """Return the frozen norms in ``module``, found at ``path``, by their own paths; ``built_frozen`` as in a thaw."""
    return {
        name: child
        for name, child in module.named_modules(prefix=path)
        if isinstance(child, FrozenBatchNorm2d) and (built_frozen or not child.built_frozen)
    }


def require_thawable(norms: dict[str, FrozenBatchNorm2d]) -> None:
    """Raise ValueError if one of ``norms``, by their paths, cannot turn into what it was."""
    for path, norm in norms.items():
        if not is_frozen_form(norm):
            raise ValueError(
                f"only a FrozenBatchNorm2d known to stand for a batch norm can be thawed, got {_one_line(norm)} "
                f"at {path or 'the top'!r}; remove its parametrization or replace it"
            )


def _one_line(norm: nn.Module) -> str:
    return f"{type(norm).__name__}({norm.extra_repr()})"


def _set_trainable(norm: nn.Module, trainable: bool) -> None:
    for parameter in norm.parameters(recurse=False):
        parameter.requires_grad_(trainable)
