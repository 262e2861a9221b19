"""Annotations, one by one: an object is returned as pycocotools and the detectors can take it, or named as unusable."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final

from backbone.training.coco.masks import usable_segmentation
from backbone.training.coco.records import MAX_COORDINATE, Record, Unusable, are_numbers, is_number, shown, usable_id

MAX_AREA: Final = 1e10
"""Square pixels. COCOeval leaves what is larger out of all its measures."""
MIN_EXTENT: Final = 2.0**-18
"""Least width and height of a box, in units of its largest number: 32 tells of 32 bits, so that mirroring and resizing
cannot make it empty."""
_BEYOND: Final = 1.0  # pixels that a box may reach over its image by rounding


@dataclass(frozen=True)
class Wanted:
    """What a detector learns from beside boxes.

    Attributes:
        masks: Whether every object must have a mask.
        keypoints: Keypoints of every object; 0 where none are wanted, None where any number is looked at.
        whatever_is_there: Whether to look at masks and keypoints where objects have them.
    """

    masks: bool = False
    keypoints: int | None = 0
    whatever_is_there: bool = False


@dataclass
class Objects:
    """The annotations of one split.

    Attributes:
        images: The usable images by number.
        image_numbers: Number of each image by its id in the file, unusable ones included.
        category_numbers: Number of each category by its id in the file.
        wanted: What the detector learns from.
        parts: What was left out of objects that are kept: which part, and why.
        counts: How many objects have which peculiarity.
    """

    images: Mapping[int, Record]
    image_numbers: Mapping[int | str, int]
    category_numbers: Mapping[int | str, int]
    wanted: Wanted
    parts: list[tuple[str, Unusable]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def image_of(self, record: Record) -> Record | None:
        """Return the image of an annotation; None if it was found unusable, and named, itself.

        Raises:
            Unusable: If there is none in the file.
        """
        number = _looked_up(record, "image_id", "images", self.image_numbers)
        return self.images.get(number)

    def usable(self, record: Record, image: Record) -> dict[str, Any]:
        """Return an annotation with only what is used of it, every value of the right type.

        Raises:
            Unusable: If it cannot be learned from or measured with.
        """
        category = _looked_up(record, "category_id", "categories", self.category_numbers)
        box, size = record.get("bbox"), (image["width"], image["height"])
        check_box(box, size)
        assert isinstance(box, list)
        crowd = record.get("iscrowd", 0)
        if type(crowd) not in (int, float, bool) or crowd not in (0, 1):
            detail = f"iscrowd must be 0 or 1, got {shown(crowd)}"
            raise Unusable("iscrowd is neither 0 nor 1", detail, "write the number 0 for a single object")
        made: dict[str, Any] = {"id": record.get("id"), "image_id": image["id"], "category_id": category}
        made |= {"bbox": box, "iscrowd": int(crowd), "area": self._area(record, box)}
        segmentation = record.get("segmentation")
        if self.wanted.masks or (self.wanted.whatever_is_there and segmentation):
            made["segmentation"], self.parts = usable_segmentation(segmentation, size)
        points = record.get("keypoints")
        if self.wanted.keypoints != 0 and (self.wanted.keypoints or points):
            made["keypoints"] = usable_keypoints(points, self.wanted.keypoints)
            made["num_keypoints"] = sum(visibility > 0 for visibility in made["keypoints"][2::3])
        self._count(box, size)
        return made

    def _area(self, record: Record, box: Sequence[float]) -> float:
        area = record.get("area")
        if type(area) in (int, float) and 0 <= area <= MAX_AREA:  # type: ignore[operator]
            return area  # type: ignore[return-value]
        if area is not None:
            self.counts["area"] += 1
        return box[2] * box[3]

    def _count(self, box: Sequence[float], size: tuple[int, int]) -> None:
        """Note a box that reaches beyond its image, and one that would fit into it as x1, y1, x2, y2."""
        x, y, width, height = box
        beyond = min(x, y) < -_BEYOND or x + width > size[0] + _BEYOND or y + height > size[1] + _BEYOND
        self.counts["beyond"] += beyond
        self.counts["corners"] += x < width <= size[0] + _BEYOND and y < height <= size[1] + _BEYOND
        self.counts["boxes"] += 1

    def notes(self) -> list[str]:
        """Return a sentence on each peculiarity that many objects have."""
        lines, counts = [], self.counts
        if beyond := counts["beyond"]:
            looks = ""
            if beyond >= 0.1 * counts["boxes"] and counts["corners"] >= 0.9 * counts["boxes"]:
                looks = "; they look like x1, y1, x2, y2, and COCO's are x, y, width, height: convert them"
            lines.append(f"{beyond} of {counts['boxes']} boxes reach beyond their image{looks}")
        if counts["area"]:
            lines.append(f"area of {counts['area']} objects is no area, their box's is taken")
        return lines


def _looked_up(record: Record, key: str, kind: str, numbers: Mapping[int | str, int]) -> int:
    value = record.get(key)
    reason = f"{key} of none of the {kind}"
    try:
        value = usable_id(value, key)
    except Unusable as why:
        raise Unusable(reason, why.detail, f"write the id of one of the {kind}") from None
    if value in numbers:
        return numbers[value]
    twin = next((each for each in (_as_number(value), str(value)) if each is not None and each in numbers), None)
    hint = f"; the file has {twin!r}, of another type" if twin is not None else ""
    known = f"[{', '.join(shown(each) for each in islice(numbers, 8))}{', ...' if len(numbers) > 8 else ''}]"
    detail = f"{key} must be one of {known}, got {shown(value)}{hint}"
    raise Unusable(reason, detail, f"write the id of one of the {kind}, or add what is absent there")


def _as_number(value: int | str) -> int | None:
    return int(value) if isinstance(value, str) and value.isdecimal() and len(value) < 16 else None


def check_box(box: object, size: tuple[int, int]) -> None:
    """Refuse what is no box, and a box of which no more than a rounding error lies in its image.

    Raises:
        Unusable: If it is one.
    """
    if not isinstance(box, list) or len(box) != 4 or not set(map(type, box)) <= {int, float}:
        detail = f"bbox must be [x, y, width, height], got {shown(box)}"
        raise Unusable("bbox is no box", detail, "write four numbers, in image pixels")
    if not are_numbers(box):
        finite = all(type(value) is int or math.isfinite(value) for value in box)
        detail = f"bbox {shown(box)} {f'has a number beyond {MAX_COORDINATE:g}' if finite else 'is not finite'}"
        raise Unusable("bbox is not finite", detail, "write four finite numbers, in image pixels")
    x, y, width, height = box
    if width <= 0 or height <= 0:
        raise Unusable("bbox has no area", f"bbox {box} has no area", "write a width and height above 0")
    least = MIN_EXTENT * max(abs(x), abs(y), width, height, *size)
    inside = min(x + width, size[0]) - max(x, 0), min(y + height, size[1]) - max(y, 0)
    if min(inside) <= least:
        detail = f"bbox {box} lies outside of its image of {size[0]} x {size[1]}, or has no extent in it"
        raise Unusable("bbox outside of its image", detail, "check x, y, width, height, and that it is this image")


def usable_keypoints(points: object, count: int | None) -> list[float]:
    """Return x, y and visibility of each keypoint; all unseen where an object has none.

    Raises:
        Unusable: If they are none, or of another number than ``count``.
    """
    if points is None or points == []:
        return [0.0] * 3 * (count or 0)
    remedy = "write x, y and visibility (0, 1 or 2) of each keypoint in one flat list"
    if not isinstance(points, list):
        detail = f"keypoints must be a flat list of numbers, got {shown(points)}"
        raise Unusable("keypoints of another type", detail, remedy)
    if len(points) != (len(points) // 3 if count is None else count) * 3:
        needed = "a multiple of 3" if count is None else f"3 x num_keypoints, {3 * count},"
        detail = f"keypoints must be {needed} numbers, got {len(points)}: {shown(points)}"
        raise Unusable("keypoints of a wrong length", detail, remedy)
    if not are_numbers(points):
        odd = next(value for value in points if not is_number(value))
        detail = f"keypoints must be finite numbers up to {MAX_COORDINATE:g}, got {shown(odd)}"
        raise Unusable("keypoints that are no numbers", detail, remedy)
    if odd := [value for value in points[2::3] if value not in (0, 1, 2)]:
        detail = f"visibility of a keypoint must be 0, 1 or 2, got {shown(odd[0])}"
        raise Unusable("keypoints of another visibility", detail, remedy)
    return points
