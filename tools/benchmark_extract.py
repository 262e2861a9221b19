"""Extraction in bulk against its own network, its own parts and a plain loop, interleaved in one run.

    python tools/benchmark_extract.py --images 100 --rounds 5
    python tools/benchmark_extract.py --images 2000 --rounds 1 --no-loop

Photos are of one size, as JPEG: drawn scenes, and each fourth a part of matplotlib's photo. A round times each
contender once, in shuffled order, over all photos. `network` computes maps of normalised images in memory, `vectors`
goes from decoded bytes in memory to pooled vectors, and `extract` is backbone.extraction from files to shards. `loop`
is timm's features_only network, channels_last, its weights in the same dtype, behind a DataLoader with the same batch
and workers; it saves pooled vectors. Rates are from the end of the first batch on, and the seconds before that, in
which processes start, stand apart. The work of processors beside them is what other programs do not blur; with
OMP_NUM_THREADS=1 no thread waits for another. Below stand the rates of the parts: decoding on one processor by Pillow
and by torchvision.io, and writing.
"""

import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import matplotlib.cbook
import numpy as np
import torch
import typer
from benchmark.command import hardware
from benchmark.networks import DeviceName
from PIL import Image
from rich.console import Console
from rich.table import Table
from shapes.drawing import SHAPES, draw_scene
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from backbone import build_backbone, optimize_for_inference
from backbone.extraction import Request, list_images, write_features
from backbone.extraction.network import Network
from backbone.extraction.pixels import normalise
from backbone.images import read_image

Mark = Callable[[int], None]
"""Told how many more images are done."""

console = Console(width=120)


