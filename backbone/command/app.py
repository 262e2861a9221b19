"""The installed command ``backbone``: list, describe, extract, inspect, convert."""

import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import torch
import typer
from pydantic import ValidationError
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from backbone.builder import build_backbone
from backbone.command.catalogue import Entry, find_backbones, parse_count, parse_strides
from backbone.command.check_data import check_data_command
from backbone.command.description import Description, describe
from backbone.command.extraction import extract_features, find_images, read_image, refuse_overwriting, save_results
from backbone.config import BackboneConfig, explain, load_config
from backbone.features import Backbone
from backbone.weights import TARGETS, Inspection, convert_weights, inspect_weights, load_weights

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
console = Console()
errors = Console(stderr=True)

EXIT_USAGE = 2
IMAGENET_SIZE = (224, 224)


class Device(StrEnum):
    """Where to compute."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


def main() -> None:
    """Run the command."""
    app()


@app.command("list")
def list_command(
    pattern: Annotated[str, typer.Argument(help="Shell pattern, such as 'resnet*' or 'timm/convnext*'.")] = "*",
    provider: Annotated[str | None, typer.Option(help="'built in', 'timm' or a plugin's package.")] = None,
    max_parameters: Annotated[str | None, typer.Option(metavar="N", help="Largest size, such as 30M.")] = None,
    strides: Annotated[str | None, typer.Option(metavar="S,S,...", help="Strides it must have: 4,8,16,32.")] = None,
) -> None:
    """List the backbones that a config can name."""
    with _readable_errors(), errors.status("measuring" if max_parameters or strides else "listing"):
        entries = list(
            find_backbones(
                pattern,
                provider=provider,
                max_parameters=None if max_parameters is None else parse_count(max_parameters),
                strides=() if strides is None else parse_strides(strides),
                on_error=lambda name, error: _print_error(f"{name} left out: {error}"),
            )
        )
    if not entries:
        _fail(f"no backbone matches {pattern!r} and the filters; `backbone list` and `backbone list 'timm/*'` show all")
    if sys.stdout.isatty():
        _print_entries(entries)
    else:
        print(*(entry.name for entry in entries), sep="\n")


def _print_entries(entries: list[Entry]) -> None:
    table = Table(box=box.SIMPLE, padding=0)
    measured = entries[0].parameters is not None
    for column in ("name", "origin", *(("parameters", "strides") if measured else ())):
        table.add_column(column, justify="right" if column == "parameters" else "left")
    for entry in entries:
        numbers = (f"{entry.parameters:,}", ", ".join(map(str, entry.strides or ()))) if measured else ()
        table.add_row(entry.name, entry.origin, *numbers)
    console.print(table)


@app.command("describe")
def describe_command(
    backbone: Annotated[str, typer.Argument(metavar="NAME|CONFIG", help="Registered name or YAML file.")],
    image_size: Annotated[
        tuple[int, int], typer.Option(metavar="H W", min=1, help="Image height and width in pixels.")
    ] = IMAGENET_SIZE,
    weights: Annotated[str | None, typer.Option(help="Weights to load, to see whether and how they fit.")] = None,
) -> None:
    """Show each stage's shape, parameters and operations."""
    with _readable_errors():
        is_file = Path(backbone).suffix in (".yaml", ".yml")
        config = load_config(backbone) if is_file else BackboneConfig(name=backbone)
        with torch.device("meta"):  # shapes and counts only: no memory, no weights
            model = _build(config.model_copy(update={"weights": None}), backbone if is_file else None)
        description = describe(model, image_size, in_channels=config.in_channels)
        report = None
        if weights is not None:
            model = _build(config.model_copy(update={"weights": None}), backbone if is_file else None)
            chosen = config.stem_channels_from
            report = load_weights(model, weights, name=config.name, stem_channels_from=chosen)
    _print_description(config.name, image_size, description)
    if report is not None:
        print(report)


@app.command("inspect")
def inspect_command(
    file: Annotated[str, typer.Argument(help="Checkpoint: a path, or an address as weights take it.")],
) -> None:
    """Show what a checkpoint is: format, network, what is known of its training, norms, tensors."""
    with _readable_errors():
        inspection = inspect_weights(file)
    _print_inspection(inspection)


