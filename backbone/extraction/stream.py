"""From images to features, one after the other: read by workers, computed in batches of one size."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch

from backbone.extraction.batches import batched
from backbone.extraction.network import Network, stacked
from backbone.extraction.reading import Read, read_all
from backbone.extraction.request import MAX_PIXELS, DtypeName, Pool, Request
from backbone.extraction.sources import Source
from backbone.extraction.workers import workers_for
from backbone.features import Backbone, Features

FAILURES: Final = (ValueError, OSError, RuntimeError, MemoryError)
"""What a network raises of images that it cannot compute; torch's are RuntimeErrors."""


@dataclass(frozen=True, slots=True, eq=False)
class Extracted:
    """What came of one image.

    Attributes:
        number: The image's place among those given, from 0.
        features: By level a vector (C,), or a map (C, H / stride, W / stride) without pooling, on the network's
            device; None if there are none.
        size: Height and width in pixels, as the network saw it; None if the image could not be read.
        note: Why there are no features; or what had to be guessed to read the image.
    """

    number: int
    features: Features | None
    size: tuple[int, int] | None
    note: str = ""


def extract(
    images: Iterable[Source],
    model: Backbone,
    *,
    pool: Pool = "avg",
    levels: Sequence[str] | None = None,
    dtype: DtypeName = "float32",
    store: DtypeName | None = None,
    batch: int | Literal["auto"] = "auto",
    workers: int | Literal["auto"] = "auto",
    device: torch.device | str | None = None,
    shorter_side: int | None = None,
    max_size: int | None = None,
    multiple_of: int = 1,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[Extracted]:
    """Yield the features of each image as soon as its batch is computed.

    Images of one size share a batch, so that they may come in another order than they were given: ``number`` tells.
    The order is the same in each run. An image that cannot be read stops nothing and comes with the reason.

    Args:
        images: Paths, addresses, PIL images or arrays (H, W, 3) of uint8 in RGB. They are asked for little ahead.
        model: The backbone; an optimised copy computes.
        pool: ``avg`` and ``gem`` (power 3) give a vector a level, ``none`` the maps.
        levels: Feature maps to keep, such as ``["c4", "c5"]``; all by default.
        dtype: What to compute in.
        store: What to return; by default maps as computed and vectors in float32.
        batch: Images at once; ``auto`` by their size.
        workers: Processes that read, 0 for this one; ``auto`` by the processors there are.
        device: Where to compute; by default where the model is.
        shorter_side: Resize to this shorter side, in pixels.
        max_size: Longer side at most, in pixels.
        multiple_of: Resize both sides to the nearest multiple of this, in pixels, so that more images share a batch.
        max_pixels: An image of more, after resizing, is not computed.

    Raises:
        ValueError: If a setting is wrong, or the model lacks a level.
        OSError: (from the iterator) If the folder of the images vanishes.
    """
    request = Request(
        pool=pool, levels=None if levels is None else tuple(levels), dtype=dtype, store=store, batch=batch,
        shorter_side=shorter_side, max_size=max_size, multiple_of=multiple_of, max_pixels=max_pixels,
    )  # fmt: skip
    network = Network(model, request, device)
    count = workers_for(workers, network.device)
    return _one_by_one(read_all(enumerate(images), request, count), network)


def _one_by_one(reads: Iterator[Read], network: Network) -> Iterator[Extracted]:
    for results in computed(reads, network):
        yield from results


def computed(reads: Iterable[Read], network: Network) -> Iterator[list[Extracted]]:
    """Yield what comes of each batch."""
    for group in batched(reads, network.images_at_once):
        yield _compute(group, network)


def _compute(group: list[Read], network: Network) -> list[Extracted]:
    """Compute images of one size; where that fails as a whole, one by one."""
    images = [read.pixels for read in group if read.pixels is not None]
    if not images:
        return [Extracted(read.number, None, None, read.note) for read in group]
    size = (images[0].shape[0], images[0].shape[1])
    try:
        features = network(stacked(images))
    except FAILURES as error:
        if len(group) > 1:
            return [result for read in group for result in _compute([read], network)]
        return [Extracted(group[0].number, None, size, " ".join(str(error).split()) or type(error).__name__)]
    return [
        Extracted(read.number, {level: values[place] for level, values in features.items()}, size, read.note)
        for place, read in enumerate(group)
    ]
