"""What reading a data set found, for people: a summary by reason, and the whole list as a table."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from backbone.training.coco.records import Skipped, printable
from backbone.weights.writing import write_atomically

SHOWN: Final = 3
"""Lines of each reason."""
_SHOWN_CLASSES: Final = 40
COLUMNS: Final = ("file", "record", "reason", "detail", "remedy")


def summary_of(
    file: Path,
    content: Mapping[str, Sequence[Any]],
    num_objects: Mapping[str, int],
    skipped: Sequence[Skipped],
    notes: Sequence[str],
) -> str:
    """Return how much is there, what was skipped by reason with the first three of each, the classes, and the notes."""
    images, annotations = len(content.get("images", ())), len(content.get("annotations", ()))
    lines = [f"{printable(str(file))}: {images} images, {annotations} annotations, {len(skipped)} skipped"]
    for reason, each in by_reason(skipped).items():
        lines += [f"  skipped {line}" for line in each[:SHOWN]]
        lines += [f"  ... and {len(each) - SHOWN} more: {reason}"] if len(each) > SHOWN else []
        lines.append(f"  {reason}: {each[0].remedy}")
    if num_objects:
        classes = [f"{printable(name)} {count}" for name, count in num_objects.items()]
        more = [f"and {len(classes) - _SHOWN_CLASSES} classes more"] if len(classes) > _SHOWN_CLASSES else []
        lines.append(f"  objects by class: {', '.join([*classes[:_SHOWN_CLASSES], *more])}")
    return "\n".join([*lines, *(f"  note: {note}" for note in notes)])


def by_reason(skipped: Iterable[Skipped]) -> dict[str, list[Skipped]]:
    """Return the lines of each reason, in the order in which the reasons first appear."""
    groups: dict[str, list[Skipped]] = {}
    for reason, lines in groupby(skipped, key=lambda line: line.reason):
        groups.setdefault(reason, []).extend(lines)
    return groups


def save_skipped(skipped: Mapping[Path, Sequence[Skipped]], path: Path) -> bool:
    """Write all that was skipped, by annotation file, as CSV; return whether there was something.

    A list of an earlier look goes, where there is nothing any more.
    """
    rows = [[file, *(getattr(line, name) for name in COLUMNS[1:])] for file, lines in skipped.items() for line in lines]
    if not rows:
        path.unlink(missing_ok=True)
        return False
    text = io.StringIO()
    csv.writer(text).writerows([COLUMNS, *rows])
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(draft: Path) -> None:
        draft.write_bytes(text.getvalue().encode("utf-8", "backslashreplace"))

    write_atomically(path, write)
    return True
