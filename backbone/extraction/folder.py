"""The folder of an extraction: what was asked for, shards that are whole, and which images are in them."""

import csv
import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from filelock import FileLock, Timeout

from backbone.extraction.formats import SUFFIXES, ShardFormat
from backbone.extraction.sources import Named
from backbone.weights.writing import write_atomically

SETTINGS: Final = "extraction.json"
INDEX: Final = "index.csv"
FAILED: Final = "failed.csv"
COLUMNS: Final = ("image", "status", "height", "width", "shard", "key", "note")
_SHARD: Final = "shard-{:06d}"
_OURS: Final = ("shard-[0-9]*.csv", *(f"shard-[0-9]*{suffix}" for suffix in SUFFIXES.values()), INDEX, FAILED, SETTINGS)
_LOCK: Final = ".lock"


class Entry(NamedTuple):
    """A line of the index.

    Attributes:
        image: The image's name in the list.
        status: ``ok`` or ``failed``.
        height: In pixels, as the network saw it; empty if the image could not be read.
        width: The same.
        shard: File that holds its features; empty if there are none.
        key: Where in it: the row of a matrix, the name before ``/<level>``, or the key of a tar.
        note: Why it failed, or what had to be guessed to read it.
    """

    image: str
    status: str
    height: str
    width: str
    shard: str
    key: str
    note: str


class Shard(NamedTuple):
    """A run of the list that is written as one file.

    Attributes:
        number: Of the shard.
        start: Place of its first image in the list.
        images: Its images.
    """

    number: int
    start: int
    images: Sequence[Named]


class OutputFolder:
    """Where shards go. A shard is whole once its part of the index is there, which is written last.

    Args:
        path: The folder; made if need be.
        format: Of the shards.
        images_per_shard: How many images of the list one shard holds.
    """

    def __init__(self, path: Path, format: ShardFormat, images_per_shard: int) -> None:
        if type(images_per_shard) is not int or images_per_shard < 1:
            raise ValueError(f"images_per_shard must be a whole number of 1 or more, got {images_per_shard!r}")
        self.path, self.format, self.images_per_shard = path, format, images_per_shard

    def lock(self) -> FileLock:
        """Return a lock that one process holds, and loses when it is killed; held from now on.

        Raises:
            ValueError: If another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / _LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise ValueError(
                f"{self.path} must be written by one process, and another one does; wait for it, or choose another "
                f"--out"
            ) from None
        return lock

    def begin(self, settings: Mapping[str, Any], *, overwrite: bool) -> None:
        """Note what is asked for, or make sure that it is what the folder has begun with.

        Raises:
            ValueError: If it is not, and ``overwrite`` is not given.
        """
        file = self.path / SETTINGS
        if overwrite:
            for pattern in _OURS[::-1]:  # the settings first: what is left without them is nobody's
                for old in self.path.glob(pattern):
                    old.unlink()
        for pattern in (".shard-*.part", ".*.csv.*.part", f".{SETTINGS}.*.part"):
            for draft in self.path.glob(pattern):
                draft.unlink(missing_ok=True)  # of a run that was killed
        if file.exists():
            _refuse_others(self.path, json.loads(file.read_text()), json.loads(json.dumps(settings)))
            return
        if any(self.path.glob("shard-[0-9]*")):
            raise ValueError(
                f"{self.path} holds shards without {SETTINGS}, which told what they are; choose another --out, or "
                f"replace them with --overwrite"
            )
        text = json.dumps(settings, indent=1) + "\n"
        write_atomically(file, lambda draft: _write_text(draft, text))

    def shard(self, number: int) -> Path:
        """Return the file of a shard."""
        return self.path / (_SHARD.format(number) + SUFFIXES[self.format])

    def part(self, number: int) -> Path:
        """Return the shard's part of the index."""
        return self.path / (_SHARD.format(number) + ".csv")

    def plan(self, images: Sequence[Named]) -> list[Shard]:
        """Return all shards: which images one holds is a function of the list alone."""
        size = self.images_per_shard
        starts = range(0, len(images), size)
        return [Shard(number, start, images[start : start + size]) for number, start in enumerate(starts)]

    def missing(self, images: Sequence[Named]) -> list[Shard]:
        """Return the shards that are still to be written."""
        return [shard for shard in self.plan(images) if not self.part(shard.number).exists()]

    def commit(self, number: int, entries: Sequence[Entry]) -> None:
        """Note that a shard, whose file is in its place, is whole."""
        write_atomically(self.part(number), lambda draft: _write_text(draft, _lines(entries)))

    def finish(self, images: Sequence[Named]) -> int:
        """Write the index of all images and the list of those that failed; return how many did."""
        failed = 0

        def write(draft: Path, *, failures_only: bool) -> None:
            nonlocal failed
            with draft.open("w", encoding="utf-8", newline="") as file:
                file.write(_line(("image", "reason") if failures_only else COLUMNS))
                for number in range(-(-len(images) // self.images_per_shard)):
                    part = self.part(number).read_text(encoding="utf-8")
                    if not failures_only:
                        file.write(part)
                        continue
                    for entry in map(Entry._make, csv.reader(io.StringIO(part, newline=""))):
                        if entry.status == "failed":
                            failed += 1
                            file.write(_line((entry.image, entry.note)))

        write_atomically(self.path / FAILED, lambda draft: write(draft, failures_only=True))
        write_atomically(self.path / INDEX, lambda draft: write(draft, failures_only=False))
        return failed


def fingerprint(images: Sequence[Named]) -> str:
    """Return what changes when a name or the order of the list does."""
    digest = hashlib.sha256()
    for image in images:
        digest.update(os.fsencode(image.name) + b"\0")
    return digest.hexdigest()


def _refuse_others(path: Path, there: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    differing = [key for key in {**there, **asked} if there.get(key) != asked.get(key)]
    if differing:
        told = ", ".join(f"{key} {_short(there.get(key))} there and {_short(asked.get(key))} here" for key in differing)
        raise ValueError(
            f"{path} holds another extraction ({told}); go on with its settings, choose another --out, or replace it "
            f"with --overwrite"
        )


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:16]}..."  # noqa: PLR2004


def _lines(entries: Sequence[Entry]) -> str:
    return "".join(map(_line, entries))


def _line(cells: Sequence[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(cells)
    return buffer.getvalue()


def _write_text(draft: Path, text: str) -> None:
    draft.write_text(text, encoding="utf-8", newline="")
