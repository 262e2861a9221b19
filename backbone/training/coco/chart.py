"""A picture of a data set before training: objects by class, sizes of boxes against the anchors, images with boxes."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.transforms import v2

from backbone.hosts.torchvision import build_detector
from backbone.images import UnreadableImageError, read_image
from backbone.recipe import SEGMENTERS, DetectorConfig
from backbone.training.coco.annotations import Annotations
from backbone.training.coco.records import printable
from backbone.training.pictures import draw

NUM_ON_SHEET: Final = 16
_COLUMNS: Final = 4
_MAX_CLASSES: Final = 30
_MAX_SIDE: Final = 640  # of an image on the sheet, in pixels
_TOP_INCHES, _ROW_INCHES = 4.75, 3.55
_INK, _ACCENT = "#4363d8", "#e6194b"


def save_chart(annotations: Annotations, config: DetectorConfig | None, path: Path) -> None:
    """Draw one split.

    Args:
        annotations: The cleaned split.
        config: The recipe whose resizing and anchors the boxes are held against; None takes a Faster R-CNN's.
        path: File to write.
    """
    config = config or _usual()
    images = chosen(annotations.content["images"])
    rows = max(1, -(-len(images) // _COLUMNS))
    figure = Figure(figsize=(15, _TOP_INCHES + rows * _ROW_INCHES), layout="constrained")
    top, sheet = figure.subfigures(2, 1, height_ratios=(_TOP_INCHES, rows * _ROW_INCHES)).flat  # type: ignore[union-attr]
    left, right = top.subplots(1, 2)
    _draw_classes(left, annotations)
    _draw_sizes(right, annotations, config)
    panels = sheet.subplots(rows, _COLUMNS, squeeze=False)
    for axes in panels.flat:
        axes.axis("off")
    for axes, image in zip(panels.flat, images, strict=False):
        _draw_image(axes, annotations, image)
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():  # names may have letters that the font lacks
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(path, dpi=80)


def anchor_sizes(config: DetectorConfig) -> list[float]:
    """Return the sides of a recipe's anchors in pixels of the resized image, from the smallest; none of a segmenter.

    FCOS has points: the sizes are its levels' strides.
    """
    if config.detector in SEGMENTERS:
        return []
    backbone = config.backbone.model_copy(update={"weights": None})
    with torch.device("meta"):  # it takes no memory
        detector = build_detector(config.model_copy(update={"backbone": backbone}))
    generator: Any = detector.rpn.anchor_generator if hasattr(detector, "rpn") else detector.anchor_generator  # type: ignore[union-attr]
    return sorted({float(size) for level in generator.sizes for size in level})


def resized_sides(annotations: Annotations, config: DetectorConfig) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the square root of each box's area, in pixels of the image as the detector resizes it for evaluation."""
    factors = {
        image["id"]: min(
            config.min_size[-1] / min(image["width"], image["height"]),
            config.max_size / max(image["width"], image["height"]),
        )
        for image in annotations.content["images"]
    }
    sides = [factors[a["image_id"]] * (a["bbox"][2] * a["bbox"][3]) ** 0.5 for a in annotations.content["annotations"]]
    return np.array(sides, np.float64)


def chosen(images: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return up to 16 images at even distances, the same each time."""
    places = np.linspace(0, len(images) - 1, min(NUM_ON_SHEET, len(images))).round().astype(int)
    return [images[place] for place in places]


def _usual() -> DetectorConfig:
    return DetectorConfig.model_validate({"detector": "faster_rcnn", "backbone": {"name": "resnet50", "norm": "bn"}})


def _draw_classes(axes: Any, annotations: Annotations) -> None:  # noqa: ANN401 - matplotlib's
    counts = sorted(annotations.num_objects.items(), key=lambda item: -item[1])
    kept = counts[:_MAX_CLASSES][::-1]
    bars = axes.barh(range(len(kept)), [count for _, count in kept], color=_INK)
    axes.bar_label(bars, padding=3, fontsize=7)
    axes.set_yticks(range(len(kept)), [printable(name)[:30] for name, _ in kept], fontsize=7, parse_math=False)
    more = f", the {len(kept)} largest of {len(counts)}" if len(kept) < len(counts) else ""
    axes.set(title=f"objects by class{more}", xlabel="objects")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_sizes(axes: Any, annotations: Annotations, config: DetectorConfig) -> None:  # noqa: ANN401 - matplotlib's
    sides, anchors = resized_sides(annotations, config), anchor_sizes(config)
    if len(sides):
        low, high = np.log2(max(sides.min(), 0.5)), np.log2(max(sides.max(), 1.0))
        axes.hist(sides.clip(0.5), bins=np.logspace(low - 0.1, high + 0.1, 50, base=2), color=_INK)
    for number, anchor in enumerate(anchors):
        axes.axvline(anchor, color=_ACCENT, linewidth=1, label="anchors" if not number else None)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.get_major_locator().set_params(integer=True)
    below = (sides < anchors[0] / 2).mean() if anchors and len(sides) else 0.0
    small = f"; {below:.0%} are below half the smallest anchor" if below else ""
    axes.set(
        title=f"sizes of boxes{small}", ylabel="objects",
        xlabel=f"square root of area, pixels of the image resized to {config.min_size[-1]} (at most {config.max_size})",
    )  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
    if anchors:
        axes.legend(frameon=False)


def _draw_image(axes: Any, annotations: Annotations, image: dict[str, Any]) -> None:  # noqa: ANN401 - matplotlib's
    axes.set_title(printable(image["file_name"])[-40:], fontsize=8, parse_math=False)
    try:
        picture = v2.functional.pil_to_tensor(read_image(annotations.folder / image["file_name"]))
    except UnreadableImageError as error:
        axes.text(0.5, 0.5, printable(error.reason), ha="center", wrap=True, parse_math=False, fontsize=8)
        return
    factor = min(1.0, _MAX_SIDE / max(picture.shape[-2:]))
    size = [max(1, round(side * factor)) for side in picture.shape[-2:]]
    small = v2.functional.resize(picture, size, antialias=True).float() / 255
    objects = [a for a in annotations.content["annotations"] if a["image_id"] == image["id"]]
    boxes = torch.tensor([a["bbox"] for a in objects], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    found: dict[str, Tensor] = {
        "boxes": (boxes * factor).clamp(torch.zeros(4), torch.tensor([size[1], size[0]] * 2, dtype=torch.float32)),
        "labels": torch.tensor([annotations.labels[a["category_id"]] for a in objects], dtype=torch.int64),
    }
    names = {label: printable(name) for label, name in annotations.class_names.items()}
    axes.imshow(draw(small, found, names).permute(1, 2, 0).numpy())
