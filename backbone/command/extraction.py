"""Feature maps of a photo, as files and as a picture."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from backbone import images as reader
from backbone.features import Backbone, Features, FeatureSpec, Preprocessing

IMAGE_SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
_PICTURE_DPI: Final = 140
_TALLEST_PANEL: Final = 4  # height / width; a taller photo is drawn narrower within it


def read_image(path: Path, *, shorter_side: int | None = None) -> Image.Image:
    """Return the photo upright and in RGB, resized so that its shorter side has ``shorter_side`` pixels.

    Raises:
        ValueError: If the file cannot be read as an image.
    """
    image = reader.read_image(path)
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


def save_results(
    image: Image.Image, features: Features, specs: dict[str, FeatureSpec], folder: Path, stem: str
) -> tuple[Path, Path]:
    """Write ``stem``.safetensors and ``stem``.png into ``folder``, both whole or neither, and return their paths.

    Raises:
        ValueError: If a folder is where a file must go.
    """
    results = folder / f"{stem}.safetensors", folder / f"{stem}.png"
    for path in results:
        if path.is_dir():
            raise ValueError(f"{path} must be free for a file, and is a folder; move it or choose another --out")
    features_file, picture_file = (path.with_name(f".{path.name}.{os.getpid()}.partial") for path in results)
    try:
        save_features(features, features_file)
        save_picture(image, features, specs, picture_file)
        os.replace(features_file, results[0])
        os.replace(picture_file, results[1])
    finally:
        features_file.unlink(missing_ok=True)
        picture_file.unlink(missing_ok=True)
    return results


def save_features(features: Features, path: Path) -> None:
    """Write the feature maps as safetensors."""
    from safetensors.torch import save

    path.write_bytes(save(features))  # save_file would ignore the umask, and its errors are no OSErrors


def save_picture(image: Image.Image, features: Features, specs: dict[str, FeatureSpec], path: Path) -> None:
    """Draw the photo with its feature maps beside it, in PCA colours, labelled, as a PNG for a screen.

    The three strongest principal components of a level's channels become red, green and blue, so that places with
    like features have like colours.
    """
    from matplotlib.figure import Figure  # the object interface: no backend is chosen, no global state is touched

    background, ink = "#101418", "#e8eaed"
    columns = 1 + len(features)
    aspect = min(image.height / image.width, _TALLEST_PANEL)
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
    figure.savefig(path, format="png", dpi=_PICTURE_DPI)


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


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Return the image files named, each once, with a folder standing for the images directly in it.

    Raises:
        ValueError: If a path does not exist, a folder holds no image, or two images would write the same files.
    """
    images: list[Path] = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"images must exist, got {path}; check the path")
        found = [path]
        if path.is_dir():
            found = sorted(c for c in path.iterdir() if c.suffix.lower() in IMAGE_SUFFIXES and c.is_file())
            if not found:
                raise ValueError(f"{path}: holds no image ({', '.join(IMAGE_SUFFIXES)}); name another folder")
        images += found
    by_stem: dict[str, Path] = {}
    for image in images:
        first = by_stem.setdefault(image.stem, image)
        if first.resolve() != image.resolve():
            raise ValueError(
                f"{first} and {image} would both be written as {image.stem}.safetensors; "
                f"rename one or extract them to different folders"
            )
    return list(by_stem.values())


def refuse_overwriting(images: Sequence[Path], out: Path) -> None:
    """Make sure that no picture written to ``out`` would replace one of the photos.

    Raises:
        ValueError: If one would.
    """
    originals = {(stat.st_dev, stat.st_ino) for stat in map(os.stat, images)}  # paths may differ in case or by links
    for picture in (out / f"{image.stem}.png" for image in images):
        if picture.exists() and (picture.stat().st_dev, picture.stat().st_ino) in originals:
            raise ValueError(f"{picture} is a photo, and its picture would replace it; choose another --out")
