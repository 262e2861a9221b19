"""``backbone extract`` in bulk: many photos as shards with an index, resumable."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Final, Literal, NamedTuple

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from backbone.command.terminal import make_writable, print_note, torch_device
from backbone.config import BackboneConfig
from backbone.console import Device, errors
from backbone.extraction.formats import ShardFormat
from backbone.extraction.job import Engine, write_features
from backbone.extraction.request import Request
from backbone.extraction.sources import list_images
from backbone.extraction.workers import workers_for
from backbone.features import Backbone

SECONDS_BETWEEN_NOTES: Final = 60


class EngineName(StrEnum):
    """What runs an extraction in bulk."""

    LOCAL = "local"
    RAY = "ray"


class Bulk(NamedTuple):
    """How an extraction in bulk is run; each None is a default.

    Attributes:
        workers: Processes that read, or auto.
        images_per_shard: How many images one file holds.
        overwrite: Replace the extraction that the folder holds.
        engine: What runs it.
        address: Of a Ray cluster.
        actors: Networks at once on Ray.
    """

    workers: int | Literal["auto"] = "auto"
    images_per_shard: int | None = None
    overwrite: bool = False
    engine: EngineName = EngineName.LOCAL
    address: str | None = None
    actors: int | None = None


def count_or_auto(option: str, text: str, least: int) -> int | Literal["auto"]:
    """Return the number that an option was given, or ``auto``.

    Raises:
        ValueError: If it is neither.
    """
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"{option} must be auto or a whole number of {least} or more, got {text}")
    return int(text)


def extract_in_bulk(
    paths: Sequence[str],
    out: Path,
    model: Backbone,
    settings: BackboneConfig,
    request: Request,
    format: ShardFormat,
    device: Device,
    bulk: Bulk,
    *,
    recursive: bool,
) -> None:
    """Write the features of all images into ``out``, and say where they are.

    Raises:
        ValueError: For a setting that cannot be honoured, or images that are not there.
        OSError: If nothing can be written, or the images vanish.
    """
    images = list_images(paths, recursive=recursive)
    about = {
        "network": settings.name,
        "weights": settings.weights or "random (seed 0)",
        "config": settings.model_dump_json(exclude_defaults=True),
    }
    engine = _engine(bulk, device)
    place = torch_device(device) if engine is None else torch.device("cpu")  # Ray's machines have their own
    workers = workers_for(bulk.workers, place if engine is None else torch.device(engine.device))
    make_writable(out)
    with told_progress(len(images)) as progress:
        failed = write_features(
            images, model, out, request,
            format=format, images_per_shard=bulk.images_per_shard, workers=workers,
            device=place, overwrite=bulk.overwrite, about=about, progress=progress, engine=engine,
        )  # fmt: skip
    print(out / "index.csv")
    if failed:
        print_note(f"{failed:,} of {len(images):,} images failed; {out / 'failed.csv'} says why")


def _engine(bulk: Bulk, device: Device) -> Engine | None:
    if bulk.engine is EngineName.LOCAL:
        if bulk.address is not None or bulk.actors is not None:
            raise ValueError("--address and --actors are Ray's; add --engine ray")
        return None
    from backbone.extraction.ray_engine import RayEngine

    return RayEngine(bulk.address, bulk.actors, None if device is Device.AUTO else device.value)


class Teller:
    """Tells a terminal, or a file of its lines, how far the work is."""

    def __init__(self, bar: Progress, total: int) -> None:
        self.bar, self.total, self.done = bar, total, 0
        self.task = bar.add_task("extract", total=total)
        self.resumed: int | None = None
        self.begun = self.said = time.monotonic()

    def __call__(self, count: int) -> None:
        """Count ``count`` more images; at first those of an earlier call."""
        self.done += count
        if self.resumed is None:
            self.resumed = count
            self.bar.reset(self.task, total=self.total, completed=count)  # which do not count for the rate
            if count:
                print_note(f"{count:,} of {self.total:,} images are done already")
            return
        self.bar.advance(self.task, count)
        now = time.monotonic()
        if self.bar.disable and now - self.said > SECONDS_BETWEEN_NOTES:
            self.said = now
            rate = (self.done - self.resumed) / (now - self.begun)
            left = math.ceil((self.total - self.done) / rate / 60)
            errors.print(
                f"{self.done:,} of {self.total:,} images, {rate:.1f} images/s, {left:,} min left", soft_wrap=True
            )


class _Rate(ProgressColumn):
    """Images a second, of late."""

    def render(self, task: Task) -> Text:
        """Return it, where it is known."""
        return Text("" if task.speed is None else f"{task.speed:.1f} images/s")


@contextmanager
def told_progress(total: int) -> Iterator[Teller]:
    """Give what is told of images done: a bar with their rate and the time left, or a line a minute."""
    columns = (
        TextColumn("extract", markup=False), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn()
    )  # fmt: skip
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        yield Teller(bar, total)
