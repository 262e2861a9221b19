"""What the sub-commands share: notes, progress bars, devices, folders, besides what ``backbone.console`` has."""

import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from backbone.builder import build_backbone
from backbone.config import BackboneConfig
from backbone.console import Device, errors
from backbone.features import Backbone


def print_note(message: str) -> None:
    """Print what is no error and worth knowing, on stderr."""
    errors.print(Text.assemble(("note", "yellow"), ": ", message), soft_wrap=True)


def progress_bar(title: str) -> Progress:
    """Return a bar with count and time left, on stderr where that is a terminal, gone when it is done.

    Where both streams are one terminal, rich must print other lines above the bar; elsewhere it must leave them alone.
    """
    columns = (TextColumn(title, markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    shown = errors.is_terminal
    return Progress(*columns, console=errors, transient=True, redirect_stdout=sys.stdout.isatty(), disable=not shown)


def torch_device(device: Device) -> torch.device:
    """Return where to compute.

    Raises:
        ValueError: If it is not there.
    """
    if device is Device.CUDA and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a CUDA device, and torch sees none; use --device cpu or auto")
    cuda = device is not Device.CPU and torch.cuda.is_available()
    return torch.device("cuda" if cuda else "cpu")


def build_by_recipe(settings: BackboneConfig, recipe: str | Path | None = None) -> Backbone:
    """Build a backbone; what it cannot honour is said with the recipe's name."""
    try:
        return build_backbone(settings)
    except ValueError as error:
        raise ValueError(f"{recipe}: {error}" if recipe else str(error)) from None


def make_writable(folder: Path) -> None:
    """Make the folder of the results.

    Raises:
        ValueError: If nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--out must be a folder that can be written, got {folder} ({error.strerror})") from None


def one_line(error: Exception, path: Path) -> str:
    """Return the error's message in one line, with the name of the file it is about."""
    message = " ".join(str(error).split()) or type(error).__name__
    return message if str(path) in message else f"{path}: {message}"


def import_training() -> None:
    """Make sure that training's own libraries are installed, in one sentence where they are not.

    Raises:
        ModuleNotFoundError: If one is not; names it and the extra.
    """
    for library in ("lightning", "torchmetrics", "pycocotools", "tensorboard"):
        if find_spec(library) is None:
            raise ModuleNotFoundError(
                f"training needs {library}, which is not installed: pip install 'backbone[train]'", name=library
            )
