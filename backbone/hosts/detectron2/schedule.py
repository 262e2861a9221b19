"""FreezeSchedule in detectron2's training loop."""

from collections.abc import Callable
from functools import partial

from detectron2.engine import HookBase
from detectron2.engine.defaults import create_ddp_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from backbone.features import Backbone
from backbone.freeze import FreezeSchedule, freeze_stages

_distributed = partial(create_ddp_model, broadcast_buffers=False)  # as DefaultTrainer wraps


class FreezeScheduleHook(HookBase):  # type: ignore[misc]
    """Freezes and thaws the model's ``backbone`` as a ``FreezeSchedule`` wants it, also when training resumes.

    detectron2's optimizers leave out what is frozen while they are built: set MODEL.BACKBONE.FREEZE_AT to 0 and let
    the schedule freeze. Under DistributedDataParallel the model is wrapped anew whenever what trains has changed.

    Args:
        schedule: What is frozen when.
        iterations_per_epoch: Length of the schedule's epoch; 1 counts in iterations.
        wrap: Wraps the model for distributed training, as it was wrapped at first.

    Raises:
        ValueError: (before training) If the optimizer lacks parameters that the schedule thaws.
    """

    def __init__(
        self,
        schedule: FreezeSchedule,
        *,
        iterations_per_epoch: int = 1,
        wrap: Callable[[nn.Module], nn.Module] = _distributed,
    ) -> None:
        if iterations_per_epoch < 1:
            raise ValueError(f"iterations_per_epoch must be at least 1, got {iterations_per_epoch}")
        self.schedule, self.iterations_per_epoch, self.wrap = schedule, iterations_per_epoch, wrap
        self._frozen_now = -1  # stages; none of the schedule's before training

    def before_train(self) -> None:
        """Stand where the schedule stands at the first iteration, having looked ahead to the last."""
        before = _trainable(self._backbone())
        first, last = self._epoch(self.trainer.start_iter), self._epoch(max(self.trainer.max_iter - 1, 0))
        freeze_stages(self._backbone(), min(map(self.schedule.freeze_at, range(first, max(first, last) + 1))))
        self._require_optimized()
        self._move_to(self.trainer.start_iter, before)

    def before_step(self) -> None:
        """Move with the schedule."""
        if self.schedule.freeze_at(self._epoch(self.trainer.iter)) != self._frozen_now:
            self._move_to(self.trainer.iter, _trainable(self._backbone()))

    def _epoch(self, iteration: int) -> int:
        return int(iteration) // self.iterations_per_epoch

    def _bare(self) -> nn.Module:
        model: nn.Module = self.trainer.model
        return model.module if isinstance(model, DistributedDataParallel) else model

    def _backbone(self) -> Backbone:
        return self._bare().backbone  # type: ignore[return-value]

    def _move_to(self, iteration: int, before: set[str]) -> None:
        """Freeze and thaw; wrap the model anew if what trains is no longer ``before``."""
        self._frozen_now = self.schedule.freeze_at(self._epoch(iteration))
        self.schedule.apply(self._backbone(), self._epoch(iteration))
        bare = self._bare()
        if bare is not self.trainer.model and _trainable(self._backbone()) != before:
            self.trainer.model = self.wrap(bare)

    def _require_optimized(self) -> None:
        optimized = {parameter for group in self.trainer.optimizer.param_groups for parameter in group["params"]}
        lacking = [name for name, p in self._backbone().named_parameters() if p.requires_grad and p not in optimized]
        if lacking:
            raise ValueError(
                f"the optimizer must hold all that the schedule thaws, but lacks {len(lacking)} parameters of the "
                f"backbone ({lacking[0]}, ...), frozen when it was built; set MODEL.BACKBONE.FREEZE_AT to 0"
            )


def _trainable(backbone: Backbone) -> set[str]:
    return {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
