"""Two pictures that show whether a training went well: the curves, and predictions beside the truth."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms import v2
from torchvision.utils import draw_bounding_boxes, draw_keypoints, draw_segmentation_masks

PALETTE: Final = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#f032e6", "#9a6324", "#808000")
MIN_SCORE: Final = 0.5
FONT: Final = str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))
FONT_SIZE: Final = 18  # pixels
SIDE: Final = 320
"""Shorter side of a picture on the sheet, in pixels."""


def save_curves(epochs: Sequence[Mapping[str, float]], main_metrics: Sequence[str], path: Path) -> None:
    """Draw the losses and the metrics of each epoch side by side."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    losses = [name for name in epochs[0] if name.startswith("loss")]
    for name, color in zip(losses, ("#222222", *PALETTE), strict=False):
        left.plot(
            [row["epoch"] + 1 for row in epochs], [row[name] for row in epochs], label=name.replace("_", " "),
            color=color, linewidth=2.2 if name == "loss" else 1.3, marker="o", markersize=3,
        )  # fmt: skip
    left.set(xlabel="epoch", ylabel="mean training loss", title="losses")
    left.set_ylim(bottom=0)
    for name, color in zip(main_metrics, PALETTE, strict=False):
        rows = [row for row in epochs if name in row]
        right.plot(
            [row["epoch"] + 1 for row in rows], [row[name] for row in rows], label=name, color=color, marker="o",
            markersize=3,
        )  # fmt: skip
    right.set(xlabel="epoch", title="validation", ylim=(0, 1))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(0.5, len(epochs) + 0.5)
        axes.locator_params(axis="x", integer=True)
        if axes.lines:
            axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def draw_sheet(
    images: Sequence[Tensor],
    truths: Sequence[Mapping[str, Any]],
    predictions: Sequence[Mapping[str, Any]],
    class_names: Mapping[int, str],
    path: Path,
) -> None:
    """Draw a row for each image: the truth on the left, what was predicted on the right."""
    rows = (len(images) + 1) // 2
    height, width = images[0].shape[-2:]
    figure = Figure(figsize=(14, 0.6 + rows * 3.5 * height / width), layout="constrained")
    panels = figure.subplots(rows, 4, squeeze=False)
    for axes in panels.flat:
        axes.axis("off")
    for number, image in enumerate(images):
        drawn = (draw(image, truths[number], class_names), draw(image, predictions[number], class_names))
        for side, picture in enumerate(drawn):
            panels[number // 2, 2 * (number % 2) + side].imshow(picture.permute(1, 2, 0).numpy())
    for column, title in enumerate(("truth", f"predicted, score {MIN_SCORE} or more") * 2):
        panels[0, column].set_title(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def draw(
    image: Tensor, found: Mapping[str, Any], class_names: Mapping[int, str], *, min_score: float = MIN_SCORE
) -> Tensor:
    """Return the image (3, H, W), enlarged, with boxes, masks, keypoints or classes drawn on it, as uint8.

    Args:
        image: RGB, of 0 to 1.
        found: What a target or a detector's answer holds.
        class_names: By label.
        min_score: Objects with less are left out.
    """
    factor = max(1.0, SIDE / min(image.shape[-2:]))
    size = [round(side * factor) for side in image.shape[-2:]]
    canvas: Tensor = (v2.functional.resize(image, size, antialias=True).clamp(0, 1) * 255).to(torch.uint8)
    if "classes" in found:
        classes = v2.functional.resize(found["classes"][None], size, v2.InterpolationMode.NEAREST)[0]
        labels = list(class_names)
        masks = torch.stack([classes == label for label in labels])
        canvas = draw_segmentation_masks(canvas, masks, alpha=0.6, colors=colors_of(labels))
        canvas = _draw_legend(canvas, {label: class_names[label] for label in labels if (classes == label).any()})
    else:
        canvas = _draw_objects(canvas, found, class_names, factor, min_score)
    return canvas


def _draw_legend(canvas: Tensor, names: Mapping[int, str]) -> Tensor:
    """Write which color is which class into the upper left corner."""
    picture = Image.fromarray(canvas.permute(1, 2, 0).numpy())
    pen, font, top = ImageDraw.Draw(picture), ImageFont.truetype(FONT, FONT_SIZE), 4
    for color, name in zip(colors_of(list(names)), names.values(), strict=True):
        left, upper, right, lower = pen.textbbox((10, top), name, font)
        pen.rectangle((left - 4, upper - 3, right + 4, lower + 3), fill=color)
        pen.text((10, top), name, fill="white", font=font)
        top += FONT_SIZE + 8
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _draw_objects(
    canvas: Tensor, found: Mapping[str, Any], class_names: Mapping[int, str], factor: float, min_score: float
) -> Tensor:
    """Draw what is on an image that was enlarged by ``factor``; of predictions only those with enough score."""
    kept = found["scores"] >= min_score if "scores" in found else torch.ones(len(found["labels"]), dtype=torch.bool)
    labels = found["labels"][kept].tolist()
    if not labels:
        return canvas
    titles = [class_names.get(label, str(label)) for label in labels]
    if "scores" in found:
        titles = [f"{title} {score:.2f}" for title, score in zip(titles, found["scores"][kept].tolist(), strict=True)]
    if "masks" in found:
        masks = found["masks"][kept].flatten(0, -3).float()  # predicted ones are (N, 1, H, W)
        masks = v2.functional.resize(masks, list(canvas.shape[-2:])) >= 0.5
        canvas = draw_segmentation_masks(canvas, masks, alpha=0.5, colors=colors_of(labels))
    canvas = draw_bounding_boxes(
        canvas, found["boxes"][kept] * factor, titles, colors_of(labels), width=3, font=FONT, font_size=FONT_SIZE,
        label_colors=["white"] * len(labels), fill_labels=True,
    )  # fmt: skip
    if "keypoints" in found:
        points = found["keypoints"][kept]
        canvas = draw_keypoints(canvas, points[..., :2] * factor, points[..., 2] > 0, colors="yellow", radius=4)
    return canvas


def colors_of(labels: Sequence[int]) -> list[str]:
    """Return a colour for each label, the same for the same label."""
    return [PALETTE[(label - 1) % len(PALETTE)] for label in labels]
