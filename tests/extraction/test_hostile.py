"""Damaged, huge and strange files: none stops a run, each is in the index with its features or the reason."""

import csv
import os
import signal
import time
from pathlib import Path

import hostile
import numpy as np
import pytest
from small_runs import small_network, write

from backbone import images
from backbone.extraction import extract, list_images, reading


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    for name, (_, make) in hostile.KINDS.items():
        (folder / name).write_bytes(make(np.random.default_rng(0)))
    for name, make in hostile.UNCERTAIN.items():
        (folder / name).write_bytes(make(np.random.default_rng(0)))
    hostile.write_strange_files(folder)
    return folder


def test_each_kind_is_in_the_index_with_its_features_or_the_reason(files: Path, tmp_path: Path) -> None:
    write(files, tmp_path, pool="avg", workers=1, images_per_shard=100)
    with (tmp_path / "index.csv").open(newline="") as file:
        lines = {line["image"]: line for line in csv.DictReader(file)}
    assert lines.keys() == {path.name for path in files.iterdir()}
    told = {name: lines[name]["status"] == "ok" for name in hostile.KINDS}
    assert told == {name: readable for name, (readable, _) in hostile.KINDS.items()}
    assert all(line["note"] for line in lines.values() if line["status"] == "failed")
    assert (lines["pipe.jpg"]["note"], lines["link.jpg"]["note"]) == ("is no file", "no such file or directory")


def test_what_takes_too_long_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "SECONDS", 0.1)
    (tmp_path / "a.jpg").write_bytes(hostile.jpeg_of_many_scans(np.random.default_rng(0), 3000))
    begun = time.process_time()
    (result,) = extract([tmp_path / "a.jpg"], small_network(), workers=0)
    assert result.note == "takes more than 0.1 s to be decoded"
    assert time.process_time() - begun < 8


def fatal(marked: bytes) -> object:
    """Make a reader that ends its own process at a file of certain bytes."""
    read = images.read_with_notes

    def reader(path: Path, *, data: bytes | None = None, max_pixels: int | None = None) -> object:
        if data == marked:
            os.kill(os.getpid(), signal.SIGSEGV)
        return read(path, data=data, max_pixels=max_pixels)

    return reader


def test_a_file_that_ends_its_process_costs_itself_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = hostile.encoded(hostile.noise(np.random.default_rng(0)), "PNG")
    for number in range(20):
        (tmp_path / f"{number:02d}.png").write_bytes(b"fatal" if number == 3 else good)
    monkeypatch.setattr(reading, "read_with_notes", fatal(b"fatal"))
    paths = [image.path for image in list_images([tmp_path])]
    results = {each.number: each for each in extract(paths, small_network(), workers=2)}
    failed = [number for number, each in sorted(results.items()) if each.features is None]
    assert (len(results), failed) == (20, [3])
    assert "ended the process that decoded it" in results[3].note
