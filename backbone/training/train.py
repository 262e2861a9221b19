"""Train a detector or segmenter of torchvision on any backbone: what ``backbone train`` does."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import lightning as L
import typer
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger

from backbone import FreezeSchedule
from backbone.console import console, readable_errors, say
from backbone.images import UnreadableImageError
from backbone.recipe import SEGMENTERS, DetectorConfig, load_detector_config
from backbone.training.advice import data_notes, warm_up_note
from backbone.training.averaging import AveragedWeights
from backbone.training.callbacks import AtomicCheckpointIO, FreezeByEpoch, History, save_atomically
from backbone.training.coco.annotations import read_annotations, require_same_categories
from backbone.training.coco.data import CocoImages, make_loader
from backbone.training.coco.summary import save_skipped
from backbone.training.endings import EXIT_PICTURES, resumable, show
from backbone.training.facts import metadata_of, with_facts
from backbone.training.fine_tuning import start_from
from backbone.training.launch import common_settings, require_possible, tracked
from backbone.training.module import DetectionModule, backbone_state, portable_state
from backbone.training.parameter_groups import backbone_of
from backbone.training.pictures import save_curves
from backbone.training.reports import main_metrics, print_metrics, save_metrics, save_sheet
from backbone.training.run_folder import CHECKPOINT, RunFolder

SPLITS: Final = ("train", "val")


def trainer_for(
    config: DetectorConfig, out: Path, history: History, device: str, devices: int, num_nodes: int
) -> L.Trainer:
    """Return Lightning's trainer: its strategies, precision, clipping, logging and our callbacks."""
    schedule = FreezeSchedule(config.train.freeze_schedule or {0: config.backbone.freeze_at})
    checkpoint = ModelCheckpoint(out, CHECKPOINT, save_on_train_epoch_end=True, enable_version_counter=False)
    averaging = [] if config.train.ema_decay is None else [AveragedWeights(config.train.ema_decay)]
    bars = [RichProgressBar()] if console.is_terminal else []
    return L.Trainer(
        **common_settings(config, device),
        devices=devices,
        num_nodes=num_nodes,
        strategy="ddp" if devices * num_nodes > 1 else "auto",
        max_epochs=config.train.epochs,
        gradient_clip_val=config.train.gradient_clip_norm,
        check_val_every_n_epoch=config.train.validate_every,
        log_every_n_steps=1,
        logger=TensorBoardLogger(out, name=None, version="tensorboard"),
        callbacks=[FreezeByEpoch(schedule, console), *averaging, history, checkpoint, *bars],
        plugins=[AtomicCheckpointIO()],
    )


def save_weights(module: DetectionModule, out: Path) -> list[Path]:
    """Write the detector and its backbone, each with what it needs to stand alone; return the paths."""
    model, backbone = paths = [out / "model.pth", out / "backbone.pth"]
    known = metadata_of(backbone_of(module.detector).body, module.config)
    save_atomically(with_facts(portable_state(module.detector), module.facts, known), model)
    save_atomically(backbone_state(module.detector, module.config), backbone)
    return paths


def save_results(
    module: DetectionModule, history: History, images: CocoImages, class_names: Mapping[int, str], out: Path
) -> tuple[list[Path], list[str]]:
    """Write numbers, then show the table and draw the pictures; return the paths and what could not be made."""
    metrics, curves, sheet = paths = [out / name for name in ("metrics.json", "curves.png", "sheet.png")]
    save_metrics({"metrics": module.metrics, "epochs": history.epochs}, metrics)
    steps = {
        "the table": lambda: print_metrics(module.metrics, console),
        curves.name: lambda: save_curves(history.epochs, main_metrics(module.metrics), curves),
        sheet.name: lambda: save_sheet(module, images, class_names, sheet),
    }
    failed = show(steps)
    return [path for path in paths if path.name not in failed], failed


def start(module: DetectionModule, config: DetectorConfig, class_names: Mapping[int, str]) -> list[str]:
    """Load what the recipe starts from, if anything, and return what there is to say of it."""
    if config.train.start_from is None:
        return []
    return [str(start_from(module.detector, Path(config.train.start_from), config, class_names))]


def train(
    config: Path,
    data: Path,
    out: Path,
    *,
    resume: bool = False,
    device: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    strict: bool = False,
) -> None:
    """Check all that can be checked before the first step, train, and show what came out."""
    with readable_errors(ValueError, OSError):
        recipe = load_detector_config(config)
        require_possible(recipe, device)
        splits = {split: read_annotations(data, split, recipe, strict=strict, track=tracked) for split in SPLITS}
        require_same_categories(splits)
        images = {split: CocoImages(each, recipe, train=split == "train") for split, each in splits.items()}
        history = History(console, main_metric="mIoU" if recipe.detector in SEGMENTERS else "AP50")
        trainer = trainer_for(recipe, out, history, device, devices, num_nodes)
        run = RunFolder(out, recipe, resume=resume, is_first_process=trainer.is_global_zero)
        notes = data_notes(run.facts, splits)
        ranks = {"rank": trainer.global_rank, "world_size": trainer.world_size}
        loaders = {split: make_loader(each, **ranks) for split, each in images.items()}
        class_names = splits["val"].class_names
        module = DetectionModule(
            recipe,
            images["val"],
            class_names,
            steps_per_epoch=len(loaders["train"]),
            trained_on=splits,
            facts=run.facts,
        )
        started = start(module, recipe, class_names) if not run.checkpoint else []
        if trainer.is_global_zero:  # nothing is written before all that can be checked has been
            say("\n".join([*(each.summary() for each in splits.values()), *started]))
            run.begin(config, console)
            save_skipped({each.file: each.skipped for each in splits.values()}, out / "skipped.csv")
            for note in filter(None, [*notes, warm_up_note(recipe.train, len(loaders["train"]))]):
                say(note)
    with resumable(out), readable_errors(FloatingPointError, UnreadableImageError):
        trainer.fit(module, loaders["train"], loaders["val"], ckpt_path=run.checkpoint)
        paths = save_weights(module, out) if trainer.is_global_zero else []
        trainer.validate(module, loaders["val"], verbose=False)
        history.epochs[-1] |= module.metrics  # whatever validate_every says
        if not trainer.is_global_zero:
            return
        more, failed = save_results(module, history, images["val"], class_names, out)
    for path in [*paths, *more]:
        say(str(path))
    if failed:
        raise typer.Exit(EXIT_PICTURES)
