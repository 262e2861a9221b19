"""``backbone evaluate``: how good a trained detector or segmenter is."""

from pathlib import Path
from typing import Annotated

import typer

from backbone.command.terminal import import_training
from backbone.console import Device, readable_errors
from backbone.shipped import find_recipe


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
) -> None:
    """Measure a trained detector or segmenter: COCO AP of boxes, masks and keypoints, or mIoU; in all and by class."""
    with readable_errors():
        recipe = None if config is None else find_recipe(config)
        import_training()
    from backbone.training.evaluate import evaluate

    evaluate(recipe, weights, data, split=split, device=device, json_file=json_file, sheet=sheet)
