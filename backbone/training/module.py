"""What Lightning trains: a detector with its optimizer, losses and metrics."""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics.classification import MulticlassJaccardIndex
from torchvision.transforms import v2

from backbone.features import Backbone
from backbone.hosts.torchvision import build_detector, unit_statistics
from backbone.recipe import SEGMENTERS, DetectorConfig
from backbone.training.coco.annotations import Annotations
from backbone.training.coco.data import IGNORED, Batch, CocoImages, Target, padded
from backbone.training.coco.metrics import CocoMetrics
from backbone.training.facts import RUN_KEY, RunFacts, facts_of, metadata_of, read_run, rebuild_detector
from backbone.training.parameter_groups import backbone_of, make_optimizer, parameter_groups, rate_factor
from backbone.weights.metadata import HEADER_KEY

AUX_WEIGHT = 0.4
"""Of the auxiliary classifier's loss (arXiv:1612.01105, section 5.1). torchvision's references take 0.5."""

_LONGEST_REASON = 400  # letters; torch lists every key


class DetectionModule(L.LightningModule):
    """A detector or segmenter of torchvision in training.

    Every step seeds torch by (seed, step, rank), so that the sampling of proposals is the same in a resumed run.

    Args:
        config: The recipe.
        validation: What is measured on; its metrics are logged as ``val/...``.
        class_names: Of the categories, by label.
        steps_per_epoch: Of one process.
        trained_on: The splits of the data, the first for training.
        facts: Of the run whose state will be loaded: what it started from is needed no more.

    Attributes:
        detector: torchvision's model on our backbone.
        metrics: The last validation's, by name.
    """

    def __init__(
        self,
        config: DetectorConfig,
        validation: CocoImages,
        class_names: Mapping[int, str],
        *,
        steps_per_epoch: int = 1,
        trained_on: Mapping[str, Annotations] | None = None,
        facts: RunFacts | None = None,
    ) -> None:
        super().__init__()
        self._steps_per_epoch = steps_per_epoch
        self._start_epoch = self._start_step = 0
        self.config, self.class_names = config, class_names
        torch.manual_seed(config.train.seed)
        self.detector = build_detector(config) if facts is None else rebuild_detector(config, facts)
        if config.train.channels_last:
            backbone_of(self.detector).to(memory_format=torch.channels_last)  # Keypoint R-CNN's head does not take it
        parameter_groups(self.detector, config.train)  # an error now rather than after the first epoch's data
        self.is_segmenter = config.detector in SEGMENTERS
        self.coco_metrics = CocoMetrics(validation.coco, class_names, config.detector)
        self.overlap = MulticlassJaccardIndex(
            config.num_classes, average="none", ignore_index=IGNORED, zero_division=math.nan
        )
        self.metrics: dict[str, float] = {}
        self._labels = next(iter(trained_on.values())).labels if trained_on else validation.labels
        self._fingerprints = {split: each.fingerprint for split, each in (trained_on or {}).items()}

    @property
    def facts(self) -> RunFacts:
        """What the trained weights need beside their tensors."""
        return facts_of(self.detector, self.config, self.class_names, self._labels, self._fingerprints)

    def forward(self, images: list[Tensor], targets: Sequence[Target] | None = None) -> Any:  # noqa: ANN401 - a dict or a list
        """Return losses by name in training; otherwise detections, or a segmenter's ``{"out": (N, classes, H, W)}``."""
        if not self.is_segmenter:
            return self.detector(images, targets)
        batch = normalised(backbone_of(self.detector), self.config, images)
        if self.config.train.channels_last:
            batch = batch.contiguous(memory_format=torch.channels_last)
        outputs = self.detector(batch)
        if targets is None:
            return outputs
        classes = padded([target["classes"] for target in targets], IGNORED)
        losses = {f"loss_{name}": F.cross_entropy(out, classes, ignore_index=IGNORED) for name, out in outputs.items()}
        return {name: loss * (AUX_WEIGHT if name == "loss_aux" else 1.0) for name, loss in losses.items()}

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Return the sum of the losses; stop where it is no number."""
        images, targets = batch
        torch.manual_seed(step_seed(self.config.train.seed, self.global_step, self.global_rank))
        losses = {f"loss_{name.removeprefix('loss_')}": loss for name, loss in self(images, targets).items()}
        total = torch.stack(list(losses.values())).sum()
        if not math.isfinite(total.item()):
            values = ", ".join(f"{name} {loss.item():g}" for name, loss in losses.items())
            names = ", ".join(target["file_name"] for target in targets)
            raise FloatingPointError(
                f"the loss is {total.item()} in step {self.global_step} of epoch {self.current_epoch}: {values}; the "
                f"batch's images: {names}. Look at them and their annotations, or lower learning_rate, lengthen "
                f"warmup_steps or set gradient_clip_norm"
            )
        shown = {name: loss.detach() for name, loss in {"loss": total, **losses}.items()}
        self.log_dict(shown, prog_bar=True)
        means = {f"epoch/{name}": loss for name, loss in shown.items()}
        self.log_dict(means, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(images))
        return total

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Add one batch's detections to the metrics."""
        images, targets = batch
        outputs = self(images)
        if self.is_segmenter:
            for scores, target in zip(outputs["out"], targets, strict=True):
                self.overlap.update(scores.argmax(0)[None], target["classes"][None])
        else:
            for prediction, target in zip(outputs, targets, strict=True):
                self.coco_metrics.add(target["image_id"], prediction)

    def on_validation_epoch_start(self) -> None:
        """Start from nothing."""
        self.coco_metrics.reset()
        self.overlap.reset()

    def on_validation_epoch_end(self) -> None:
        """Measure what all processes found."""
        if self.is_segmenter:
            by_class = self.overlap.compute()  # NaN for a class that is neither there nor predicted
            names = {0: "background", **self.class_names}
            self.metrics = {"mIoU": by_class.nanmean().item()}
            self.metrics |= {f"IoU/{name}": by_class[label].item() for label, name in names.items()}
        else:
            self.metrics = self.coco_metrics.compute()
        self.log_dict({f"val/{name}": value for name, value in self.metrics.items()}, rank_zero_only=True)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return the optimizer over all parameters and the learning rate's course by step."""
        train = self.config.train
        optimizer = make_optimizer(parameter_groups(self.detector, train), train)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _rate_factor(self, step: int) -> float:
        """Return the factor on every learning rate: an interrupted run may have had other steps in its epochs."""
        steps = step - self._start_step + self._start_epoch * self._steps_per_epoch  # whole, so that it is exact
        return rate_factor(self.config.train, step, steps / self._steps_per_epoch)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the recipe, and what else the weights need, with them."""
        checkpoint["recipe"] = self.config.model_dump(mode="json")
        checkpoint[RUN_KEY] = self.facts.to_json()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the state of every parameter from the checkpoint and the rates from the recipe, which may have changed.

        Frozen norms and batch norms have the same keys, so that a changed freeze needs nothing here.
        """
        groups = parameter_groups(self.detector, self.config.train)
        self._start_epoch, self._start_step = checkpoint["epoch"] + 1, checkpoint["global_step"]
        factor = self._rate_factor(checkpoint["global_step"])
        for saved, group in zip(checkpoint["optimizer_states"][0]["param_groups"], groups, strict=True):
            saved |= {"initial_lr": group["lr"], "lr": group["lr"] * factor, "weight_decay": group["weight_decay"]}
        checkpoint["lr_schedulers"][0]["base_lrs"] = [group["lr"] for group in groups]


