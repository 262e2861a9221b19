"""How the programs speak to a terminal: the two streams, errors of one line, where to compute.

Nothing printed here is markup: a file, a class or a network may be called ``[dog]`` or ``:smile:``.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Final, NoReturn

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.text import Text

from backbone.config import explain

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


def say(text: str) -> None:
    """Print text as it is: a path or a name longer than the line is not broken, so that it can be copied and found."""
    console.print(text, soft_wrap=True)


def print_error(message: str) -> None:
    """Print one error in one line, however long."""
    errors.print(Text.assemble(("error", "red"), ": ", message), soft_wrap=True)
