"""What kind of call is going on: all that decides whether a fused operation may stand in for modules."""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype a convolution of ``x`` runs in: autocast's, where it is on."""
    return torch.get_autocast_dtype(x.device.type) if is_autocast(x) else x.dtype


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd has to record what is made of these."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def is_autocast(x: Tensor) -> bool:
    """Whether autocast is on and would cast ``x``."""
    return torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64


def is_seen_through(x: Tensor) -> bool:
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
    return has_hook(module) or bool(_has_any_global_hook())  # type: ignore[no-untyped-call]


def is_watched_within(module: nn.Module) -> bool:
    """Whether a hook would see the inputs or outputs of this module or of one in it; no module is inside itself."""
    return _has_hook_within(module) or bool(_has_any_global_hook())  # type: ignore[no-untyped-call]


def has_hook(module: nn.Module) -> bool:
    """Whether a hook of its own would see this module's inputs or outputs, or its ``forward`` was replaced on it."""
    state = module.__dict__
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
    )


def runs_in_order(layers: nn.Module) -> bool:
    """Whether calling ``layers`` is known to be calling them one after the other, and nothing else."""
    if "forward" in layers.__dict__:
        return False
    owner = next(each for each in type(layers).__mro__ if "forward" in vars(each))
    return owner is nn.Sequential or (issubclass(owner, nn.Sequential) and "conv_norm_pairs" in vars(owner))


def _has_hook_within(module: nn.Module) -> bool:
    """A walk of its own: ``modules()`` takes longer, which is felt at every block of every pass."""
    if has_hook(module):
        return True
    for child in module._modules.values():  # noqa: SIM110 (a generator per module is what is saved here)
        if child is not None and _has_hook_within(child):
            return True
    return False
