"""``backbone convert``: a checkpoint under another library's names."""

from pathlib import Path
from typing import Annotated

import typer

from backbone.console import readable_errors
from backbone.weights.convert import EFFICIENTNET_TARGETS, TARGETS, convert_weights


def convert_command(
    source: Annotated[str, typer.Argument(metavar="IN", help="Checkpoint of any known format: a path or an address.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="File to write: .pth, .safetensors; for detectron2 .pkl.")],
    to: Annotated[
        str,
        typer.Option(
            help=f"Library to write for: a ResNet for {', '.join(TARGETS)}, an EfficientNet for "
            f"{', '.join(EFFICIENTNET_TARGETS)}."
        ),
    ],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT where it exists.")] = False,
) -> None:
    """Write a checkpoint's network under the names of another library."""
    with readable_errors():
        print(convert_weights(source, out, to, overwrite=overwrite))
