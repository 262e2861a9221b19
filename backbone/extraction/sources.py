"""Where images come from: files, folders of files, and the same on any file system that fsspec knows."""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import PurePath
from typing import Any, Final, NamedTuple, TypeAlias

from numpy.typing import NDArray
from PIL import Image

IMAGE_SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")

Source: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | NDArray[Any]
"""A path, an address such as s3://bucket/a.jpg, a file's bytes, an image, or an array (H, W, 3) of uint8 in RGB."""


class Named(NamedTuple):
    """An image of a list.

    Attributes:
        name: Its path below the folder that was named, ``deep/a.jpg``; no two of a list are the same.
        path: Where it is.
    """

    name: str
    path: str


def list_images(paths: Sequence[str | os.PathLike[str]], *, recursive: bool = False) -> list[Named]:
    """Return the images that the paths name, a folder standing for those in it, in an order of names alone.

    Args:
        paths: Files and folders, or addresses of them such as ``s3://bucket/photos``, which need fsspec.
        recursive: Whether a folder stands for those in the folders within it, too.

    Raises:
        ValueError: If a path does not exist, a folder holds no image, or two images have one name.
        ModuleNotFoundError: If an address needs a library that is not installed.
    """
    found: dict[str, str] = {}
    for path in [os.fspath(each) for each in paths]:
        for raw, place in _within(path, recursive=recursive):
            name = os.fsencode(raw).decode(errors="backslashreplace")  # bytes that are no text: tables take text alone
            if found.setdefault(name, place) != place:
                raise ValueError(
                    f"{found[name]} and {place} would both be called {name}; rename one, extract them to different "
                    f"folders, or name the folder that holds both with --recursive"
                )
    return [Named(name, place) for name, place in found.items()]


def is_address(path: str) -> bool:
    """Whether ``path`` is one of another file system, such as ``s3://bucket/a.jpg``."""
    return "://" in path


def file_system_of(address: str) -> tuple[Any, str]:
    """Return fsspec's file system of an address, and the path in it.

    Raises:
        ModuleNotFoundError: If fsspec, or what it needs for this one, is not installed.
    """
    if find_spec("fsspec") is None:
        raise ModuleNotFoundError(f"{address} needs fsspec, which is not installed: pip install fsspec", name="fsspec")
    from fsspec.core import url_to_fs

    return url_to_fs(address)  # type: ignore[no-any-return]


def _within(path: str, *, recursive: bool) -> list[tuple[str, str]]:
    """Return name and place of the images that one path stands for."""
    if is_address(path):
        return _within_address(path, recursive=recursive)
    if os.path.isfile(path):
        return [(os.path.basename(path), os.path.abspath(path))]
    if not os.path.isdir(path):
        raise ValueError(f"images must exist, got {path}; check the path")
    root = os.path.abspath(path)
    found = []
    for folder, folders, files in os.walk(root):
        below = os.path.relpath(folder, root)
        prefix = "" if below == os.curdir else PurePath(below).as_posix() + "/"
        found += [(prefix + name, os.path.join(folder, name)) for name in files if _is_image(name)]
        if not recursive:
            folders.clear()
    return _sorted(found, path, recursive=recursive)


def _within_address(address: str, *, recursive: bool) -> list[tuple[str, str]]:
    system, root = file_system_of(address)
    if system.isfile(root):
        return [(PurePath(root).name, address)]
    if not system.exists(root):
        raise ValueError(f"images must exist, got {address}; check the address")
    files = system.find(root, maxdepth=None if recursive else 1)
    found = [(file[len(root) :].lstrip("/"), system.unstrip_protocol(file)) for file in files if _is_image(file)]
    return _sorted(found, address, recursive=recursive)


def _sorted(found: list[tuple[str, str]], path: str, *, recursive: bool) -> list[tuple[str, str]]:
    if not found:
        remedy = "name another folder" if recursive else "name another folder, or add --recursive for those within it"
        raise ValueError(f"{path}: holds no image ({', '.join(IMAGE_SUFFIXES)}); {remedy}")
    return sorted(found)


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)
