"""Feature maps of a photo, as files and as a picture."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from backbone.features import Backbone, Features, FeatureSpec, Preprocessing

IMAGE_SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
_PICTURE_DPI: Final = 140


def read_image(path: Path, *, shorter_side: int | None = None) -> Image.Image:
    """Return the photo upright and in RGB, resized so that its shorter side has ``shorter_side`` pixels.

    Raises:
        ValueError: If the file cannot be read as an image.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read as an image ({error}); give a JPEG, PNG or the like") from None
    if shorter_side is not None:
        scale = shorter_side / min(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return image


def to_tensor(image: Image.Image, preprocessing: Preprocessing) -> Tensor:
    """Return the image (1, 3, H, W), float32, in the channel order, range and normalisation the weights expect."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    if preprocessing.channel_order == "bgr":
        pixels = pixels.flip(0)
    low, high = preprocessing.value_range
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    return ((pixels * (high - low) + low - mean) / std)[None]


@torch.inference_mode()
def extract_features(backbone: Backbone, image: Image.Image) -> Features:
    """Return the feature maps of one photo, each (1, C, H / stride, W / stride), float32, on the CPU."""
    device = next(backbone.parameters()).device
    features = backbone(to_tensor(image, backbone.preprocessing).to(device))
    return {name: features[name].float().cpu().contiguous() for name in backbone.feature_specs}


def save_features(features: Features, path: Path) -> None:
    """Write the feature maps as safetensors: the whole file or none."""
    from safetensors.torch import save_file

    write_whole(path, lambda temporary: save_file(features, temporary))


def save_picture(image: Image.Image, features: Features, specs: dict[str, FeatureSpec], path: Path) -> None:
    """Draw the photo with its feature maps beside it, in PCA colours, labelled; the whole file or none.

    The three strongest principal components of a level's channels become red, green and blue, so that places with
    like features have like colours.
    """
    from matplotlib.figure import (
        Figure,
    )  # the object interface: no backend is chosen, no global state is touched

    background, ink = "#101418", "#e8eaed"
    columns = 1 + len(features)
    aspect = image.height / image.width
    panel_width = 3.2 if aspect > 1 else 4.2  # inches
    figure = Figure(figsize=(columns * panel_width, panel_width * aspect + 0.75), facecolor=background)
    panels = figure.subplots(1, columns, squeeze=False)[0]
    titles = [f"image\n{image.height} x {image.width}  (H x W)"]
    pictures: list[NDArray[Any]] = [np.asarray(image)]
    strides = [1]
    for name, feature in features.items():
        spec, (height, width) = specs[name], feature.shape[2:]
        titles.append(f"{name.upper()}   {spec.channels} channels\nstride {spec.stride}   {height} x {width}")
        pictures.append(pca_colours(feature[0]))
        strides.append(spec.stride)
    for panel, title, picture, stride in zip(panels, titles, pictures, strides, strict=True):
        height, width = picture.shape[:2]
        panel.imshow(picture, extent=(0, width * stride, height * stride, 0), interpolation="nearest")
        panel.set(xlim=(0, image.width), ylim=(image.height, 0))  # sizes round up: the last pixel may stick out
        panel.set_title(title, color=ink, fontsize=11, linespacing=1.5)
        panel.axis("off")
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.02, top=1 - 0.62 / figure.get_size_inches()[1], wspace=0.03)
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=_PICTURE_DPI))


def pca_colours(feature: Tensor) -> NDArray[np.float32]:
    """Return (H, W, 3) colours in 0 to 1: the first three principal components of a feature map (C, H, W)."""
    _, height, width = feature.shape
    pixels = feature.flatten(1).T.double()  # (H * W, C)
    pixels = pixels - pixels.mean(0)
    _, directions = torch.linalg.eigh(pixels.T @ pixels)  # ascending
    components = pixels @ directions.flip(1)[:, :3]
    # An eigenvector's sign is arbitrary: point each at its heavier tail, so that one image gives one picture.
    components = components * (components**3).sum(0).sign()
    components = F.pad(components, (0, 3 - components.shape[1]))
    low, high = (components.quantile(q, dim=0) for q in (0.01, 0.99))
    colours = ((components - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    return colours.reshape(height, width, 3).float().numpy()


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place and move it there, so that no reader ever finds half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Return the image files named, with a folder standing for the images directly in it.

    Raises:
        ValueError: If a path does not exist, a folder holds no image, or two images would write the same files.
    """
    images: list[Path] = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"images must exist, got {path}; check the path")
        found = [path]
        if path.is_dir():
            found = sorted(child for child in path.iterdir() if child.suffix.lower() in IMAGE_SUFFIXES)
            if not found:
                raise ValueError(f"{path}: holds no image ({', '.join(IMAGE_SUFFIXES)}); name another folder")
        images += found
    by_stem: dict[str, Path] = {}
    for image in images:
        if by_stem.setdefault(image.stem, image) is not image:
            raise ValueError(
                f"{by_stem[image.stem]} and {image} would both be written as {image.stem}.safetensors; "
                f"rename one or extract them to different folders"
            )
    return images
