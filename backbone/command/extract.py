"""``backbone extract``: feature maps of photos, as files and as pictures."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from torch import nn

from backbone.command.bulk import Bulk, EngineName, count_or_auto, extract_in_bulk
from backbone.command.extraction import extract_features, read_image
from backbone.command.photos import name_results, refuse_overwriting
from backbone.command.results import Format, describe_features, save_results
from backbone.command.terminal import build_by_recipe, make_writable, one_line, print_note, progress_bar, torch_device
from backbone.config import BackboneConfig
from backbone.console import Device, errors, print_error, readable_errors
from backbone.extraction.formats import ShardFormat, require_format
from backbone.extraction.pixels import resize_image
from backbone.extraction.request import MAX_PIXELS, Request
from backbone.features import Backbone
from backbone.inference.optimize import optimize_for_inference
from backbone.recipe import DetectorConfig
from backbone.shipped import find_recipe, load_recipe
from backbone.weights.published import list_weights

FAILURES = (ValueError, OSError, RuntimeError, MemoryError)  # torch's are RuntimeErrors


PANEL = "In bulk"


class PoolName(StrEnum):
    """What is left of a feature map."""

    NONE = "none"
    AVG = "avg"
    GEM = "gem"


class Dtype(StrEnum):
    """What the network computes in, and its features are stored in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def _bulk_option(help: str, default: str, *, least: int | None = None) -> Any:  # noqa: ANN401 - typer's own type
    return typer.Option(help=help, min=least, show_default=default, rich_help_panel=PANEL)


class OutputFormat(StrEnum):
    """A file for each photo, or shards of many."""

    SAFETENSORS = "safetensors"
    NPZ = "npz"
    PT = "pt"
    SHARDS = "shards"
    WEBDATASET = "webdataset"
    PARQUET = "parquet"


