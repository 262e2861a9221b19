"""Freezing stages for transfer learning, so that it holds, shows and can be undone."""

from collections.abc import Mapping
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
    rest meanwhile. Frozen modules stay in evaluation mode (``is_frozen``), so that no dropout or drop-path acts there.
    Norms that were built frozen (``norm="frozen_bn"``) stay so in every stage; ``thaw_norms`` makes them trainable.

    Args:
        backbone: Any backbone of this package; weights already loaded.
        freeze_at: Number of stages, 0 to 5. Stages that were not built count, and have nothing to freeze.
            torchvision's ``trainable_layers`` is ``5 - freeze_at``, mmdetection's ``frozen_stages`` is
            ``freeze_at - 1``.

    Raises:
        ValueError: If ``freeze_at`` is not an integer from 0 to 5, or a frozen stage has a batch norm that
            cannot be frozen.
    """
    _require_freeze_at(freeze_at)
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
            if freeze or getattr(module, "is_frozen", False):
                swapped.train(backbone.training and not freeze)
            swapped.is_frozen = freeze  # type: ignore[assignment]
            for norm in swapped.modules():
                if isinstance(norm, FrozenBatchNorm2d):
                    norm.generation += 1  # what trained may have changed unseen
        for path in backbone.stage_parameters.get(stage, ()):
            _set_parameter_trainable(backbone.get_parameter(path), not freeze)


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

    def apply(self, backbone: Backbone, epoch: int) -> bool:
        """Freeze and thaw ``backbone`` as ``epoch`` wants it; return whether that changed what trains."""
        before = _trainable_names(backbone)
        freeze_stages(backbone, self.freeze_at(epoch))
        return _trainable_names(backbone) != before

    def __repr__(self) -> str:
        return f"FreezeSchedule({dict(self._periods)})"


def _trainable_names(backbone: Backbone) -> set[str]:
    return {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}


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
