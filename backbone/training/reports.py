"""What a measured detector shows: a table by class, a JSON file, a sheet of pictures."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from backbone.training.coco.data import CocoImages
from backbone.training.coco.records import printable
from backbone.training.module import DetectionModule
from backbone.training.pictures import draw_sheet

NUM_ON_SHEET: Final = 8
_OF_CLASS: Final = re.compile(r"(?P<kind>(?:segm/|keypoints/)?AP|IoU)/")


def print_metrics(metrics: Mapping[str, float], console: Console) -> None:
    """Print the main metrics in one line and those of each class in a table."""
    main, by_class = main_metrics(metrics), {name: value for name, value in metrics.items() if is_of_class(name)}
    console.print(", ".join(f"{name} {metrics[name]:.3f}" for name in main))
    kinds = list(dict.fromkeys(kind_and_class(name)[0] for name in by_class))
    table = Table("class", *kinds)
    for name in dict.fromkeys(kind_and_class(name)[1] for name in by_class):
        table.add_row(Text(printable(name)), *(f"{by_class[f'{kind}/{name}']:.3f}" for kind in kinds))
    console.print(table)


def main_metrics(metrics: Mapping[str, float]) -> list[str]:
    """Return the names that are not of one class."""
    return [name for name in metrics if not is_of_class(name)]


def is_of_class(name: str) -> bool:
    """Whether a metric's name is such as ``AP/circle``, ``segm/AP/circle`` or ``IoU/circle``."""
    return _OF_CLASS.match(name) is not None


def kind_and_class(name: str) -> tuple[str, str]:
    """Return the two parts of a class's metric: ``segm/AP`` and ``vehicle/car``, whatever letters the class has."""
    match = _OF_CLASS.match(name)
    assert match is not None
    return match["kind"], name[match.end() :]


def save_metrics(content: Mapping[str, Any], path: Path) -> None:
    """Write JSON, with null for what cannot be measured: a class without annotations."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_without_nan(content), indent=1) + "\n")


def _without_nan(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@torch.no_grad()
def save_sheet(module: DetectionModule, data: CocoImages, class_names: Mapping[int, str], path: Path) -> None:
    """Draw the truth and the predictions of the first images of ``data``."""
    module.eval()
    images, truths = zip(*(data[0, index] for index in range(min(NUM_ON_SHEET, len(data)))), strict=True)
    found = []
    for image in images:
        outputs = module([image.to(module.device)])
        if module.is_segmenter:
            found.append({"classes": outputs["out"][0].argmax(0).cpu()})
        else:
            found.append({name: value.cpu() for name, value in outputs[0].items()})
    draw_sheet(images, truths, found, class_names, path)
