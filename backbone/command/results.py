"""Feature maps as files: whole or not there, and with what is needed to read them again."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from backbone.command.feature_picture import save_picture
from backbone.config import BackboneConfig
from backbone.features import Backbone, Features, FeatureSpec


class Format(StrEnum):
    """How feature maps are stored."""

    SAFETENSORS = "safetensors"
    NPZ = "npz"
    PT = "pt"


def describe_features(config: BackboneConfig, model: Backbone, image: Image.Image, source: Path) -> dict[str, str]:
    """Return what a file of features says of them: network, weights, preprocessing, the image's name and its size."""
    return {
        "network": config.name,
        "weights": config.weights or "random (seed 0)",
        "config": config.model_dump_json(exclude_defaults=True),
        "preprocessing": json.dumps(asdict(model.preprocessing)),
        "strides": json.dumps({name: spec.stride for name, spec in model.feature_specs.items()}),
        "image": source.name,
        "image_size": f"{image.height} {image.width}",  # H W, as the network saw it
    }


def save_results(
    path: Path,
    features: Features,
    metadata: Mapping[str, str],
    *,
    format: Format = Format.SAFETENSORS,
    picture_of: Image.Image | None = None,
    specs: Mapping[str, FeatureSpec],
) -> list[Path]:
    """Write the features and, with ``picture_of``, their picture, both whole or neither; return the paths.

    Args:
        path: Where, without suffix; folders are made.
        features: The maps, each (1, C, H / stride, W / stride).
        metadata: What to say of them in the file.
        format: How to store them.
        picture_of: The photo to draw beside them.
        specs: Channels and strides of the maps.

    Raises:
        ValueError: If a folder is where a file must go.
    """
    writers: dict[Path, Callable[[Path], None]] = {
        path.with_name(f"{path.name}.{format}"): lambda draft: _WRITERS[format](features, metadata, draft)
    }
    if picture_of is not None:
        image = picture_of
        writers[path.with_name(f"{path.name}.png")] = lambda draft: save_picture(image, features, specs, draft)
    for result in writers:
        if result.is_dir():
            raise ValueError(f"{result} must be free for a file, and is a folder; move it or choose another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    drafts = {result: result.with_name(f".{result.name}.{os.getpid()}.partial") for result in writers}
    try:
        for result, write in writers.items():
            write(drafts[result])
        for result, draft in drafts.items():
            os.replace(draft, result)
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)
    return list(writers)


def _write_safetensors(features: Features, metadata: Mapping[str, str], path: Path) -> None:
    from safetensors.torch import save

    path.write_bytes(save(features, dict(metadata)))  # save_file ignores the umask, and its errors are no OSErrors


def _write_npz(features: Features, metadata: Mapping[str, str], path: Path) -> None:
    arrays: dict[str, Any] = {name: feature.numpy() for name, feature in features.items()}
    with path.open("wb") as file:  # a name of our own: savez would add a suffix
        np.savez(file, **arrays, metadata=np.array(json.dumps(dict(metadata))))


def _write_pt(features: Features, metadata: Mapping[str, str], path: Path) -> None:
    with path.open("wb") as file:
        torch.save({"features": features, "metadata": dict(metadata)}, file)


_WRITERS = {Format.SAFETENSORS: _write_safetensors, Format.NPZ: _write_npz, Format.PT: _write_pt}
