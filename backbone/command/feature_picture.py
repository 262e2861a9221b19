"""A photo with its feature maps beside it, in colours that mean alike features."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from backbone.features import Features, FeatureSpec

_PICTURE_DPI: Final = 140
_TALLEST_PANEL: Final = 4  # height / width; a taller photo is drawn narrower within it
_MOST_PIXELS_OF_PHOTO: Final = 1024  # of the longer side: more than a panel has
_EXACT_SIDE: Final = 256
"""Channels or pixels up to which principal components are exact; beyond, a random projection finds them."""
_PROJECTIONS: Final = 16
_ITERATIONS: Final = 6


def save_picture(image: Image.Image, features: Features, specs: Mapping[str, FeatureSpec], path: Path) -> None:
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
    photo = image.copy()
    photo.thumbnail((_MOST_PIXELS_OF_PHOTO, _MOST_PIXELS_OF_PHOTO))
    pictures: list[NDArray[Any]] = [np.asarray(photo)]
    extents = [(0, image.width, image.height, 0)]
    for name, feature in features.items():
        spec, (height, width) = specs[name], feature.shape[2:]
        titles.append(f"{name.upper()}   {spec.channels} channels\nstride {spec.stride}   {height} x {width}")
        pictures.append(pca_colours(feature[0]))
        extents.append((0, width * spec.stride, height * spec.stride, 0))
    for panel, title, picture, extent in zip(panels, titles, pictures, extents, strict=True):
        panel.imshow(picture, extent=extent, interpolation="nearest")
        panel.set(xlim=(0, image.width), ylim=(image.height, 0))  # sizes round up: the last pixel may stick out
        panel.set_title(title, color=ink, fontsize=11, linespacing=1.5)
        panel.axis("off")
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.02, top=1 - 0.62 / figure.get_size_inches()[1], wspace=0.03)
    figure.savefig(path, format="png", dpi=_PICTURE_DPI, pil_kwargs={"compress_level": 1})


def pca_colours(feature: Tensor) -> NDArray[np.float32]:
    """Return (H, W, 3) colours in 0 to 1: the first three principal components of a feature map (C, H, W)."""
    _, height, width = feature.shape
    pixels = feature.flatten(1).T.float()  # (H * W, C)
    pixels = pixels - pixels.mean(0)
    components = principal_components(pixels, 3).double()
    # A component's sign is arbitrary: point each at its heavier tail, so that one image gives one picture.
    components = components * (components**3).sum(0).sign()
    low, high = (components.quantile(q, dim=0) for q in (0.01, 0.99))
    colours = ((components - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    return colours.reshape(height, width, 3).float().numpy()


def principal_components(rows: Tensor, count: int) -> Tensor:
    """Return (N, count): the strongest principal components of centred ``rows`` (N, C), strongest first.

    Exact, by the smaller of N and C, up to 256 of them. Beyond that by subspace iteration from a fixed random
    projection (arXiv:0909.4061, section 4.5), which costs a few passes over ``rows``; absent components are zero.
    """
    smaller = min(rows.shape)
    if smaller > _EXACT_SIDE:
        generator = torch.Generator().manual_seed(0)
        basis = torch.randn(rows.shape[1], _PROJECTIONS, generator=generator)
        for _ in range(_ITERATIONS):
            basis = torch.linalg.qr(rows.T @ (rows @ basis))[0]
        rows = rows @ basis  # (N, 16): what is left of them has the strongest components
    rows = rows.double()
    if rows.shape[0] < rows.shape[1]:
        variances, directions = torch.linalg.eigh(rows @ rows.T)  # ascending
        components = (directions * variances.clamp_min(0).sqrt()).flip(1)[:, :count]
    else:
        components = rows @ torch.linalg.eigh(rows.T @ rows)[1].flip(1)[:, :count]
    return F.pad(components, (0, count - components.shape[1]))
