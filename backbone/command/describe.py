"""``backbone describe``: what a backbone or a detector is made of."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import box
from rich.table import Table

from backbone.command.description import Description, describe
from backbone.command.detector_description import DetectorDescription, describe_detector
from backbone.command.terminal import build_by_recipe
from backbone.config import BackboneConfig
from backbone.console import console, readable_errors, say
from backbone.features import Backbone
from backbone.recipe import DetectorConfig
from backbone.registry import UnknownBackboneError, find_constructor
from backbone.shipped import YAML_SUFFIXES, load_recipe, shipped_recipes
from backbone.weights import load_weights
from backbone.weights.published import PublishedWeights, list_weights

IMAGENET_SIZE = (224, 224)


def describe_command(
    backbone: Annotated[
        str, typer.Argument(metavar="NAME|CONFIG", help="Registered name, YAML file, or a recipe of the package.")
    ],
    image_size: Annotated[
        tuple[int, int] | None,
        typer.Option(
            metavar="H W", min=1, help="Image height and width in pixels.  [default: 224 224, or the detector's own]"
        ),
    ] = None,
    weights: Annotated[str | None, typer.Option(help="Weights to load, to see whether and how they fit.")] = None,
) -> None:
    """Show each stage's shape, parameters and operations, a detector's other parts, and which weights exist."""
    with readable_errors():
        config, recipe = named(backbone)
        if isinstance(config, DetectorConfig):
            if weights is not None:
                raise ValueError(f"--weights loads a backbone, and {backbone} describes a detector; name its backbone")
            image_size = image_size or (config.min_size[-1], config.max_size)
            detector = describe_detector(config, image_size)
            settings, description = config.backbone, detector.backbone
        else:
            settings, detector, image_size = config, None, image_size or IMAGENET_SIZE
            model = _without_weights(settings, recipe, on="meta")  # shapes and counts: no memory, no weights
            description = describe(model, image_size, in_channels=settings.in_channels)
        report = None
        if weights is not None:
            model = _without_weights(settings, recipe, on="cpu")
            chosen = settings.stem_channels_from
            report = load_weights(model, weights, name=settings.name, stem_channels_from=chosen)
        published = list_weights(settings.name)
    title = settings.name if detector is None else f"{backbone}: {config.detector} on {settings.name}"  # type: ignore[union-attr]
    _print_description(title, image_size, description, detector)
    _print_weights(published)
    if report is not None:
        say(str(report))


def named(name: str) -> tuple[BackboneConfig | DetectorConfig, Path | None]:
    """Return what ``name`` means: a YAML file, a registered backbone, or a recipe of the package; and the file.

    Raises:
        ValueError: If it means nothing, or the file breaks a rule.
    """
    path = Path(name)
    if path.suffix in YAML_SUFFIXES or path.is_file():
        return load_recipe(path), path
    try:
        find_constructor(name)
    except UnknownBackboneError:
        if name not in shipped_recipes():
            raise
        return load_recipe(name), shipped_recipes()[name]
    return BackboneConfig(name=name), None


def _without_weights(settings: BackboneConfig, recipe: Path | None, *, on: str) -> Backbone:
    update = {"weights": None, "stem_channels_from": None}
    with torch.device(on):
        return build_by_recipe(settings.model_copy(update=update), recipe)


def _print_description(
    title: str, image_size: tuple[int, int], description: Description, detector: DetectorDescription | None
) -> None:
    height, width = image_size
    table = Table(box=box.SIMPLE, padding=0)
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
    if description.outside:
        products = description.multiply_adds - sum(stage.multiply_adds for stage in description.stages)
        _add_part(table, description.outside_name, description.outside, products)
    for part in () if detector is None else detector.parts:
        _add_part(table, part.name, part.parameters, part.multiply_adds)
    total = description if detector is None else detector
    table.add_section()
    table.add_row("total", "", "", "", "", "", f"{total.parameters:,}", f"{total.multiply_adds / 1e9:.2f}", "")
    say(f"{title}, image {height} x {width}")
    console.print(table)
    megabytes = description.megabytes if detector is None else detector.parameters * 4 / 1e6
    note = "" if detector is None else f" {detector.note}"
    say(f"{megabytes:.1f} MB of weights. GFLOPs are 10^9 multiply-adds for one image.{note}")
    if description.outside_name == "pyramid":
        say(
            f"The maps come of a pyramid whose {description.outside:,} parameters no published weights have: train it; "
            f"until then its finer maps look like a checkerboard.",
        )


def _add_part(table: Table, name: str, parameters: int, multiply_adds: int) -> None:
    table.add_row(name, "-", "-", "-", "-", "-", f"{parameters:,}", f"{multiply_adds / 1e9:.2f}", "no")


def _print_weights(published: tuple[PublishedWeights, ...]) -> None:
    if not published:
        return
    stated = [f" ({each.accuracy:.1f} % on ImageNet)" if each.accuracy is not None else "" for each in published]
    listed = ", ".join(each.name + accuracy for each, accuracy in zip(published, stated, strict=True))
    say(f"weights: {listed}")
