"""``backbone evaluate``: how good a trained detector or segmenter is."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from backbone.command.terminal import import_training
from backbone.console import Device, readable_errors
from backbone.shipped import find_recipe


class InferenceDtype(StrEnum):
    """What an inference copy's backbone computes in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    INT8 = "int8"


def evaluate_command(
    weights: Annotated[Path, typer.Option(help="model.pth (or last.ckpt) of a run.")],
    data: Annotated[Path, typer.Option(help="Folder of the data set.")],
    config: Annotated[
        Path | None, typer.Option(help="The detector's recipe; by default the one that the weights carry.")
    ] = None,
    split: Annotated[str, typer.Option(help="Which images.")] = "val",
    device: Annotated[Device, typer.Option(help="auto takes a GPU if there is one.")] = Device.AUTO,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the metrics there.")] = None,
    sheet: Annotated[Path | None, typer.Option(help="Draw truth and predictions of the first images there.")] = None,
    dtype: Annotated[
        InferenceDtype | None, typer.Option(help="Measure an inference copy whose backbone computes in this.")
    ] = None,
    calibration: Annotated[int, typer.Option(help="Training images that tell the ranges of int8.")] = 100,
) -> None:
    """Measure a trained detector or segmenter: COCO AP of boxes, masks and keypoints, or mIoU; in all and by class."""
    with readable_errors():
        recipe = None if config is None else find_recipe(config)
        import_training()
    from backbone.training.evaluate import evaluate

    evaluate(
        recipe, weights, data, split=split, device=device, json_file=json_file, sheet=sheet, dtype=dtype,
        calibration=calibration,
    )  # fmt: skip
