"""``backbone inspect``: what a checkpoint is."""

from typing import Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from backbone.console import console, readable_errors
from backbone.weights import Inspection, inspect_weights


def inspect_command(
    file: Annotated[str, typer.Argument(help="Checkpoint: a path, or an address as weights take it.")],
) -> None:
    """Show what a checkpoint is: format, network, what is known of its training, norms, tensors."""
    with readable_errors():
        inspection = inspect_weights(file)
    _print_inspection(inspection)


def _print_inspection(found: Inspection) -> None:
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    facts.add_row("format", Text(f"{found.format} ({found.why})"))
    facts.add_row("network", Text(found.network))
    facts.add_row("prefix", Text(found.prefix or "none"))
    for title, lines in (("training", found.training), ("norms", found.norms), ("numbers", found.numbers)):
        for line in lines:
            facts.add_row(title, Text(line))
    for reason, count in found.dropped.items():
        facts.add_row("no part of it", Text(f"{reason} ({count})"))
    for key in found.unexplained:
        facts.add_row("unexplained", Text(key))
    console.print(facts)
    table = Table(box=box.SIMPLE, padding=0)
    table.add_column("tensor", overflow="fold")
    for column in ("shape", "dtype"):
        table.add_column(column)
    for key, tensor in found.tensors.items():
        shape = " x ".join(map(str, tensor.shape)) or "scalar"
        table.add_row(Text(key), shape, str(tensor.dtype).removeprefix("torch."))
    console.print(table)
