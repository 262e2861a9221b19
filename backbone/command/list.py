"""``backbone list``: what a config can name."""

import sys
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from backbone.command.catalogue import Entry, find_backbones, parse_count, parse_strides
from backbone.command.terminal import print_note, progress_bar
from backbone.console import console, fail, print_error, readable_errors


def list_command(
    pattern: Annotated[str, typer.Argument(help="Shell pattern, such as 'resnet*' or 'timm/convnext*'.")] = "*",
    provider: Annotated[str | None, typer.Option(help="'built in', 'timm' or a plugin's package.")] = None,
    max_parameters: Annotated[str | None, typer.Option(metavar="N", help="Largest size, such as 30M.")] = None,
    strides: Annotated[str | None, typer.Option(metavar="S,S,...", help="Strides it must have: 4,8,16,32.")] = None,
    long: Annotated[bool, typer.Option("--long", help="Show parameters and strides, also to a pipe.")] = False,
) -> None:
    """List the backbones that a config can name; a pipe gets bare names unless --long is given."""
    missed: list[str] = []
    with readable_errors(), progress_bar("measuring") as bar:
        entries = list(
            find_backbones(
                pattern,
                provider=provider,
                max_parameters=None if max_parameters is None else parse_count(max_parameters),
                strides=() if strides is None else parse_strides(strides),
                measured=long,
                on_error=lambda name, error: print_error(f"{name} left out: {error}"),
                on_miss=lambda name, _: missed.append(name),
                track=bar.track,
            )
        )
    if missed:
        print_note(f"{len(missed)} models left out, which have no maps at strides 4 to 32, such as {missed[0]}")
    if not entries:
        fail(f"no backbone matches {pattern!r} and the filters; `backbone list` and `backbone list 'timm/*'` show all")
    if long or sys.stdout.isatty():
        print_entries(entries)
    else:
        print(*(entry.name for entry in entries), sep="\n")


def print_entries(entries: list[Entry]) -> None:
    """Print a table of names and origins, with parameters and strides where they were measured."""
    table = Table(box=box.SIMPLE, padding=0)
    measured = entries[0].parameters is not None
    for column in ("name", "origin", *(("parameters", "strides") if measured else ())):
        table.add_column(column, justify="right" if column == "parameters" else "left", no_wrap=True)
    for entry in entries:
        numbers = (f"{entry.parameters:,}", ", ".join(map(str, entry.strides or ()))) if measured else ()
        table.add_row(entry.name, entry.origin, *numbers)
    console.print(table)
