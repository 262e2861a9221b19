"""How a run ends when it does not end well: interrupted, on a full disk, or with a picture that cannot be drawn."""

import errno
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import typer
from rich.text import Text

from backbone.console import EXIT_USAGE, errors
from backbone.training.run_folder import CHECKPOINT

EXIT_PICTURES: Final = 1
EXIT_INTERRUPTED: Final = 130  # as a shell reports SIGINT
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNWRITABLE: Final = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE)


@contextmanager
def resumable(out: Path) -> Iterator[None]:
    """Turn Ctrl-C and a full disk into a message that says what is there and names ``--resume``."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:
        pressed = isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt)
        if not pressed:
            raise
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning leaves it ignored
        say("interrupted", f"{what_is_left(out)}; go on with --resume")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except OSError as error:
        if error.errno not in (*_FULL, *_UNWRITABLE):
            raise
        remedy = "free some space" if error.errno in _FULL else "make it writable"
        say("error", f"{error.strerror or error}; {what_is_left(out)}; {remedy} and go on with --resume")
        raise typer.Exit(EXIT_USAGE) from None


def what_is_left(out: Path) -> str:
    """Return what a run that stopped has left."""
    last = out / f"{CHECKPOINT}.ckpt"
    return f"{last} holds the last finished epoch" if last.exists() else f"no epoch was finished in {out}"


def show(steps: Mapping[str, Callable[[], object]]) -> list[str]:
    """Make tables and pictures; report those that cannot be made, and return their names."""
    failed = []
    for name, step in steps.items():
        try:
            step()
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            say(
                "error", f"{name} could not be made ({type(error).__name__}: {reason}); weights and metrics are written"
            )
            failed.append(name)
    return failed


def say(title: str, message: str) -> None:
    """Print to stderr, letter by letter."""
    errors.print(Text.assemble((title, "red"), ": ", message), soft_wrap=True)
