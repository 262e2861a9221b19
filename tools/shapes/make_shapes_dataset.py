"""A small data set of textured shapes in COCO's format: boxes, masks and keypoints, the same bytes for the same seed.

    python tools/make_shapes_dataset.py --out out/shapes
    python tools/make_shapes_dataset.py --out out/other --shapes pentagon,cross,ring,heart --images-train 500

Writes OUT/train/*.png, OUT/val/*.png and, last, OUT/annotations/train.json and val.json, so that a data set that has
its annotations is whole. Each image depends on its seed, split and index alone: asking for more images leaves the
others as they are. Category ids count from 1 in the order of --shapes.

Boxes, masks and areas are those of an object's visible part, exactly: a mask is a list of polygons along the borders of
its pixels or, where it has a hole, an uncompressed RLE. Keypoints are the topmost, rightmost, lowest and leftmost pixel
of the whole object (pycocotools' COCOeval needs `params.kpt_oks_sigmas` of that length; a mirrored image swaps left and
right).
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import typer
from PIL import Image
from rich.console import Console
from rich.progress import track

from backbone.config import did_you_mean
from shapes.drawing import KEYPOINTS, MIN_DIAMETER, SHAPES, Mask, ShapeObject, draw_scene

SPLITS: Final = ("train", "val")
DEFAULT_SHAPES: Final = ("circle", "square", "triangle", "star")
MIN_IMAGE_SIDE: Final = 32  # pixels
FILE_NAME: Final = "{:06d}.png"
OUR_FILES: Final = "[0-9]" * 6 + ".png"

console = Console(stderr=True)


def make_shapes_dataset(
    out: str | os.PathLike[str],
    *,
    shapes: Sequence[str] = DEFAULT_SHAPES,
    num_train: int = 200,
    num_val: int = 50,
    image_size: tuple[int, int] = (128, 160),
    max_objects: int = 6,
    min_scale: float = 0.1,
    max_scale: float = 0.8,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Write a data set of shapes into the folder ``out``.

    Args:
        out: Folder, made if need be.
        shapes: Names out of ``SHAPES``; the first gets category id 1.
        num_train: Images in ``out/train``.
        num_val: Images in ``out/val``; none of them is in ``out/train``.
        image_size: Height and width in pixels.
        max_objects: Most objects in an image; the least is 1.
        min_scale: Smallest diameter of an object, as a fraction of the image's shorter side.
        max_scale: Largest diameter. Sizes are spread evenly on a logarithmic scale.
        seed: Of everything random.
        overwrite: Replace the data set that ``out`` holds.

    Raises:
        ValueError: If a setting breaks its rule.
        FileExistsError: If ``out`` holds a data set and ``overwrite`` is false, or is no folder.
    """
    _check_shapes(shapes)
    _check_numbers(num_train, num_val, image_size, max_objects, seed)
    _check_scales(min_scale, max_scale, min(image_size))
    root = Path(out)
    _clear(root, overwrite)
    annotations = {}
    for number, (split, count) in enumerate(zip(SPLITS, (num_train, num_val), strict=True)):
        images: list[dict[str, Any]] = []
        objects: list[dict[str, Any]] = []
        for index in track(range(count), split, console=console, transient=True, disable=not console.is_terminal):
            rng = np.random.default_rng([seed, number, index])
            picture, found = draw_scene(rng, image_size, shapes, max_objects, (min_scale, max_scale))
            name = FILE_NAME.format(index)
            Image.fromarray(picture).save(root / split / name)
            images.append({"id": index + 1, "file_name": name, "height": image_size[0], "width": image_size[1]})
            for each in found:
                ids = {"id": len(objects) + 1, "image_id": index + 1, "category_id": shapes.index(each.shape) + 1}
                objects.append({**ids, **describe(each)})
        info = {"description": f"Textured shapes, {split} split", "version": "1.0", "seed": seed}
        contents = {"images": images, "annotations": objects, "categories": list(_categories(shapes))}
        annotations[split] = {"info": info, "licenses": [], **contents}
    _write_last(root / "annotations", annotations)


