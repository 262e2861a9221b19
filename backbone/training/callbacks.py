"""What happens between epochs: freezing, checkpoints that are whole or not there, and the history for the curves."""

import errno
import gc
import math
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from rich.console import Console
from torch import nn

from backbone import FreezeSchedule, freeze_report
from backbone.training.parameter_groups import backbone_of
from backbone.weights.writing import write_atomically


class FreezeByEpoch(Callback):
    """Freezes and thaws the detector's backbone at the start of each epoch, under every strategy.

    DistributedDataParallel notes when it wraps a model which parameters get gradients, so it wraps anew after a change;
    nothing has to look for unused parameters.
    """

    def __init__(self, schedule: FreezeSchedule, console: Console) -> None:
        self.schedule, self.console = schedule, console

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Apply the schedule to this epoch."""
        assert isinstance(pl_module.detector, nn.Module)
        backbone = backbone_of(pl_module.detector)
        if not self.schedule.apply(backbone, trainer.current_epoch):
            return
        frozen = [stage for stage, report in freeze_report(backbone).items() if report.frozen]
        if trainer.is_global_zero:
            stages = ", ".join(frozen) or "no stages"
            self.console.print(f"epoch {trainer.current_epoch}: frozen are {stages}", soft_wrap=True)
        if isinstance(trainer.strategy, DDPStrategy):
            trainer.strategy.model = pl_module
            gc.collect()  # the old wrapper's hooks on the parameters go with it
            trainer.strategy.configure_ddp()


class History(Callback):
    """Losses and metrics of each epoch, kept in the checkpoint so that a resumed run has them all.

    Attributes:
        epochs: A row for each finished epoch: ``epoch``, ``seconds``, of them ``training_seconds``, ``loss``, ..., and
            where it was measured ``AP``.
    """

    def __init__(self, console: Console, *, main_metric: str) -> None:
        self.epochs: list[dict[str, float]] = []
        self.console, self.main_metric = console, main_metric
        self._start = self._trained = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._start = self._trained = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:  # noqa: ANN401
        """Note the time: a validation may follow."""
        self._trained = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the epoch, and print it in one line."""
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        row = {name.removeprefix("epoch/"): value for name, value in logged.items() if name.startswith("epoch/")}
        metrics = {name.removeprefix("val/"): value for name, value in logged.items() if name.startswith("val/")}
        row |= {"epoch": trainer.current_epoch, "seconds": time.perf_counter() - self._start}
        row["training_seconds"] = self._trained - self._start
        assert trainer.check_val_every_n_epoch is not None
        measured = (trainer.current_epoch + 1) % trainer.check_val_every_n_epoch == 0
        self.epochs.append(row | (metrics if measured else {}))
        if trainer.is_global_zero:
            self.console.print(self._line(trainer, self.epochs[-1]), highlight=False, soft_wrap=True)

    def _line(self, trainer: L.Trainer, row: dict[str, float]) -> str:
        losses = ", ".join(f"{name} {value:.3f}" for name, value in row.items() if name.startswith("loss"))
        metric = f", {self.main_metric} {row[self.main_metric]:.3f}" if self.main_metric in row else ""
        assert trainer.max_epochs is not None
        left = (trainer.max_epochs - row["epoch"] - 1) * row["seconds"]
        clock = f"{row['seconds']:.0f} s, {math.ceil(left / 60)} min left" if left else f"{row['seconds']:.0f} s"
        return f"epoch {row['epoch'] + 1:.0f}/{trainer.max_epochs}: {losses}{metric} ({clock})"

    def state_dict(self) -> dict[str, Any]:
        """Return the rows."""
        return {"epochs": self.epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the rows of the interrupted run."""
        self.epochs = list(state_dict["epochs"])


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that a kill or a full disk cannot leave half written, and that carry no code.

    The file is written beside its name, forced to the disk, and renamed: under its own name there is always a whole
    one, the old or the new. Lightning's own passes through the system's temporary folder, from where a move to
    another disk is a copy.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None) -> None:
        """Write ``checkpoint`` to ``path``."""
        save_atomically(checkpoint, Path(path))

    def load_checkpoint(
        self, path: str | Path, map_location: object = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read a checkpoint of plain tensors and numbers."""
        return load_checkpoint(Path(path))


def save_atomically(content: dict[str, Any], path: Path) -> None:
    """Write with torch.save, so that ``path`` is at any time absent, the old file, or the whole new one.

    Raises:
        OSError: If it cannot be written; says what is there then. ``errno`` is that of a full disk where torch tells
            no other.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    old = "the old file is as it was" if path.exists() else "nothing is left of it"
    try:
        write_atomically(path, lambda draft: torch.save(content, draft))
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter when the disk is full
        reason = getattr(error, "strerror", None) or "No space left on device, or the file is too large"
        number = getattr(error, "errno", None) or errno.ENOSPC
        raise OSError(number, f"{path} could not be written ({reason}), {old}") from None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what ``save_atomically`` wrote, on the CPU.

    Raises:
        ValueError: If the file is damaged or carries code.
    """
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes fail in many ways
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{path}: cannot be read as a checkpoint ({reason}); put back a copy, or remove it to start anew"
        ) from None
    return content