def draw_photos(folder: Path, count: int, size: tuple[int, int]) -> None:
    """Write drawn scenes and parts of a photo as JPEG, height x width."""
    with Image.open(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)) as photo:
        photo.load()
    for number in range(count):
        rng = np.random.default_rng([0, number])
        if number % 4 == 0:
            left, top = int(rng.integers(0, photo.width // 4)), int(rng.integers(0, photo.height // 4))
            part = photo.crop((left, top, left + photo.width * 3 // 4, top + photo.height * 3 // 4))
            picture = part.resize(size[::-1])
        else:
            picture = Image.fromarray(draw_scene(rng, size, list(SHAPES), 6, (0.1, 0.8))[0])
        picture.save(folder / f"{number:06d}.jpg", quality=90)


class Photos(Dataset[Tensor]):
    """What a plain loop reads: (3, H, W) of uint8."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.paths[index]) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def plain_loop(
    name: str, paths: list[str], out: Path, dtype: torch.dtype, batch: int, workers: int
) -> Callable[[Mark], None]:
    """Return what somebody writes who knows timm, and what makes it fast."""
    import timm

    model = timm.create_model(name, features_only=True, out_indices=(1, 2, 3, 4))
    model = model.eval().to(dtype).to(memory_format=torch.channels_last)
    mean = 255 * torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = 255 * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

    def run(mark: Mark) -> None:
        vectors: list[list[Tensor]] = [[] for _ in range(4)]
        with torch.inference_mode():
            for images in DataLoader(Photos(paths), batch_size=batch, num_workers=workers):
                normal = ((images.float() - mean) / std).to(dtype).contiguous(memory_format=torch.channels_last)
                for level, maps in zip(vectors, model(normal), strict=True):
                    level.append(maps.mean((2, 3), dtype=torch.float32))
                mark(len(images))
        np.savez(out / "loop.npz", *[torch.cat(level).numpy() for level in vectors])

    return run


class Measured(NamedTuple):
    """What one contender took in one round.

    Attributes:
        start: Seconds until the first batch was done.
        rate: Images a second from then on.
        work: Processor seconds an image from then on, those of the processes that read included.
    """

    start: float
    rate: float
    work: float


def processor_seconds() -> float:
    """Return what this process and those of its children that have ended have used."""
    return sum(os.times()[:4])


def steady(run: Callable[[Mark], None]) -> Measured:
    """Run a contender once."""
    marks: list[tuple[float, float, int]] = []
    begun = time.perf_counter()
    run(lambda count: marks.append((time.perf_counter(), processor_seconds(), count)))
    ended, used = time.perf_counter(), processor_seconds()
    first = next(place for place, (_, _, count) in enumerate(marks) if count)
    moment, used_before, _ = marks[first]
    images = sum(count for _, _, count in marks[first + 1 :])
    return Measured(moment - begun, images / (ended - moment), (used - used_before) / images)


def seconds(run: Callable[[], Any]) -> float:
    """Return how long ``run`` takes."""
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def rates_of_parts(paths: list[str], out: Path) -> dict[str, float]:
    """Return images a second on one processor, and MB a second onto the disk."""
    from torchvision.io import decode_jpeg, read_file

    some = paths[:100]

    def pillow() -> None:
        for path in some:
            np.array(read_image(Path(path)))

    def torchvisions() -> None:
        for path in some:
            decode_jpeg(read_file(path))

    data = np.random.default_rng(0).bytes(2**26)

    def write() -> None:
        with (out / "rate").open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    return {
        "decoding by Pillow, images/s": len(some) / min(seconds(pillow) for _ in range(3)),
        "decoding by torchvision.io, images/s": len(some) / min(seconds(torchvisions) for _ in range(3)),
        "writing, MB/s": len(data) / 1e6 / min(seconds(write) for _ in range(3)),
    }


def main(
    name: Annotated[str, typer.Option(help="Of the network, the same in timm.")] = "resnet50",
    images: Annotated[int, typer.Option(min=1, help="Photos to draw.")] = 100,
    image_size: Annotated[tuple[int, int], typer.Option(metavar="H W", help="In pixels.")] = (480, 640),
    dtype: Annotated[str, typer.Option(help="What to compute in.")] = "bfloat16",
    batch: Annotated[int, typer.Option(min=1, help="Photos at once.")] = 4,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read.")] = 1,
    pool: Annotated[str, typer.Option(help="avg, gem or none.")] = "avg",
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    limit: Annotated[float, typer.Option(help="Seconds after which no further round begins.")] = 240,
    loop: Annotated[bool, typer.Option(help="Whether timm's loop takes part.")] = True,
) -> None:
    """Draw, measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        photos, out = Path(folder) / "photos", Path(folder) / "out"
        photos.mkdir()
        out.mkdir()
        draw_photos(photos, images, image_size)
        listed = list_images([photos])
        paths = [image.path for image in listed]
        torch.manual_seed(0)
        model = build_backbone(name, norm="bn").eval()
        request = Request.model_validate({"pool": pool, "dtype": dtype, "batch": batch})
        network = Network(model, request)
        decoded = [torch.from_numpy(np.array(read_image(Path(path)))) for path in paths[: min(images, 8 * batch)]]
        batches = [torch.stack(decoded[start : start + batch]) for start in range(0, len(decoded), batch)]
        number_of_batches = -(-images // batch)

        fast = optimize_for_inference(model, dtype=getattr(torch, dtype))
        normal = [
            normalise(each, model.preprocessing).contiguous(memory_format=torch.channels_last) for each in batches
        ]

        def network_alone(mark: Mark) -> None:
            with torch.inference_mode():
                for turn in range(number_of_batches):
                    fast(normal[turn % len(normal)])
                    mark(batch)

        def vectors(mark: Mark) -> None:
            for turn in range(number_of_batches):
                network(batches[turn % len(batches)])
                mark(batch)

        def extraction(mark: Mark) -> None:
            write_features(listed, model, out / "shards", request, workers=workers, overwrite=True, progress=mark)

        contenders: dict[str, Callable[[Mark], None]] = {
            "network": network_alone,
            "vectors": vectors,
            "extract": extraction,
        }
        if loop:
            contenders["loop"] = plain_loop(name, paths, out, getattr(torch, dtype), batch, workers)
        for _ in range(3):
            network(batches[0])
            fast(normal[0])
        found: dict[str, list[Measured]] = {contender: [] for contender in contenders}
        order = random.Random(0)
        begun = time.perf_counter()
        for turn in range(rounds):
            if turn and (time.perf_counter() - begun) * (turn + 1) / turn > limit:
                break
            for contender in order.sample(list(contenders), len(contenders)):
                found[contender].append(one := steady(contenders[contender]))
                console.print(
                    f"{contender}: {one.rate:.2f} images/s, {one.work * 1e3:.1f} ms of a processor an image, after "
                    f"{one.start:.2f} s", highlight=False,
                )  # fmt: skip
        title = f"{name}, {dtype}, {image_size[0]}x{image_size[1]}, batch {batch}, {workers} workers, pool {pool}, "
        title += f"{images} photos, {len(found['network'])} rounds, {hardware(DeviceName.CPU)}"
        report(found, rates_of_parts(paths, out), title)


def report(found: dict[str, list[Measured]], parts: dict[str, float], title: str) -> None:
    """Print rates and work, and ratios within rounds."""
    table = Table(title=title)
    for heading in ("", "images/s", "of the network's", "extract's / its", "ms of a processor", "network's / its"):
        table.add_column(heading, justify="right")
    for contender, rounds in found.items():
        of_network = [own.rate / alone.rate for own, alone in zip(rounds, found["network"], strict=True)]
        of_ours = [ours.rate / own.rate for ours, own in zip(found["extract"], rounds, strict=True)]
        work = [alone.work / own.work for own, alone in zip(rounds, found["network"], strict=True)]
        table.add_row(
            contender, f"{statistics.median(each.rate for each in rounds):.2f}",
            *(f"{statistics.median(of):.2f} ({min(of):.2f} - {max(of):.2f})" for of in (of_network, of_ours)),
            f"{1e3 * statistics.median(each.work for each in rounds):.1f}",
            f"{statistics.median(work):.2f} ({min(work):.2f} - {max(work):.2f})",
        )  # fmt: skip
    console.print(table)
    for part, rate in parts.items():
        console.print(f"{part}: {rate:.0f}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
