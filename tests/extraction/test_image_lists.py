"""Lists of images: names that are unique, an order that no file system decides, addresses of others."""

import os
from pathlib import Path

import pytest
from safetensors.torch import load_file
from small_runs import small_network, write, write_photos

from backbone.extraction import extract, list_images


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_names_are_paths_below_the_folder_in_order(tmp_path: Path) -> None:
    touch(tmp_path, "b.jpg", "a/z.JPG", "a/b.png", "notes.txt", "a.png")
    assert [image.name for image in list_images([tmp_path], recursive=True)] == ["a.png", "a/b.png", "a/z.JPG", "b.jpg"]
    assert [image.name for image in list_images([tmp_path])] == ["a.png", "b.jpg"]


def test_an_image_that_is_named_twice_is_there_once(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg")
    assert len(list_images([tmp_path, tmp_path / "a.jpg"])) == 1


def test_two_images_of_one_name_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "x/a.jpg", "y/a.jpg")
    with pytest.raises(ValueError, match=r"would both be called a\.jpg"):
        list_images([tmp_path / "x", tmp_path / "y"])


@pytest.mark.parametrize("path", ["nowhere", "empty"])
def test_what_holds_no_image_is_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"images must exist|holds no image"):
        list_images([tmp_path / path])


def test_addresses_of_another_file_system_are_listed_and_read(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    for path in sorted(write_photos(tmp_path / "in", 4).iterdir()):
        memory.pipe(f"/photos/{path.name}", path.read_bytes())
    images = list_images(["memory://photos"])
    assert [image.name for image in images] == ["000.jpg", "001.jpg", "002.jpg", "003.jpg"]
    results = list(extract([image.path for image in images], small_network(), workers=0))
    assert all(each.features is not None for each in results)


def test_a_name_that_is_no_text_becomes_one(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "in", 1)
    (photos / "000.jpg").rename(photos / os.fsdecode(b"\xff.jpg"))
    assert write(photos, tmp_path / "out") == 0
    assert sorted(load_file(tmp_path / "out" / "shard-000000.safetensors")) == ["\\xff.jpg/c2", "\\xff.jpg/c3"]
