"""``backbone train``: a detector or segmenter of torchvision on any backbone, from one recipe and COCO-format data."""

from pathlib import Path
from typing import Annotated

import typer

from backbone.command.terminal import import_training
from backbone.console import Device, readable_errors
from backbone.shipped import find_recipe


def train_command(
    config: Annotated[Path, typer.Option(help="A detector's recipe (YAML), or the name of one of the package.")],
    data: Annotated[Path, typer.Option(help="Folder of the data set.")],
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    device: Annotated[Device, typer.Option(help="auto takes a GPU if there is one.")] = Device.AUTO,
    devices: Annotated[int, typer.Option(min=1, help="Processes on each node, one for each GPU.")] = 1,
    num_nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse data of which anything would be skipped.")] = False,
) -> None:
    """Train a detector or segmenter of torchvision on any backbone, from one recipe and COCO-format data.

    --data holds train/, val/ and annotations/train.json and val.json. Into --out go last.ckpt after each epoch, and at
    the end model.pth (the detector), backbone.pth (its backbone, to start another recipe from: `weights:
    OUT/backbone.pth`), metrics.json, curves.png, sheet.png and TensorBoard's events. A run that was killed goes on with
    --resume from the last finished epoch and ends, on the CPU, with the same weights bit for bit. On several nodes all
    of them must see --out.

    Records that cannot be used are named and skipped, all of them in --out's skipped.csv; --strict refuses them, and
    `backbone check-data DIR` looks for them beforehand. What a run writes stands alone: it needs neither the weights
    that the run started from nor its data.
    """
    with readable_errors():
        recipe = find_recipe(config)
        import_training()
    from backbone.training.train import train

    processes = {"devices": devices, "num_nodes": num_nodes}
    train(recipe, data, out, resume=resume, device=device, strict=strict, **processes)
