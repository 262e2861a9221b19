"""What the sub-commands share: the two streams, errors of one line, progress bars, where to compute.

Nothing printed here is markup: a file, a class or a network may be called ``[dog]`` or ``:smile:``.
"""

import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Final, NoReturn

import torch
import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from backbone.builder import build_backbone
from backbone.config import BackboneConfig, explain
from backbone.features import Backbone

EXIT_USAGE: Final = 2

_WIDTH_OF_A_PIPE: Final = 140

console = Console(
    width=None if sys.stdout.isatty() else _WIDTH_OF_A_PIPE, markup=False, emoji=False, highlight=False
)  # fmt: skip
errors = Console(stderr=True, markup=False, emoji=False, highlight=False)


class Device(StrEnum):
    """Where to compute; auto takes a GPU if there is one."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


@contextmanager
def readable_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turn what a user can mend into one message and exit code 2; anything else keeps its traceback.

    Args:
        kinds: Which errors these are; by default wrong values, files that fail and libraries that are absent.
    """
    mendable = kinds or (ValueError, OSError, ImportError)
    try:
        yield
    except ValidationError as error:
        fail("\n".join(explain(error)))
    except mendable as error:
        message = str(error)
        if message.startswith("Caught "):  # a DataLoader's process sends a traceback, whose last line is the message
            message = message.strip().splitlines()[-1].partition(": ")[2]
        fail(message)


def fail(message: str) -> NoReturn:
    """Print the message and leave with the exit code of a wrong call."""
    print_error(message)
    raise typer.Exit(EXIT_USAGE)


def print_error(message: str) -> None:
    """Print one error in one line, however long."""
    errors.print(Text.assemble(("error", "red"), ": ", message), soft_wrap=True)


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


def build_quietly(settings: BackboneConfig, recipe: str | Path | None = None) -> Backbone:
    """Build a backbone that will not train; what it cannot honour is said with the recipe's name."""
    with warnings.catch_warnings():  # nothing trains here, so nothing is lost by freezing it at random
        warnings.filterwarnings("ignore", message=".*frozen at random weights")
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
