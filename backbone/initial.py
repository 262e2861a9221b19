"""Notices frozen stages and norms that still have the values they were built with, when training begins.

They would never train. What counts is that nothing at all was written, so weights may have come by any way:
``load_weights``, ``load_state_dict``, a host's loader, a copy into parameters.
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor, nn

from backbone.features import Backbone
from backbone.norm import FrozenBatchNorm2d
from backbone.stages import STAGE_NAMES

_TOLERANCE = 1e-2  # of a value that has been rounded to another dtype meanwhile


def watch_initial_values(backbone: Backbone, name: str) -> None:
    """Let the first forward in training mode warn of what is frozen at the values it has now.

    Nothing is watched on the meta device, where there are no values.

    Args:
        backbone: Fresh, no weights loaded.
        name: What the warning calls it.
    """
    tensors = {**dict(backbone.named_parameters()), **dict(backbone.named_buffers())}
    seen = {path: state for path, tensor in tensors.items() if (state := _look_at(tensor)) is not None}
    if seen:
        backbone.register_forward_pre_hook(_FirstTrainingForward(name, seen))


def stop_watching(model: nn.Module) -> None:
    """Watch none of the backbones in ``model`` any more."""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, _FirstTrainingForward):
                module._forward_pre_hooks.pop(key)


@dataclass(frozen=True, slots=True)
class _Seen:
    """A parameter or buffer as it was built.

    Attributes:
        value: Its first number.
        version: How often it had been written in place. Copying writes, so a copy of the network goes by values alone.
    """

    value: float
    version: float

    def __reduce__(self) -> tuple[type["_Seen"], tuple[float, float]]:
        return _Seen, (self.value, math.inf)

    def is_still(self, tensor: object) -> bool:
        """Whether ``tensor`` has that value yet and was not written since; False where that cannot be told."""
        now = _look_at(tensor)
        if now is None or now.version > self.version:
            return False
        return math.isclose(now.value, self.value, rel_tol=_TOLERANCE, abs_tol=1e-12)


@dataclass(frozen=True, slots=True)
class _FirstTrainingForward:
    """A hook before the forward of a backbone, gone after the first one in training mode; it can be pickled.

    Attributes:
        name: What the warning calls the backbone.
        seen: Every parameter and buffer as it was built.
    """

    name: str
    seen: Mapping[str, _Seen]

    def __call__(self, backbone: nn.Module, _inputs: object) -> None:
        if not backbone.training or not isinstance(backbone, Backbone) or _is_traced():
            return
        for key, hook in list(backbone._forward_pre_hooks.items()):
            if hook is self:
                backbone._forward_pre_hooks.pop(key, None)  # a replica of DataParallel shares them with the others
        frozen = _frozen_parts(backbone)
        if frozen and all(seen.is_still(_get(backbone, name)) for name, seen in self.seen.items()):
            warnings.warn(
                f"{self.name}: {' and '.join(frozen)} are frozen at random weights and will never train; set weights, "
                f"load a checkpoint before training, or use norm='bn' (or 'gn') and freeze_at=0",
                stacklevel=2,
            )


def _frozen_parts(backbone: Backbone) -> list[str]:
    """Return in words what does not train: stages, and norms in other stages."""
    stages = [stage for stage in STAGE_NAMES if _is_frozen(backbone, stage)]
    is_first = stages == list(STAGE_NAMES[: len(stages)])
    words = f"the first {len(stages)} stages" if is_first else f"the stages {', '.join(stages)}"
    covered = tuple(f"{path}." for stage in stages for path in backbone.stage_modules[stage])
    norms = [path for path, module in backbone.named_modules() if isinstance(module, FrozenBatchNorm2d)]
    elsewhere = any(not f"{path}.".startswith(covered) for path in norms)
    return [words] * bool(stages) + ["all norms"] * elsewhere


def _is_frozen(backbone: Backbone, stage: str) -> bool:
    """Whether ``stage`` has parameters and none trains."""
    names = [f"{path}." for path in backbone.stage_modules.get(stage, ())]
    inside = [p for name, p in backbone.named_parameters() if name.startswith(tuple(names))]
    return bool(inside) and not any(parameter.requires_grad for parameter in inside)


def _is_traced() -> bool:
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
    )


def _get(module: nn.Module, path: str) -> object:
    try:
        return attrgetter(path)(module)  # not get_parameter: a replica of DataParallel has plain tensors
    except AttributeError:
        return None


def _look_at(tensor: object) -> _Seen | None:
    """Return the state of ``tensor``; None of one that has none to tell, such as a shard or a meta tensor."""
    if type(tensor) not in (Tensor, nn.Parameter) or not isinstance(tensor, Tensor):
        return None
    if tensor.is_meta or not tensor.numel():
        return None
    try:
        with torch.no_grad():
            return _Seen(float(tensor.flatten()[0]), tensor._version)
    except (RuntimeError, NotImplementedError):  # inside torch.func's transforms, fake, or made in inference mode
        return None