def describe(each: ShapeObject) -> dict[str, Any]:
    """Return one object's annotation as COCO has it, without its ids."""
    rows, columns = np.flatnonzero(each.mask.any(1)), np.flatnonzero(each.mask.any(0))
    return {
        "bbox": [float(columns[0]), float(rows[0]), float(np.ptp(columns) + 1), float(np.ptp(rows) + 1)],
        "area": float(each.mask.sum()),
        "iscrowd": 0,
        "segmentation": segmentation_of(each.mask),
        "keypoints": [value for keypoint in each.keypoints for value in keypoint],
        "num_keypoints": sum(visibility > 0 for _, _, visibility in each.keypoints),
    }


def segmentation_of(mask: Mask) -> list[list[float]] | dict[str, list[int]]:
    """Return polygons that pycocotools fills to exactly ``mask``, or its uncompressed RLE where it has a hole."""
    borders = list(trace_borders(mask))
    if all(_signed_area(corners) > 0 for corners in borders):
        return [[value for corner in corners for value in (corner.real, corner.imag)] for corners in borders]
    columns = mask.ravel(order="F")
    changes = np.flatnonzero(columns[1:] != columns[:-1]) + 1
    counts = np.diff([0, *changes, columns.size]).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if columns[0] else counts}  # RLE starts with background


def trace_borders(mask: Mask) -> Iterator[list[complex]]:
    """Yield the corners, as x + iy, of every closed line between mask and background, the mask on its right hand.

    So an outer border turns clockwise in the image and a hole's border the other way. Pixels that touch at a corner
    alone are apart.
    """
    padded = np.pad(mask, 1)
    outgoing: dict[complex, set[complex]] = {}  # from each corner of a pixel, the steps along a border
    for step, first in ((1, 0), (1j, 1), (-1, 1 + 1j), (-1j, 1j)):  # a pixel's edges: top, right, bottom, left
        left_hand = np.roll(padded, (round(step.real), -round(step.imag)), axis=(0, 1))
        for y, x in np.argwhere(padded & ~left_hand).tolist():
            outgoing.setdefault(complex(x - 1, y - 1) + first, set()).add(step)
    for start in [corner for corner, steps in outgoing.items() if 1 in steps]:  # every border has a top edge
        corner, step, corners = start, 1 + 0j, []
        while 1 in outgoing[start]:  # until the line closes
            corner, before = corner + step, step
            step = next(turn for turn in (step * 1j, step, step * -1j) if turn in outgoing[corner])
            outgoing[corner].remove(step)
            if step != before:
                corners.append(corner)
        if corners:
            yield corners


def _signed_area(corners: Sequence[complex]) -> float:
    return sum((a.conjugate() * b).imag for a, b in zip(corners, [*corners[1:], corners[0]], strict=True)) / 2


def _categories(shapes: Sequence[str]) -> Iterator[dict[str, Any]]:
    limbs = [[1, 2], [2, 3], [3, 4], [4, 1]]  # counted from 1
    for number, name in enumerate(shapes, start=1):
        keypoints = {"keypoints": list(KEYPOINTS), "skeleton": limbs}
        yield {"id": number, "name": name, "supercategory": "shape", **keypoints}


def _check_shapes(shapes: Sequence[str]) -> None:
    if isinstance(shapes, str) or not shapes:
        raise ValueError(f"shapes must be a list of one or more of {', '.join(SHAPES)}; got {shapes!r}")
    unknown = [name for name in shapes if name not in SHAPES]
    if unknown:
        hints = " ".join(f"unknown shape {name!r}{did_you_mean(name, SHAPES)}" for name in unknown)
        raise ValueError(f"{hints} known: {', '.join(SHAPES)}")
    if len(set(shapes)) != len(shapes):
        raise ValueError(f"shapes must not repeat a name, got {', '.join(shapes)}")


