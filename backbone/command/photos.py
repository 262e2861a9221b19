"""Which photos there are, and what the files made of each are called."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from backbone.extraction.sources import IMAGE_SUFFIXES


def find_images(paths: Sequence[Path], *, recursive: bool = False) -> list[Path]:
    """Return the image files named, each once, with a folder standing for the images in it.

    Args:
        paths: Files and folders.
        recursive: Whether a folder stands for those in the folders within it, too.

    Raises:
        ValueError: If a path does not exist or a folder holds no image.
    """
    return list(name_results(paths, recursive=recursive))


def name_results(paths: Sequence[Path], *, recursive: bool = False) -> dict[Path, Path]:
    """Return for each image file the path, without suffix and relative to OUT, of what is made of it.

    It is the image's stem, in the same folders below the one that was named. Photos of one stem keep their suffix in
    it: ``a.jpg`` and ``a.png`` give ``a.jpg`` and ``a.png``.

    Raises:
        ValueError: As in ``find_images``, and if two images of different folders would write the same files.
    """
    full_names: dict[Path, Path] = {}
    seen: set[Path] = set()
    for path in paths:
        if not path.exists():
            raise ValueError(f"images must exist, got {path}; check the path")
        for image in _images_in(path, recursive=recursive) if path.is_dir() else [path]:
            if (real := image.resolve()) not in seen:
                seen.add(real)
                full_names[image] = image.relative_to(path) if path.is_dir() else Path(image.name)
    return _without_suffixes(full_names)


def _images_in(folder: Path, *, recursive: bool) -> list[Path]:
    candidates = folder.rglob("*") if recursive else folder.iterdir()
    found = sorted(each for each in candidates if each.suffix.lower() in IMAGE_SUFFIXES and each.is_file())
    if not found:
        remedy = "name another folder" if recursive else "name another folder, or add --recursive for those within it"
        raise ValueError(f"{folder}: holds no image ({', '.join(IMAGE_SUFFIXES)}); {remedy}")
    return found


def _without_suffixes(full_names: Mapping[Path, Path]) -> dict[Path, Path]:
    shared = Counter(name.with_suffix("") for name in full_names.values())
    names = {image: name.with_suffix("") if shared[name.with_suffix("")] == 1 else name
             for image, name in full_names.items()}  # fmt: skip
    first: dict[Path, Path] = {}
    for image, name in names.items():
        if name in first:
            raise ValueError(
                f"{first[name]} and {image} would both be written as {name}; rename one, extract them to different "
                f"folders, or name the folder that holds both with --recursive"
            )
        first[name] = image
    return names


def refuse_overwriting(images: Sequence[Path], results: Sequence[Path]) -> None:
    """Make sure that none of ``results`` would replace one of the photos.

    Raises:
        ValueError: If one would.
    """
    originals = {(stat.st_dev, stat.st_ino) for stat in map(os.stat, images)}  # paths may differ in case or by links
    for result in results:
        if result.exists() and (result.stat().st_dev, result.stat().st_ino) in originals:
            raise ValueError(f"{result} is a photo, and its picture would replace it; choose another --out")
