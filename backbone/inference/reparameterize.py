"""timm's branches that add up to one convolution: summed in an inference copy, as ``timm.utils`` does."""

import sys
from typing import Any, Final

from torch import nn

from backbone.engine.calls import has_hook_within
from backbone.inference.foreign_norms import frozen_eps

_METHODS: Final = ("fuse", "reparameterize", "switch_to_deploy")
"""What ``timm.utils.reparameterize_model`` looks for."""


def reparameterize(model: nn.Module) -> None:
    """Sum the branches of timm's MobileOne, FastViT, RepViT and the like in ``model``, in place.

    Nothing is done where that would call another library's methods, drop a hook, or meet norms that timm cannot sum.
    """
    if "timm" not in sys.modules:
        return
    from timm.utils.model import reparameterize_model

    able = [module for module in model.modules() if any(hasattr(module, name) for name in _METHODS)]
    if able and all(map(_is_timms, able)):
        summed: Any = reparameterize_model(model, inplace=True)
        assert summed is model


def _is_timms(module: nn.Module) -> bool:
    """Whether timm's method can be called on ``module``, and nobody would notice."""
    of_timm = any(cls.__module__.startswith("timm.") for cls in type(module).__mro__)
    is_once = not hasattr(module, "reparameterize") or hasattr(module, "is_reparameterized")  # timm's would do it again
    has_known_norms = all(frozen_eps(norm) is None for norm in module.modules())
    return of_timm and is_once and has_known_norms and not has_hook_within(module)
