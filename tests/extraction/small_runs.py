"""What the tests of extraction share: photos, a small network, a folder as bytes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from backbone import Backbone, build_backbone
from backbone.extraction import Request, list_images, write_features

SIZES = ((64, 48), (48, 64), (64, 48), (33, 65), (64, 48))
"""Width and height, in turn."""


def write_photos(folder: Path, count: int, sizes: Sequence[tuple[int, int]] = SIZES) -> Path:
    """Write photos of noise; every seventh is none."""
    folder.mkdir(parents=True)
    for number in range(count):
        path = folder / f"{number:03d}.jpg"
        if number % 7 == 5:
            path.write_bytes(b"no photo")
            continue
        width, height = sizes[number % len(sizes)]
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


def small_network() -> Backbone:
    torch.manual_seed(0)
    return build_backbone("resnet18", norm="bn", out_features=("c2", "c3")).eval()


def write(photos: Path, out: Path, **options: Any) -> int:
    """Extract with the request's keys and those of ``write_features``."""
    keys = {key: options.pop(key) for key in list(options) if key in Request.model_fields}
    return write_features(
        list_images([photos]), small_network(), out, Request(**keys), **{"images_per_shard": 4, "workers": 0, **options}
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".lock"}
