"""How a library spells the parameters of a ResNet, as one table read in both directions."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Final, TypeAlias

from torch import Tensor

from backbone.weights.metadata import Metadata
from backbone.weights.reading import Checkpoint

State: TypeAlias = dict[str, Tensor]
"""Tensors by our parameter names, which are torchvision's."""

WORDS: Final = MappingProxyType(
    {
        "stage": ("1", "2", "3", "4"),
        "conv": ("1", "2", "3"),
        "norm": ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"),
        "linear": ("weight", "bias"),
    }
)
"""Our words for what a row's {placeholders} stand for; {block} is any number, the same on both sides."""


@dataclass(frozen=True)
class KeyScheme:
    """One library's names.

    Attributes:
        rows: Our name and theirs, with placeholders.
        words: Their words for each placeholder, in the order of ``WORDS``, where they differ from ours.
    """

    rows: tuple[tuple[str, str], ...]
    words: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def to_ours(self, key: str) -> str | None:
        """Return our name of their ``key``; None if it is none of a ResNet's."""
        return _translated(key, self._inward)

    def to_theirs(self, key: str) -> str | None:
        """Return their name of our ``key``; None if they have no such parameter."""
        return _translated(key, self._outward)

    @cached_property
    def _inward(self) -> "_Table":
        return _table(((theirs, ours) for ours, theirs in self.rows), {**WORDS, **self.words}, WORDS)

    @cached_property
    def _outward(self) -> "_Table":
        return _table(self.rows, WORDS, {**WORDS, **self.words})


_Table: TypeAlias = list[tuple[re.Pattern[str], str, Mapping[str, Mapping[str, str]]]]


def _table(
    rows: Iterable[tuple[str, str]], source: Mapping[str, tuple[str, ...]], target: Mapping[str, tuple[str, ...]]
) -> _Table:
    choices = {name: "|".join(map(re.escape, words)) for name, words in source.items()} | {"block": "[0-9]{1,3}"}
    translations = {name: dict(zip(source[name], target[name], strict=False)) for name in source}
    return [
        (
            re.compile(re.sub(r"\\{(\w+)\\}", lambda name: f"(?P<{name[1]}>{choices[name[1]]})", re.escape(given))),
            wanted,
            translations,
        )
        for given, wanted in rows
    ]


def _translated(key: str, table: _Table) -> str | None:
    for pattern, wanted, translations in table:
        found = pattern.fullmatch(key)
        if found:
            words = {n: word if n == "block" else translations[n].get(word) for n, word in found.groupdict().items()}
            return None if None in words.values() else wanted.format(**words)
    return None


@dataclass(frozen=True)
class Format:
    """What is known of one library's checkpoints.

    Attributes:
        name: Shown in reports; the library.
        scheme: Its parameter names.
        sign: Returns by what the checkpoint shows that it is of this format, given the prefix of the network's keys;
            None if it does not. Formats that share their names are told apart by it.
        metadata: Returns what is known, or by the format's convention assumed, of how the weights were trained.
        complete: Returns the translated tensors with what the format leaves out, and a sentence for each addition.
        beside: Keys beside the network's prefix that belong to the network: their prefix and ours.
        heads: Patterns of keys, within the network's prefix, that are no part of a ResNet, and what they are.
        counts_batches: Whether strict loading in the library takes ``num_batches_tracked``.
    """

    name: str
    scheme: KeyScheme
    sign: Callable[[Checkpoint, str], str | None]
    metadata: Callable[[Checkpoint, State], Metadata]
    complete: Callable[[State], tuple[State, list[str]]] = lambda state: (state, [])
    beside: tuple[str, str] | None = None
    heads: Mapping[str, str] = field(default_factory=dict)
    counts_batches: bool = True