def extract_command(
    images: Annotated[
        list[str], typer.Option("--images", help="Photos or folders; in bulk also s3://... and gs://...")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the results; made if need be.")],
    more_images: Annotated[list[str] | None, typer.Argument(metavar="[PATHS]...", help="More photos.")] = None,
    config: Annotated[Path | None, typer.Option(help="Recipe (YAML), or the name of one of the package.")] = None,
    name: Annotated[str | None, typer.Option(help="Registered name, in place of a recipe.")] = None,
    weights: Annotated[str | None, typer.Option(help="Weights name or checkpoint; overrides the recipe's.")] = None,
    recursive: Annotated[bool, typer.Option("--recursive", help="Take the folders within folders, too.")] = False,
    shorter_side: Annotated[int | None, typer.Option(min=1, help="Resize to this shorter side, in pixels.")] = None,
    max_size: Annotated[int | None, typer.Option(min=1, help="Longer side at most, in pixels.")] = None,
    batch: Annotated[
        str,
        typer.Option(help="Photos of one size that are computed together, or auto.", show_default="1; auto in bulk"),
    ] = "",
    dtype: Annotated[Dtype, typer.Option(help="What to compute in, and to store.")] = Dtype.FLOAT32,
    format: Annotated[
        OutputFormat | None,
        typer.Option(
            help="A file for each photo, or in bulk shards (safetensors), webdataset (tar) or parquet.",
            show_default="safetensors; shards with an option of bulk",
        ),
    ] = None,
    no_picture: Annotated[bool, typer.Option("--no-picture", help="Write the features only.")] = False,
    device: Annotated[Device, typer.Option(help="Where to compute.")] = Device.AUTO,
    pool: Annotated[PoolName | None, _bulk_option("One vector a level, or the maps.", "none")] = None,
    levels: Annotated[str | None, _bulk_option("Feature maps to keep, such as c4,c5.", "all")] = None,
    store: Annotated[Dtype | None, _bulk_option("What to store.", "maps as computed, vectors in float32")] = None,
    workers: Annotated[str | None, _bulk_option("Processes that read photos, or auto.", "auto")] = None,
    images_per_shard: Annotated[
        int | None, _bulk_option("Photos whose features are one file.", "1024 with --pool, else 64", least=1)
    ] = None,
    multiple_of: Annotated[
        int | None, _bulk_option("Resize sides to the nearest multiple, so that photos share batches.", "1", least=1)
    ] = None,
    max_pixels: Annotated[
        int | None, _bulk_option("Photos of more, once resized, fail.", f"{MAX_PIXELS}", least=1)
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the shards in OUT.", rich_help_panel=PANEL)
    ] = False,
    engine: Annotated[EngineName | None, _bulk_option("This machine, or Ray's cluster.", "local")] = None,
    address: Annotated[str | None, _bulk_option("Of a Ray cluster; auto finds it.", "a local cluster")] = None,
    actors: Annotated[int | None, _bulk_option("Networks at once on Ray.", "one a GPU, else one", least=1)] = None,
) -> None:
    """Write each photo's C2-C5 as OUT/<stem>.safetensors and a picture of them as OUT/<stem>.png.

    In bulk: write those of many photos as OUT/shard-*, with OUT/index.csv and OUT/failed.csv. Killed at any point, the
    same command goes on.
    """
    bulk_options = {
        "--pool": pool, "--levels": levels, "--store": store, "--workers": workers, "--max-pixels": max_pixels,
        "--images-per-shard": images_per_shard, "--multiple-of": multiple_of, "--overwrite": overwrite or None,
        "--engine": engine, "--address": address, "--actors": actors,
    }  # fmt: skip
    paths = [*images, *(more_images or [])]
    with readable_errors():
        shards = _shard_format(format, [option for option, value in bulk_options.items() if value is not None])
        settings = _settings(config, name, weights)
        if shards is None:
            file_format = Format.SAFETENSORS if format is None else Format(format.value)
            size = count_or_auto("--batch", batch or "1", 1)
        else:
            request = Request(
                pool=(pool or PoolName.NONE).value, levels=None if levels is None else tuple(levels.split(",")),
                dtype=dtype.value, store=None if store is None else store.value,
                batch=count_or_auto("--batch", batch or "auto", 1), shorter_side=shorter_side, max_size=max_size,
                multiple_of=multiple_of or 1, max_pixels=max_pixels or MAX_PIXELS,
            )  # fmt: skip
            bulk = Bulk(
                count_or_auto("--workers", workers or "auto", 0), images_per_shard, overwrite,
                engine or EngineName.LOCAL, address, actors,
            )  # fmt: skip
            require_format(shards, request)
            if request.levels is not None:  # stages beyond are not built
                settings = settings.replaced({"out_features": request.levels})
            model = _built(settings)
            _print_notes(settings, model)
            extract_in_bulk(paths, out, model, settings, request, shards, device, bulk, recursive=recursive)
            return
    _extract_one_by_one(
        [Path(path) for path in paths], out, settings, file_format,
        recursive=recursive, shorter_side=shorter_side, max_size=max_size, batch=1 if size == "auto" else size,
        dtype=dtype, draw=not no_picture, device=device,
    )  # fmt: skip


def _shard_format(format: OutputFormat | None, bulk_options: Sequence[str]) -> ShardFormat | None:
    """Return how shards are stored; None where each photo has a file of its own.

    Raises:
        ValueError: If there are options of bulk extraction and a format of the other kind.
    """
    if format is None:
        return ShardFormat.SHARDS if bulk_options else None
    if format.value in set(ShardFormat):
        return ShardFormat(format.value)
    if bulk_options:
        raise ValueError(
            f"--format {format.value} is a file for each photo, and {bulk_options[0]} is for shards; use --format "
            f"shards, webdataset or parquet"
        )
    return None


def _built(settings: BackboneConfig) -> Backbone:
    torch.manual_seed(0)  # without weights, the same random network each time
    with redirect_stdout(sys.stderr):  # stdout is for the paths written; torch.hub tells of downloads there
        return build_by_recipe(settings).eval()


def _extract_one_by_one(
    images: list[Path],
    out: Path,
    settings: BackboneConfig,
    format: Format,
    *,
    recursive: bool,
    shorter_side: int | None,
    max_size: int | None,
    batch: int,
    dtype: Dtype,
    draw: bool,
    device: Device,
) -> None:
    """Write a file, and a picture, for each photo."""
    with readable_errors():
        if format is Format.NPZ and dtype is Dtype.BFLOAT16:
            raise ValueError("--format npz has no bfloat16; use --dtype float16, or --format safetensors")
        stems = name_results(images, recursive=recursive)
        if draw:
            refuse_overwriting(list(stems), [out / f"{stem}.png" for stem in stems.values()])
        target = torch_device(device)
        model = _built(settings)
        run = _Extraction(settings, model, _network(model, dtype).to(target), format, draw=draw)
        make_writable(out)
    _print_notes(settings, model)
    num_failures = 0
    with progress_bar("extract") as bar:
        task = bar.add_task("extract", total=len(stems))
        for photos in _batches(list(stems), shorter_side, max_size, batch):
            num_failures += run(photos, {photo: out / stems[photo] for photo in photos})
            bar.advance(task, len(photos))
    if num_failures:
        errors.print(f"{num_failures} of {len(stems)} images failed", soft_wrap=True)
        raise typer.Exit(1)


def _network(model: Backbone, dtype: Dtype) -> nn.Module:
    return model if dtype is Dtype.FLOAT32 else optimize_for_inference(model, dtype=getattr(torch, dtype))


def _settings(config: Path | None, name: str | None, weights: str | None) -> BackboneConfig:
    if (config is None) == (name is None):
        raise ValueError("give exactly one of --config FILE and --name NAME")
    if config is not None:
        recipe = load_recipe(find_recipe(config))
        settings = recipe.backbone if isinstance(recipe, DetectorConfig) else recipe
    else:
        settings = BackboneConfig(name=str(name))
    if weights is not None:
        settings = settings.model_copy(update={"weights": weights})
    if settings.in_channels != 3:  # noqa: PLR2004
        raise ValueError(f"extract reads RGB photos: in_channels must be 3, got {settings.in_channels}")
    return settings


def _print_notes(settings: BackboneConfig, model: Backbone) -> None:
    if settings.weights is None:
        published = list_weights(settings.name)
        choice = published[0].name if published else "FILE"
        print_note(f"random weights (seed 0); for meaning, add --weights {choice}")
    elif isinstance(pyramid := getattr(model, "pyramid", None), nn.Module):
        count = sum(parameter.numel() for parameter in pyramid.parameters())
        print_note(f"the maps come of a pyramid whose {count:,} parameters are random: no published weights have them")


Photos = Mapping[Path, Image.Image | Exception]


def _batches(paths: list[Path], shorter_side: int | None, max_size: int | None, batch: int) -> Iterator[Photos]:
    """Yield photos of one size, as many as ``batch``, as soon as so many are read; one that fails comes alone."""
    waiting: dict[tuple[int, int], dict[Path, Image.Image | Exception]] = {}
    for path in paths:
        try:
            image = read_image(path)
            if shorter_side is not None or max_size is not None:
                image = resize_image(image, shorter_side or min(image.size), max_size)
        except FAILURES as error:
            yield {path: error}
            continue
        group = waiting.setdefault(image.size, {})
        group[path] = image
        if len(group) == batch:
            yield waiting.pop(image.size)
    yield from waiting.values()


class _Extraction:
    """Computes and writes what one batch gives; tells of each photo that fails."""

    def __init__(
        self, settings: BackboneConfig, model: Backbone, network: nn.Module, format: Format, *, draw: bool
    ) -> None:
        self.settings, self.model, self.network, self.format, self.draw = settings, model, network, format, draw

    def __call__(self, photos: Photos, results: Mapping[Path, Path]) -> int:
        """Return how many failed; a batch that fails as a whole is tried photo by photo."""
        try:
            images = [_readable(image) for image in photos.values()]
            features = extract_features(self.network, images, self.model.preprocessing)
        except FAILURES as error:
            if len(photos) > 1:
                return sum(self({path: image}, results) for path, image in photos.items())
            return _tell(error, *photos)
        failures = 0
        for path, image, found in zip(photos, images, features, strict=True):
            kept = {name: found[name] for name in self.model.feature_specs}
            facts = describe_features(self.settings, self.model, image, path)
            drawn, specs = image if self.draw else None, self.model.feature_specs
            try:
                written = save_results(
                    results[path], kept, facts, format=self.format, picture_of=drawn, specs=specs
                )  # fmt: skip
            except FAILURES as error:
                failures += _tell(error, path)
            else:
                print(*written, sep="\n")
        return failures


def _readable(image: Image.Image | Exception) -> Image.Image:
    if isinstance(image, Exception):
        raise image
    return image


def _tell(error: Exception, path: Path) -> int:
    print_error(one_line(error, path))
    return 1
