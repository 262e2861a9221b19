"""How close an int8 copy's features are to floats: cosines by level, on photos that calibrated nothing.

    python tools/check_int8.py --name resnet50 --weights resnet50.pth --photos folder
    python tools/check_int8.py --name timm/convnext_tiny --photos folder --time 480 640

A fifth of the photos is compared; random crops of the others, 100 in all, are the calibration. With ``--time`` our
copies in float32, bf16 and int8, and int8 under autocast to bf16, are timed, too, in shuffled rounds of one image.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from torch import Tensor

from backbone import BackboneConfig, build_backbone, optimize_for_inference
from backbone.command.timing import quartiles, time_rounds

CROPS = 100
SIDE = 320  # pixels of the shorter side


def crop(image: Image.Image, chance: np.random.Generator) -> Image.Image:
    """Return a square of half the photo's shorter side or more."""
    side = int(chance.integers(min(image.size) // 2, min(image.size) + 1))
    left, top = (int(chance.integers(0, length - side + 1)) for length in image.size)
    return image.crop((left, top, left + side, top + side))


def main(
    photos: Annotated[Path, typer.Option(help="Folder of photos, five or more.")],
    name: Annotated[str, typer.Option()] = "resnet50",
    weights: Annotated[str | None, typer.Option()] = None,
    levels: Annotated[str, typer.Option(help="Which feature maps the backbone makes.")] = "c2,c3,c4,c5",
    max_error: Annotated[float, typer.Option()] = 0.1,
    time: Annotated[tuple[int, int] | None, typer.Option(metavar="H W", help="Of the image to time, pixels.")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 15,
) -> None:
    """Calibrate on some photos and compare on others."""
    images = [Image.open(path).convert("RGB") for path in sorted(photos.iterdir())]
    settings = {"name": name, "weights": weights, "out_features": levels.split(",")}
    model = build_backbone(BackboneConfig.model_validate(settings)).eval()
    transforms, chance = model.transforms(resize=SIDE), np.random.default_rng(0)
    compared, others = images[::5], [image for number, image in enumerate(images) if number % 5]
    shown = [transforms([crop(others[number % len(others)], chance)]).images for number in range(CROPS)]
    fast: Any = optimize_for_inference(model, dtype=torch.int8, calibration=shown, max_error=max_error)
    print(fast.optimization)
    cosines: dict[str, list[float]] = {}
    for image in compared:
        batch: Tensor = transforms([image]).images
        with torch.inference_mode():
            exact, written = model(batch), fast(batch)
        for level, expected in exact.items():
            pair = expected.flatten().double(), written[level].flatten().double()
            cosines.setdefault(level, []).append(float(torch.cosine_similarity(*pair, 0)))
    for level, found in cosines.items():
        print(f"{level}: mean {np.mean(found):.5f}, least {min(found):.5f}, of {len(found)} photos")
    if time is not None:
        copies = {str(dtype): optimize_for_inference(model, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
        print_times({**copies, "torch.int8": fast}, torch.randn(1, 3, *time), rounds)


@torch.inference_mode()
def print_times(copies: Mapping[str, Any], image: Tensor, rounds: int) -> None:
    """Print the median of each copy, and its ratio to that of the one in int8."""
    runs: dict[str, Callable[[], object]] = {name: partial(copy, image) for name, copy in copies.items()}

    def autocast() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            copies["torch.int8"](image)

    runs["torch.int8, autocast"] = autocast
    times = list(time_rounds("cpu", runs, rounds))
    for name in runs:
        low, median, high = quartiles([1e3 * each[name] for each in times])
        ratio = np.median([each[name] / each["torch.int8"] for each in times])
        print(f"{name}: {median:.1f} ms, quartiles {low:.1f} to {high:.1f}, {ratio:.2f} of int8's")


if __name__ == "__main__":
    typer.run(main)
