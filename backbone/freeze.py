"""Freezing stages for transfer learning, so that it holds, shows and can be undone."""

from dataclasses import dataclass

from torch import nn

from backbone.features import Backbone
from backbone.norm import FrozenBatchNorm2d, freeze_norms, require_freezable, thaw_norms
from backbone.stages import STAGE_NAMES


def freeze_stages(backbone: Backbone, freeze_at: int) -> None:
    """Leave exactly the first ``freeze_at`` stages frozen, in place.

    Stage 1 is the stem, 2 is C2, ... 5 is C5; 0 thaws everything. Frozen parameters require no grad, hold no grad,
    and every BatchNorm2d among them becomes a FrozenBatchNorm2d holding the same Parameter objects, so ``train()``
    cannot move it and an existing optimizer stays valid. Thawing swaps the same BatchNorm2d back, with its hooks, which
    rest meanwhile. Norms that were built frozen (``norm="frozen_bn"``) stay so in every stage; ``thaw_norms`` makes
    them trainable.

    Args:
        backbone: Any backbone of this package; weights already loaded.
        freeze_at: Number of stages, 0 to 5. Stages that were not built count, and have nothing to freeze.
            torchvision's ``trainable_layers`` is ``5 - freeze_at``, mmdetection's ``frozen_stages`` is
            ``freeze_at - 1``.

    Raises:
        ValueError: If ``freeze_at`` is not an integer from 0 to 5, or a frozen stage has a batch norm that
            cannot be frozen.
    """
    if type(freeze_at) is not int or not 0 <= freeze_at <= len(STAGE_NAMES):
        raise ValueError(f"freeze_at must be 0 to 5 (stages counted from the stem), got {freeze_at!r}")
    for stage, paths in backbone.stage_modules.items():
        for path in paths if STAGE_NAMES.index(stage) < freeze_at else ():
            require_freezable(backbone.get_submodule(path), path)  # all before the first is touched
    for stage, paths in backbone.stage_modules.items():
        freeze = STAGE_NAMES.index(stage) < freeze_at
        for path in paths:
            module = backbone.get_submodule(path)
            swapped = freeze_norms(module) if freeze else thaw_norms(module, built_frozen=False)
            if swapped is not module:
                backbone.set_submodule(path, swapped)
            _set_trainable(swapped, not freeze)


def _set_trainable(module: nn.Module, trainable: bool) -> None:
    for child in module.modules():
        for parameter in child.parameters(recurse=False):
            parameter.requires_grad_(trainable and not isinstance(child, FrozenBatchNorm2d))
            if not parameter.requires_grad:
                parameter.grad = None  # a gradient left behind would let the optimizer take one more step


@dataclass(frozen=True, slots=True)
class StageReport:
    """The state of one stage.

    Attributes:
        parameters: Number of scalar parameters.
        trainable_parameters: How many of them require grad.
        norm: Kinds of norm layers: ``frozen_bn``, ``bn``, ``sync_bn``, ``gn``, joined by ``+``; ``none`` without.
        frozen: Whether nothing in the stage can move: no parameter requires grad, no norm updates statistics.
    """

    parameters: int
    trainable_parameters: int
    norm: str
    frozen: bool


_NORM_KINDS: dict[type[nn.Module], str] = {
    FrozenBatchNorm2d: "frozen_bn",
    nn.SyncBatchNorm: "sync_bn",
    nn.BatchNorm2d: "bn",
    nn.GroupNorm: "gn",
    nn.LayerNorm: "ln",
}


def freeze_report(backbone: Backbone) -> dict[str, StageReport]:
    """Return what is trainable and what is frozen in each stage, stem first, read from the modules as they are."""
    return {stage: _report(modules) for stage, modules in backbone.stages.items()}


def _report(modules: nn.ModuleList) -> StageReport:
    parameters = list(modules.parameters())
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    kinds = {kind for m in modules.modules() for norm, kind in _NORM_KINDS.items() if isinstance(m, norm)}
    moving = any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats for m in modules.modules())
    return StageReport(
        parameters=sum(parameter.numel() for parameter in parameters),
        trainable_parameters=trainable,
        norm="+".join(sorted(kinds)) or "none",
        frozen=trainable == 0 and not moving,
    )