def _check_numbers(num_train: int, num_val: int, image_size: Sequence[int], max_objects: int, seed: int) -> None:
    for name, count in (("num_train", num_train), ("num_val", num_val)):
        if count < 0:
            raise ValueError(f"{name} must be 0 images or more, got {count}")
    if len(image_size) != 2 or min(image_size) < MIN_IMAGE_SIDE:
        raise ValueError(
            f"image_size must be a height and a width of at least {MIN_IMAGE_SIDE} pixels, got {tuple(image_size)}"
        )
    if max_objects < 1:
        raise ValueError(f"max_objects must be at least 1, got {max_objects}")
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")


def _check_scales(min_scale: float, max_scale: float, side: int) -> None:
    if not 0 < min_scale <= max_scale <= 1:
        raise ValueError(
            "scales are fractions of the image's shorter side and must keep 0 < min_scale <= max_scale <= 1; "
            f"got min_scale {min_scale}, max_scale {max_scale}"
        )
    if min_scale * side < MIN_DIAMETER:
        raise ValueError(
            f"the smallest objects must be {MIN_DIAMETER:g} pixels wide or more, got {min_scale * side:.3g} (min_scale "
            f"{min_scale} of {side} pixels); set min_scale to {MIN_DIAMETER / side:.3g} or more, or enlarge the images"
        )


def _clear(root: Path, overwrite: bool) -> None:
    """Make the folders; of a data set that is there, remove the annotations first."""
    if root.exists() and not root.is_dir():
        raise FileExistsError(f"out must be a folder, got the file {root}; choose another name")
    held = [folder for folder in ("annotations", *SPLITS) if any(root.glob(f"{folder}/*"))]
    if held and not overwrite:
        raise FileExistsError(
            f"{root} already holds a data set ({', '.join(f'{folder}/' for folder in held)}); "
            "choose another folder, or replace it with overwrite (--overwrite)"
        )
    old = [root / "annotations" / f"{split}.json" for split in SPLITS]
    old += [file for split in SPLITS for file in root.glob(f"{split}/{OUR_FILES}")]  # nobody else's pictures
    for file in old:
        file.unlink(missing_ok=True)
    for folder in ("annotations", *SPLITS):
        (root / folder).mkdir(parents=True, exist_ok=True)


def _write_last(folder: Path, annotations: dict[str, Any]) -> None:
    """Write both files under passing names and then rename them, so that none is ever there in part."""
    for split, content in annotations.items():
        (folder / f"{split}.json.part").write_text(json.dumps(content) + "\n")
    for split in annotations:
        (folder / f"{split}.json.part").replace(folder / f"{split}.json")


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def main(
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    images_train: Annotated[int, typer.Option(help="Images to train on.")] = 200,
    images_val: Annotated[int, typer.Option(help="Images to validate on.")] = 50,
    image_size: Annotated[tuple[int, int], typer.Option(metavar="H W", help="In pixels.")] = (128, 160),
    shapes: Annotated[str, typer.Option(help=f"Separated by commas, out of: {', '.join(SHAPES)}.")] = ",".join(
        DEFAULT_SHAPES
    ),
    max_objects: Annotated[int, typer.Option(help="Most objects in an image.")] = 6,
    min_scale: Annotated[float, typer.Option(help="Smallest diameter, of the shorter side.")] = 0.1,
    max_scale: Annotated[float, typer.Option(help="Largest diameter, of the shorter side.")] = 0.8,
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the data set in OUT.")] = False,
) -> None:
    """Write the data set and say where."""
    try:
        make_shapes_dataset(
            out, shapes=[name.strip() for name in shapes.split(",")], num_train=images_train, num_val=images_val,
            image_size=image_size, max_objects=max_objects, min_scale=min_scale, max_scale=max_scale, seed=seed,
            overwrite=overwrite,
        )  # fmt: skip
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    console.print(f"{images_train} + {images_val} images with annotations in {out}", highlight=False, soft_wrap=True)
