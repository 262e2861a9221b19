"""Masks of COCO's format, checked by their numbers before anything is drawn from them.

pycocotools' C code trusts what it gets: counts that do not sum to the image, or a NaN among coordinates, keep it busy
for ever, and a far coordinate takes all memory.
"""

from itertools import pairwise
from typing import Any, Final

import numpy as np

from backbone.training.coco.records import MAX_COORDINATE, Unusable, are_numbers, is_number, shown

MAX_BOUNDARY: Final = 800_000
"""Pixels that the outlines of one object may pass through; pycocotools takes a hundred bytes for each."""
MIN_NUMBERS: Final = 6
_CHARACTERS: Final = range(48, 112)
_MAX_GROUP: Final = 7  # characters of five bits in one count

_POLYGON_REMEDY: Final = "write each polygon as one flat list x1, y1, x2, y2, x3, y3, ... in image pixels"
_RLE_REMEDY: Final = "encode the mask anew, with pycocotools.mask.encode, at the size of the image"
_RLE_REASON: Final = "segmentation (RLE) does not fit its image"


def usable_segmentation(segmentation: object, size: tuple[int, int]) -> tuple[object, list[tuple[str, Unusable]]]:
    """Return the mask without the polygons that cannot be drawn, and those with their places.

    Args:
        segmentation: Polygons or an RLE, as the file has them.
        size: Width and height of the image, in pixels.

    Raises:
        Unusable: If nothing can be drawn.
    """
    if segmentation is None or segmentation == []:
        raise Unusable("no mask", "it has no mask (segmentation)", "draw one, or train a detector of boxes")
    if isinstance(segmentation, dict):
        check_rle(segmentation, size)
        return {"size": segmentation["size"], "counts": segmentation["counts"]}, []
    if not isinstance(segmentation, list):
        raise Unusable(
            "segmentation of another type",
            f"segmentation must be a list of polygons or an RLE, got {shown(segmentation)}",
            _POLYGON_REMEDY,
        )
    if all(map(is_number, segmentation)):
        raise Unusable(
            "segmentation is one flat list",
            f"segmentation must be a list of polygons, each a list of its own, got {shown(segmentation)}",
            "put the polygon into a list: [[x1, y1, ...]]",
        )
    return _usable_polygons(segmentation, size)


def _usable_polygons(polygons: list[Any], size: tuple[int, int]) -> tuple[object, list[tuple[str, Unusable]]]:
    kept, unusable, budget = [], [], float(MAX_BOUNDARY)
    for number, polygon in enumerate(polygons):
        try:
            budget -= _boundary(polygon, size, budget)
            kept.append(polygon)
        except Unusable as why:
            unusable.append((f"polygon {number + 1} of {len(polygons)}", why))
    if not kept:
        raise unusable[0][1]
    return kept, unusable


def _boundary(polygon: object, size: tuple[int, int], budget: float) -> float:
    """Return how many pixels a polygon's outline passes through, at most.

    Raises:
        Unusable: If it cannot be drawn.
    """
    if not isinstance(polygon, list):
        detail = f"a polygon must be a list of numbers, got {shown(polygon)}"
        raise Unusable("polygon of another type", detail, _POLYGON_REMEDY)
    if any(isinstance(value, list) for value in polygon[:1]):
        detail = f"a polygon must be one flat list of numbers, got pairs or lists in it: {shown(polygon)}"
        raise Unusable("polygon of pairs", detail, _POLYGON_REMEDY)
    if len(polygon) < MIN_NUMBERS or len(polygon) % 2:
        detail = f"a polygon must be at least 3 pairs of numbers, got {len(polygon)} numbers: {shown(polygon)}"
        raise Unusable("polygon of a wrong length", detail, _POLYGON_REMEDY)
    if not are_numbers(polygon):
        odd = next(value for value in polygon if not is_number(value))
        detail = f"a polygon's coordinates must be finite numbers up to {MAX_COORDINATE:g}, got {shown(odd)}"
        raise Unusable("polygon with a coordinate that is none", detail, _POLYGON_REMEDY)
    columns, rows = polygon[::2], polygon[1::2]
    left, right, top, bottom = min(columns), max(columns), min(rows), max(rows)
    if right <= 0 or bottom <= 0 or left >= size[0] or top >= size[1]:
        detail = f"a polygon lies outside of its image of {size[0]} x {size[1]}: {shown(polygon)}"
        raise Unusable("polygon outside of its image", detail)
    length = len(columns) * (max(right - left, bottom - top) + 1)
    if length > budget:
        length = _length(columns, rows)
    if length > budget:
        detail = (
            f"outlines must pass through at most {MAX_BOUNDARY} pixels, a polygon of {len(columns)} points passes on"
        )
        raise Unusable("polygon of an endless outline", detail, "clip it to its image, or make an RLE of the mask")
    return float(length)