@app.command("convert")
def convert_command(
    source: Annotated[str, typer.Argument(metavar="IN", help="Checkpoint of any known format: a path or an address.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="File to write: .pth, .safetensors; for detectron2 .pkl.")],
    to: Annotated[str, typer.Option(help=f"Library to write for: {', '.join(TARGETS)}.")],
) -> None:
    """Write a checkpoint's network under the names of another library."""
    with _readable_errors():
        print(convert_weights(source, out, to))


app.command("check-data")(check_data_command)


@app.command("extract")
def extract_command(
    images: Annotated[list[Path], typer.Option("--images", help="Photos, or folders of photos.")],
    out: Annotated[Path, typer.Option(help="Folder for the results; made if need be.")],
    more_images: Annotated[list[Path] | None, typer.Argument(metavar="[PATHS]...", help="More photos.")] = None,
    config: Annotated[Path | None, typer.Option(help="Backbone recipe (YAML).")] = None,
    name: Annotated[str | None, typer.Option(help="Registered name, in place of a recipe.")] = None,
    weights: Annotated[str | None, typer.Option(help="Weights name or checkpoint; overrides the recipe's.")] = None,
    shorter_side: Annotated[int | None, typer.Option(min=1, help="Resize to this shorter side, in pixels.")] = None,
    device: Annotated[Device, typer.Option(help="Where to compute.")] = Device.AUTO,
) -> None:
    """Write each photo's C2-C5 as OUT/<stem>.safetensors and a picture of them as OUT/<stem>.png."""
    with _readable_errors():
        settings = _settings(config, name, weights)
        photos = find_images([*images, *(more_images or [])])
        refuse_overwriting(photos, out)
        target = _device(device)
        torch.manual_seed(0)  # without weights, the same random network each time
        with redirect_stdout(sys.stderr):  # stdout is for the paths written; torch.hub tells of downloads there
            model = _build(settings, config).to(target).eval()
        _make_writable(out)
        if settings.weights is None:
            errors.print("[yellow]note[/]: random weights (seed 0); for meaning, add --weights IMAGENET1K_V2")
    num_failures = 0
    columns = (TextColumn("extract"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Where both streams are one terminal, rich must print the paths above its bar; elsewhere it must leave them alone.
    with Progress(*columns, console=errors, transient=True, redirect_stdout=sys.stdout.isatty()) as progress:
        for photo in progress.track(photos):
            try:
                image = read_image(photo, shorter_side=shorter_side)
                features = extract_features(model, image)
                results = save_results(image, features, model.feature_specs, out, photo.stem)
            except (ValueError, OSError, RuntimeError, MemoryError) as error:  # torch's are RuntimeErrors
                num_failures += 1
                _print_error(_one_line(error, photo))
            else:
                print(*results, sep="\n")
    if num_failures:
        errors.print(f"{num_failures} of {len(photos)} images failed", soft_wrap=True)
        raise typer.Exit(1)


def _settings(config: Path | None, name: str | None, weights: str | None) -> BackboneConfig:
    if (config is None) == (name is None):
        raise ValueError("give exactly one of --config FILE and --name NAME")
    settings = load_config(config) if config else BackboneConfig(name=str(name))
    if weights is not None:
        settings = settings.model_copy(update={"weights": weights})
    if settings.in_channels != 3:  # noqa: PLR2004
        raise ValueError(f"extract reads RGB photos: in_channels must be 3, got {settings.in_channels}")
    return settings


def _build(settings: BackboneConfig, recipe: str | Path | None) -> Backbone:
    with warnings.catch_warnings():  # nothing trains here, so nothing is lost by freezing it at random
        warnings.filterwarnings("ignore", message=".*frozen at random weights")
        try:
            return build_backbone(settings)
        except ValueError as error:
            raise ValueError(f"{recipe}: {error}" if recipe else str(error)) from None


def _device(device: Device) -> torch.device:
    if device is Device.CUDA and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a CUDA device, and torch sees none; use --device cpu or auto")
    cuda = device is not Device.CPU and torch.cuda.is_available()
    return torch.device("cuda" if cuda else "cpu")


def _make_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--out must be a folder that can be written, got {folder} ({error.strerror})") from None


def _print_description(name: str, image_size: tuple[int, int], description: Description) -> None:
    height, width = image_size
    table = Table(title=f"{name}, image {height} x {width}", title_justify="left", box=box.SIMPLE, padding=0)
    table.add_column("stage")
    for column in ("blocks", "channels", "stride", "dilation", "H x W", "parameters", "GFLOPs"):
        table.add_column(column, justify="right")
    table.add_column("frozen")
    for stage in description.stages:
        table.add_row(
            stage.name,
            str(stage.blocks or "-"),
            str(stage.channels or "-"),
            str(stage.stride or "-"),
            ", ".join(map(str, stage.dilations)) or "-",
            f"{stage.size[0]}x{stage.size[1]}" if stage.size else "-",
            f"{stage.parameters:,}",
            f"{stage.multiply_adds / 1e9:.2f}",
            "yes" if stage.frozen else "no",
        )
    outside = description.parameters - sum(stage.parameters for stage in description.stages)
    if outside:
        products = description.multiply_adds - sum(stage.multiply_adds for stage in description.stages)
        table.add_row("head", "-", "-", "-", "-", "-", f"{outside:,}", f"{products / 1e9:.2f}", "no")
    total = f"{description.multiply_adds / 1e9:.2f}"
    table.add_section()
    table.add_row("total", "", "", "", "", "", f"{description.parameters:,}", total, "")
    console.print(table)
    console.print(f"{description.megabytes:.1f} MB of weights. GFLOPs are 10^9 multiply-adds for one image.")


def _print_inspection(found: Inspection) -> None:
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    facts.add_row("format", Text(f"{found.format} ({found.why})"))
    facts.add_row("network", Text(found.network))
    facts.add_row("prefix", Text(found.prefix or "none"))
    for title, lines in (("training", found.training), ("norms", found.norms)):
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


@contextmanager
def _readable_errors() -> Iterator[None]:
    """Turn what a user can mend into one message and exit code 2; anything else keeps its traceback."""
    try:
        yield
    except ValidationError as error:
        _fail("\n".join(explain(error)))
    except (ValueError, OSError, ImportError) as error:
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    _print_error(message)
    raise typer.Exit(EXIT_USAGE)


def _print_error(message: str) -> None:
    """Print the message letter by letter: a file name may look like rich's markup or emoji."""
    errors.print(Text.assemble(("error", "red"), ": ", message), soft_wrap=True)


def _one_line(error: Exception, photo: Path) -> str:
    message = " ".join(str(error).split()) or type(error).__name__
    return message if str(photo) in message else f"{photo}: {message}"
