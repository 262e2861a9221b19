"""Freezing stages for transfer learning, so that it holds, shows and can be undone."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from backbone.bn_eval import EvalBatchNorm2d
from backbone.features import Backbone, find_backbone
from backbone.norm import (
    AnyBatchNorm,
    FrozenBatchNorm2d,
    freeze_norms,
    frozen_norms,
    require_freezable,
    require_thawable,
    thaw_norms,
)
from backbone.stages import STAGE_NAMES


def freeze_stages(model: nn.Module, freeze_at: int) -> None:
    """Leave exactly the first ``freeze_at`` stages frozen, in place.

    Stage 1 is the stem, 2 is C2, ... 5 is C5; 0 thaws everything. Frozen parameters require no grad and hold no grad.
    Every batch norm among them becomes a FrozenBatchNorm2d, the same module object with the same Parameter objects. So
    ``train()`` cannot move it, and optimizers, hooks and wrappers stay valid; thawing changes its class back. Frozen
    modules stay in evaluation mode (``is_frozen``), so that no dropout or drop-path acts there. Norms that were built
    frozen (``norm="frozen_bn"``) stay so in every stage; ``thaw_norms`` makes them trainable.

    Args:
        model: Any backbone of this package, or a pyramid or detector that holds one; weights already loaded.
        freeze_at: Number of stages, 0 to 5. Stages that were not built count, and have nothing to freeze.
            torchvision's ``trainable_layers`` is ``5 - freeze_at``, mmdetection's ``frozen_stages`` is
            ``freeze_at - 1``.

    Raises:
        ValueError: If ``freeze_at`` is not an integer from 0 to 5, a frozen stage has a batch norm that cannot be
            frozen, or there is no backbone in ``model``.
    """
    _require_freeze_at(freeze_at)
    backbone = find_backbone(model)
    stages = [(modules, STAGE_NAMES.index(stage) < freeze_at) for stage, modules in _modules_by_stage(backbone)]
    for modules, freeze in stages:  # all before the first is touched
        for path, module in modules.items():
            if freeze:
                require_freezable(module, path)
            else:
                require_thawable(frozen_norms(module, path, built_frozen=False))
    for modules, freeze in stages:
        for module in modules.values():
            _ = freeze_norms(module) if freeze else thaw_norms(module, built_frozen=False)
            _set_trainable(module, not freeze)
            if freeze or getattr(module, "is_frozen", False):
                module.train(backbone.training and not freeze)
            module.is_frozen = freeze  # type: ignore[assignment]
    for stage, paths in backbone.stage_parameters.items():
        for path in paths:
            _set_parameter_trainable(backbone.get_parameter(path), STAGE_NAMES.index(stage) >= freeze_at)


def _modules_by_stage(backbone: Backbone) -> list[tuple[str, dict[str, nn.Module]]]:
    stages = backbone.stage_modules.items()
    return [(stage, {path: backbone.get_submodule(path) for path in paths}) for stage, paths in stages]


def _require_freeze_at(freeze_at: int) -> None:
    if type(freeze_at) is not int or not 0 <= freeze_at <= len(STAGE_NAMES):
        raise ValueError(f"freeze_at must be 0 to 5 (stages counted from the stem), got {freeze_at!r}")


class FreezeSchedule:
    """How many stages are frozen in each epoch: ``FreezeSchedule({0: 2, 5: 0})`` thaws all from epoch 5 on.

    It holds no state: what is frozen follows from the epoch alone, so that a resumed run stands where the
    interrupted one stood. An optimizer over all parameters, frozen ones included, stays valid throughout: a frozen
    parameter has no gradient and is passed over, a thawed one continues with the state it had. Under
    DistributedDataParallel wrap the model anew whenever ``apply`` returns True, for DDP notes at the start which
    parameters will have gradients.

    Args:
        freeze_at_by_epoch: First epoch of each period, counted from 0, to ``freeze_at`` as in ``freeze_stages``.
            It must say what holds from epoch 0 on.

    Raises:
        ValueError: If epoch 0 is not there, an epoch is negative or no integer, or a value is not 0 to 5.
    """

    def __init__(self, freeze_at_by_epoch: Mapping[int, int]) -> None:
        for epoch, freeze_at in freeze_at_by_epoch.items():
            if type(epoch) is not int or epoch < 0:
                raise ValueError(f"a schedule's epochs must be integers from 0, got {epoch!r}")
            _require_freeze_at(freeze_at)
        if 0 not in freeze_at_by_epoch:
            raise ValueError(
                f"a schedule must say what is frozen from epoch 0 on, got epochs {sorted(freeze_at_by_epoch)}; "
                f"add epoch 0"
            )
        self._periods = sorted(freeze_at_by_epoch.items())

    def freeze_at(self, epoch: int) -> int:
        """Return the number of frozen stages in ``epoch``, counted from 0."""
        return [freeze_at for start, freeze_at in self._periods if start <= epoch][-1]

    def apply(self, model: nn.Module, epoch: int) -> bool:
        """Freeze and thaw the backbone of ``model`` as ``epoch`` wants it; return whether that changed what trains."""
        before = _trainable_names(model)
        freeze_stages(model, self.freeze_at(epoch))
        return _trainable_names(model) != before

    def __repr__(self) -> str:
        return f"FreezeSchedule({dict(self._periods)})"


def _trainable_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def _set_trainable(module: nn.Module, trainable: bool) -> None:
    for child in module.modules():
        for parameter in child.parameters(recurse=False):
            _set_parameter_trainable(parameter, trainable and not isinstance(child, FrozenBatchNorm2d))


def _set_parameter_trainable(parameter: nn.Parameter, trainable: bool) -> None:
    parameter.requires_grad_(trainable)
    if not trainable:
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


def freeze_report(model: nn.Module) -> dict[str, StageReport]:
    """Return what is trainable and what is frozen in each stage, stem first, read from the modules as they are.

    Whoever froze them: norms of other libraries that have no way to move count as frozen, and so do batch norms in
    evaluation mode. ``model`` is a backbone, or a pyramid or detector that holds one.
    """
    return {stage: _report(modules) for stage, modules in find_backbone(model).stages.items()}


def _report(modules: nn.ModuleList) -> StageReport:
    parameters = list(modules.parameters())
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    kinds = {kind for module in modules.modules() if (kind := norm_kind(module)) is not None}
    return StageReport(
        parameters=sum(parameter.numel() for parameter in parameters),
        trainable_parameters=trainable,
        norm="+".join(sorted(kinds)) or "none",
        frozen=trainable == 0 and not any(map(_moves, modules.modules())),
    )


def norm_kind(module: nn.Module) -> str | None:
    """Return ``frozen_bn``, ``bn_eval``, ``bn``, ... ``ln`` for a norm layer of any library; None for others."""
    kinds = {
        EvalBatchNorm2d: "bn_eval",
        nn.SyncBatchNorm: "sync_bn",
        AnyBatchNorm: "bn",
        nn.GroupNorm: "gn",
        nn.LayerNorm: "ln",
    }
    for norm, kind in kinds.items():
        if isinstance(module, norm):
            return kind
    statistics = ("running_mean", "running_var")  # kept, and by none of torch's classes: nothing moves them
    return "frozen_bn" if all(isinstance(getattr(module, name, None), Tensor) for name in statistics) else None


def _moves(module: nn.Module) -> bool:
    """Whether a forward pass would update running statistics of ``module``."""
    tracks = isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
    return tracks and module.training
