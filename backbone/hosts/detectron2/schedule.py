"""FreezeSchedule in detectron2's training loop."""

from collections.abc import Callable
from functools import partial

from detectron2.engine import HookBase
from detectron2.engine.defaults import create_ddp_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from backbone.features import Backbone
from backbone.freeze import FreezeSchedule

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
        self._freeze_at: int | None = None

    def before_train(self) -> None:
        """Stand where the schedule stands at the first iteration."""
        self._apply(self.trainer.start_iter)

    def before_step(self) -> None:
        """Move with the schedule."""
        self._apply(self.trainer.iter)

    def _apply(self, iteration: int) -> None:
        epoch, before = iteration // self.iterations_per_epoch, self._freeze_at
        self._freeze_at = self.schedule.freeze_at(epoch)
        if self._freeze_at == before:
            return
        model = self.trainer.model
        bare = model.module if isinstance(model, DistributedDataParallel) else model
        backbone: Backbone = bare.backbone
        if not self.schedule.apply(backbone, epoch):
            return
        optimized = {parameter for group in self.trainer.optimizer.param_groups for parameter in group["params"]}
        lacking = [name for name, p in backbone.named_parameters() if p.requires_grad and p not in optimized]
        if lacking:
            raise ValueError(
                f"the optimizer must hold all that the schedule thaws, but lacks {len(lacking)} parameters of the "
                f"backbone ({lacking[0]}, ...), frozen when it was built; set MODEL.BACKBONE.FREEZE_AT to 0"
            )
        if bare is not model:
            self.trainer.model = self.wrap(bare)