def _length(columns: list[float], rows: list[float]) -> float:
    around = pairwise([*zip(columns, rows, strict=True), (columns[0], rows[0])])
    return sum(max(abs(x - to_x), abs(y - to_y)) + 1 for (x, y), (to_x, to_y) in around)


def check_rle(rle: dict[str, Any], size: tuple[int, int]) -> None:
    """Hold a run-length encoding against the size of its image: width and height, in pixels.

    Raises:
        Unusable: If it is not of that size, or its counts are no whole numbers that sum to it.
    """
    width, height = size
    stated, counts = rle.get("size"), rle.get("counts")
    if not isinstance(stated, list) or len(stated) != 2 or not all(type(value) is int for value in stated):
        raise Unusable(
            _RLE_REASON, f"an RLE's size must be [height, width] in whole numbers, got {shown(stated)}", _RLE_REMEDY
        )
    if stated != [height, width]:
        turned = "; it looks like [width, height]" if stated == [width, height] else ""
        detail = f"an RLE's size must be that of its image, [{height}, {width}] (height, width), got {stated}{turned}"
        raise Unusable(_RLE_REASON, detail, _RLE_REMEDY)
    if isinstance(counts, str):
        problem = _problem_of(_decoded(counts), width * height)
    elif isinstance(counts, list) and set(map(type, counts)) <= {int}:
        problem = _problem_of(counts, width * height)
    else:
        problem = f"must be a list of whole numbers or a string, got {shown(counts)}"
    if problem:
        raise Unusable(_RLE_REASON, f"an RLE's counts {problem}", _RLE_REMEDY)


def _problem_of(counts: list[int] | None, area: int) -> str | None:
    if counts is None:
        return "are no string that pycocotools writes"
    if any(count < 0 for count in counts):
        return "must be at least 0, and one is negative"
    if (total := sum(counts)) != area:
        return f"must sum to height x width, {area}, and sum to {shown(total)}"
    return None


def _decoded(text: str) -> list[int] | None:
    """Return the counts of pycocotools' compressed string; None if it is none.

    Each count is written in groups of five bits, the lowest first, with a sixth bit where another group follows.
    From the fourth on it is the difference to the count before the last.
    """
    try:
        codes = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64)
    except UnicodeEncodeError:
        return None
    if not len(codes) or codes.min() < _CHARACTERS.start or codes.max() >= _CHARACTERS.stop:
        return None
    codes -= _CHARACTERS.start
    ends = np.flatnonzero(codes & 0x20 == 0)
    starts = np.concatenate(([0], ends[:-1] + 1)) if len(ends) else ends
    if not len(ends) or ends[-1] != len(codes) - 1 or (ends - starts).max() >= _MAX_GROUP:
        return None
    places = np.arange(len(codes)) - np.repeat(starts, ends - starts + 1)
    values = np.add.reduceat((codes & 0x1F) << (5 * places), starts)
    negative = codes[ends] & 0x10 != 0
    values = np.where(negative, values - (1 << 5 * (ends - starts + 1)), values)
    values[1::2], values[2::2] = values[1::2].cumsum(), values[2::2].cumsum()
    return values.tolist()  # type: ignore[no-any-return]
