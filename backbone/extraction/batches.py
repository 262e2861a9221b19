"""Images of one size together: a function of the order and the sizes alone, so that each run makes the same batches."""

from collections.abc import Callable, Iterable, Iterator
from typing import Final

from backbone.extraction.reading import Read

MAX_WAITING_PIXELS: Final = 2**26
"""Pixels of images that wait for others of their size; beyond, those of the commonest size go as they are."""


def batched(reads: Iterable[Read], images_at_once: Callable[[int, int], int]) -> Iterator[list[Read]]:
    """Yield images of one size, as many as ``images_at_once(height, width)`` says; at the end those that are left.

    An image that could not be read comes alone and at once. Padding images to a common size would change their
    features, so that each size is a batch of its own; the request's ``multiple_of`` makes sizes few.
    """
    waiting: dict[tuple[int, int], list[Read]] = {}
    held = 0
    for read in reads:
        if read.pixels is None:
            yield [read]
            continue
        height, width, _ = read.pixels.shape
        group = waiting.setdefault((height, width), [])
        group.append(read)
        held += height * width
        if len(group) == images_at_once(height, width):
            held -= len(group) * height * width
            yield waiting.pop((height, width))
        elif held > MAX_WAITING_PIXELS:
            most = max(waiting, key=lambda size: len(waiting[size]) * size[0] * size[1])  # the first of equals
            held -= len(waiting[most]) * most[0] * most[1]
            yield waiting.pop(most)
    yield from waiting.values()
