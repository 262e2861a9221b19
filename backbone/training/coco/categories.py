"""The classes of an annotation file: their names, told apart, and the detector's label for each."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from backbone.training.coco.records import Record, printable, shown


def named_categories(records: Sequence[tuple[int | str, int, Record]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the categories with names that differ, and what there is to say of them.

    Args:
        records: Id in the file, number and record of each.
    """
    notes = []
    names = [_name(record, original) for original, _, record in records]
    ids: dict[str, list[str]] = {}
    for (original, *_), name in zip(records, names, strict=True):
        ids.setdefault(name, []).append(shown(original))
    repeated = {name: numbers for name, numbers in ids.items() if len(numbers) > 1}
    for name, numbers in repeated.items():
        listed = ", ".join(numbers)
        notes.append(f"categories {listed} have one name, {printable(name)!r}: they stay apart, by their ids")
    made = []
    for (original, number, record), name in zip(records, names, strict=True):
        category: dict[str, Any] = {"id": number, "name": f"{name} (id {original})" if name in repeated else name}
        points = record.get("keypoints")
        if isinstance(points, list) and points and all(isinstance(each, str) for each in points):
            category["keypoints"] = points
        elif points:
            notes.append(f"keypoints of category {printable(name)!r} must be a list of names, got {shown(points)}")
        made.append(category)
    return made, notes


def _name(record: Record, original: int | str) -> str:
    name = record.get("name")
    if type(name) in (int, float) and name == name:  # noqa: PLR0124 - NaN is no name
        name = shown(name)
    if not isinstance(name, str) or not name.strip():
        name = str(original)
    return name.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair can be neither printed nor saved


def labels_of(categories: Sequence[Record], num_classes: int | None, file: Path) -> dict[int, int]:
    """Number the categories from 1, or keep their ids where the detector has room for them, as torchvision's for COCO.

    COCO's 80 categories have ids up to 90, and torchvision's weights 91 classes: a class for each id, and 0.

    Raises:
        ValueError: If ``num_classes`` is neither.
    """
    ids = sorted(category["id"] for category in categories)
    if num_classes is None or num_classes == len(ids) + 1:
        return {number: label for label, number in enumerate(ids, start=1)}
    if ids and ids[0] > 0 and ids[-1] < num_classes:
        return {number: number for number in ids}
    raise ValueError(
        f"num_classes must be {len(ids) + 1}, for the {len(ids)} categories of {file} numbered from 1 and the "
        f"background, or above {max(ids, default=0)}, to keep their ids (from 1) as labels; got {num_classes}"
    )


def labels_by_name(categories: Sequence[Record], known: Mapping[int, str], file: Path) -> dict[int, int]:
    """Return the label of each category under which weights learned a class of that name.

    Args:
        categories: Of the file; all of ``known`` need not be there.
        known: Names by label.
        file: For the message.

    Raises:
        ValueError: If the weights know none of a name.
    """
    labels = {name: label for label, name in known.items()}
    if unknown := [printable(each["name"]) for each in categories if each["name"] not in labels]:
        raise ValueError(
            f"{file}: its classes must be among those that the weights were trained on, "
            f"{', '.join(map(printable, labels))}; it has {', '.join(unknown)}, too. Rename or remove them"
        )
    return {each["id"]: labels[each["name"]] for each in sorted(categories, key=lambda category: category["id"])}
