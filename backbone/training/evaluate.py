"""Measure a trained detector or segmenter: what ``backbone evaluate`` does."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from backbone.console import console, readable_errors, say
from backbone.images import UnreadableImageError
from backbone.inference.optimize import optimize_for_inference
from backbone.training.coco.annotations import read_annotations
from backbone.training.coco.data import CocoImages, make_loader
from backbone.training.facts import read_run, recipe_of
from backbone.training.launch import common_settings, require_possible, tracked
from backbone.training.module import DetectionModule, load_detector_state, normalised
from backbone.training.parameter_groups import backbone_of
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
    dtype: str | None = None,
    calibration: int = 100,
) -> None:
    """Check, load, measure.

    With ``dtype`` a copy for inference is measured whose backbone computes in it, and its heads in float32, whatever
    the recipe's precision. In int8 the first images of the split ``train``, ``calibration`` of them, tell the ranges.
    """
    device = "cpu" if dtype == "int8" and device == "auto" else device
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
        if dtype is not None:
            shown = _shown(module, data, calibration) if dtype == "int8" else None
            copy: Any = optimize_for_inference(module.detector, dtype=getattr(torch, dtype), calibration=shown)
            module.detector = copy
            say(str(copy.optimization))
    settings = common_settings(recipe, device)
    if dtype is not None:
        settings["precision"] = "32-true"  # what is not asked to compute in another dtype, the heads, keeps float32
    trainer = L.Trainer(**settings, devices=1, logger=False, enable_checkpointing=False)
    with readable_errors(UnreadableImageError):
        trainer.validate(module, make_loader(images), verbose=False)
    print_metrics(module.metrics, console)
    if json_file:
        save_metrics(module.metrics, json_file)
        say(str(json_file))
    if sheet:
        save_sheet(module, images, annotations.class_names, sheet)
        say(str(sheet))


def _shown(module: DetectionModule, data: Path, count: int) -> list[list[Tensor] | Tensor]:
    """Return batches of one training image each, without augmentation, as the detector takes them."""
    recipe = module.config
    annotations = read_annotations(data, "train", recipe, class_names=module.class_names, track=tracked)
    images = CocoImages(annotations, recipe, train=False)
    if not 1 <= count <= len(images):
        raise ValueError(f"calibration must be 1 to the {len(images)} images of the split train, got {count}")
    chosen = [[images[0, index][0]] for index in range(count)]
    if not module.is_segmenter:
        return list(chosen)
    return [normalised(backbone_of(module.detector), recipe, each) for each in chosen]
