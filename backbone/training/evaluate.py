"""Measure a trained detector or segmenter: what ``backbone evaluate`` does."""

from pathlib import Path

import lightning as L

from backbone.console import console, readable_errors, say
from backbone.images import UnreadableImageError
from backbone.training.coco.annotations import read_annotations
from backbone.training.coco.data import CocoImages, make_loader
from backbone.training.facts import read_run, recipe_of
from backbone.training.launch import common_settings, require_possible, tracked
from backbone.training.module import DetectionModule, load_detector_state
from backbone.training.reports import print_metrics, save_metrics, save_sheet


def evaluate(
    config: Path | None,
    weights: Path,
    data: Path,
    *,
    split: str = "val",
    device: str = "auto",
    json_file: Path | None = None,
    sheet: Path | None = None,
) -> None:
    """Check, load, measure."""
    with readable_errors(ValueError, OSError):
        _, facts = read_run(weights)
        recipe = recipe_of(config, facts, weights)
        require_possible(recipe, device)
        names = facts.class_names if facts else None
        annotations = read_annotations(data, split, recipe, class_names=names, track=tracked)
        say(annotations.summary())
        images = CocoImages(annotations, recipe, train=False)
        module = DetectionModule(recipe, images, annotations.class_names, facts=facts)
        load_detector_state(module.detector, weights)
    trainer = L.Trainer(**common_settings(recipe, device), devices=1, logger=False, enable_checkpointing=False)
    with readable_errors(UnreadableImageError):
        trainer.validate(module, make_loader(images), verbose=False)
    print_metrics(module.metrics, console)
    if json_file:
        save_metrics(module.metrics, json_file)
        say(str(json_file))
    if sheet:
        save_sheet(module, images, annotations.class_names, sheet)
        say(str(sheet))
