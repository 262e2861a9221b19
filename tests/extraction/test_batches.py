"""Batches: images of one size, the same ones in each run, and few that wait."""

from collections.abc import Iterator

import pytest
import torch

from backbone.extraction.batches import batched
from backbone.extraction.reading import Read


def read(number: int, height: int, width: int) -> Read:
    return Read(number, torch.empty(height, width, 3, dtype=torch.uint8))


def numbers(groups: Iterator[list[Read]]) -> list[list[int]]:
    return [[each.number for each in group] for group in groups]


def test_batches_are_of_one_size_and_what_is_left_comes_last() -> None:
    reads = [read(0, 2, 3), read(1, 3, 2), read(2, 2, 3), Read(3, None, "damaged"), read(4, 2, 3)]
    assert numbers(batched(reads, lambda *_: 2)) == [[0, 2], [3], [1], [4]]


def test_few_images_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backbone.extraction.batches.MAX_WAITING_PIXELS", 10)
    reads = [read(0, 2, 2), read(1, 1, 3), read(2, 1, 3), read(3, 1, 1)]
    assert numbers(batched(reads, lambda *_: 100)) == [[1, 2], [0], [3]]