def normalised(backbone: Backbone, config: DetectorConfig, images: Sequence[Tensor]) -> Tensor:
    """Return a segmenter's batch as its weights expect it, padded with what is zero after normalising."""
    preprocessing = backbone.preprocessing
    mean, std = unit_statistics(preprocessing, config.backbone.in_channels)
    normalise = v2.Normalize(list(config.image_mean or mean), list(config.image_std or std))
    flipped = preprocessing.channel_order == "bgr"
    return padded([normalise(image.flip(0) if flipped else image) for image in images], 0.0)


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return a seed that only these three decide."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0])


def load_detector_state(detector: nn.Module, path: Path) -> None:
    """Load model.pth or last.ckpt of a run.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or of another detector.
    """
    state, _ = read_run(path)
    try:
        detector.load_state_dict(state)
    except RuntimeError as error:
        told = " ".join(str(error).split())
        shortened = told if len(told) <= _LONGEST_REASON else f"{told[:_LONGEST_REASON]} ..."
        raise ValueError(
            f"{path}: does not fit the recipe's detector; use the recipe.yaml beside it. ({shortened})"
        ) from None


def backbone_state(detector: nn.Module, config: DetectorConfig) -> dict[str, Tensor]:
    """Return the backbone's state, which `weights:` takes, with what it was trained on: pixels, strides, eps.

    C5 is part of it also where it runs as the box head.
    """
    body = backbone_of(detector).body
    state = OrderedDict(portable_state(body))
    if config.box_head == "c5":
        state |= {f"layer4.{name}": value for name, value in portable_state(detector.roi_heads.box_head[0]).items()}  # type: ignore[union-attr,index,arg-type]
    state._metadata = OrderedDict({HEADER_KEY: metadata_of(body, config).to_json()})  # type: ignore[attr-defined] # where `convert` has it
    return state


def portable_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the state dict on the CPU in the usual memory layout, as other programs expect it."""
    return {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
