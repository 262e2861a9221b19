"""The installed command ``backbone``: choose a backbone, look into it, train it, use it."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from backbone.command.check_data import check_data_command
from backbone.command.compare import compare_command
from backbone.command.convert import convert_command
from backbone.command.describe import describe_command
from backbone.command.evaluate import evaluate_command
from backbone.command.export import export_command
from backbone.command.extract import extract_command
from backbone.command.inspect import inspect_command
from backbone.command.list import list_command
from backbone.command.predict import predict_command
from backbone.command.train import train_command

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
app.command("list")(list_command)
app.command("describe")(describe_command)
app.command("compare")(compare_command)
app.command("extract")(extract_command)
app.command("inspect")(inspect_command)
app.command("convert")(convert_command)
app.command("check-data")(check_data_command)
app.command("export")(export_command)
app.command("train")(train_command)
app.command("evaluate")(evaluate_command)
app.command("predict")(predict_command)


def main() -> None:
    """Run the command."""
    app()


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    print(f"backbone {_version('backbone')} (torch {_version('torch')}, Python {platform.python_version()})")
    raise typer.Exit


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a source tree that nobody installed
        return "unknown"


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass
