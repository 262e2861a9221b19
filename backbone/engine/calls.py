"""What kind of call is going on: whether the engine may stand in for modules, or somebody would notice."""

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._device import DeviceContext

from backbone.bn_eval import EvalBatchNorm2d
from backbone.engine import switch, torch_internals
from backbone.norm import FrozenBatchNorm2d

_OWNED: Final = tuple(
    (owner, name, getattr(owner, name))
    for owner, names in {
        nn.Conv2d: ("__call__", "forward", "_conv_forward"),
        nn.ReLU: ("__call__", "forward"),
        nn.MaxPool2d: ("__call__", "forward"),
        nn.Sequential: ("__call__", "forward"),
        FrozenBatchNorm2d: ("forward",),
        EvalBatchNorm2d: ("forward",),
        F: ("batch_norm", "conv2d", "relu", "max_pool2d"),
    }.items()
    for name in names
)
"""What torch's own modules do, and our norms. A tool that counts or explains may put something else in its place."""


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype a convolution of ``x`` runs in: autocast's, where it is on."""
    return torch.get_autocast_dtype(x.device.type) if is_autocast(x) else x.dtype


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd has to record what is made of these."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def is_autocast(x: Tensor) -> bool:
    """Whether autocast is on and would cast ``x``."""
    return torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64


def is_plain(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a dense tensor of torch itself: not quantised, sparse, fake, distributed or a proxy."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_nested


def is_traced(x: Tensor) -> bool:
    """Whether modules must be called, as if there were no engine. The first question at every block.

    So it is where the call is traced, compiled, transformed, counted or explained, and where the engine is off. It is
    also where ``x`` is no plain tensor of a CPU or CUDA device.
    """
    return (
        torch.compiler.is_compiling()  # the compiler cannot look at what follows
        or not switch.is_on()
        or not torch_internals.LOOKS_AT_CALLS
        or is_watched(x)
    )


def is_watched(x: Tensor) -> bool:
    """Whether modules must be called, be the engine on or off, for a tool would notice."""
    return (
        torch.compiler.is_compiling()
        or not is_plain(x)
        or not torch_internals.LOOKS_AT_CALLS
        or x.device.type not in ("cpu", "cuda")
        or x.numel() == 0
        or is_transformed()
        or torch_internals.has_global_hook()
        or any(getattr(owner, name) is not own for owner, name, own in _OWNED)
    )


def is_transformed() -> bool:
    """Whether operations are traced, batched, differentiated forward or seen by a mode."""
    return (
        bool(torch_internals.tracing_state())
        or torch_internals.num_dispatch_modes() > 0
        or torch_internals.is_transformed()
        or torch_internals.is_forward_ad()
        or (torch_internals.num_function_modes() > 0 and not _modes_only_place())
    )


def _modes_only_place() -> bool:
    """Whether all function modes are ``torch.device`` or the default device, which look at factories alone."""
    return all(type(mode) is DeviceContext for mode in torch_internals.function_modes())


def has_hook(module: nn.Module) -> bool:
    """Whether a hook of its own would see this module's inputs or outputs, or its ``forward`` was replaced on it."""
    return any(torch_internals.hooks_of(module)) or "forward" in module.__dict__


def has_hook_within(module: nn.Module) -> bool:
    """Whether ``module`` or a module in it has a hook.

    A walk of its own: ``modules()`` takes longer, which is felt at every block of every pass.
    """
    if has_hook(module):
        return True
    for child in module._modules.values():  # noqa: SIM110 (a generator per module is what is saved here)
        if child is not None and has_hook_within(child):
            return True
    return False
