"""Which record an id means: numbers for ids of any kind, and what cannot be told apart."""

from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeAlias

from backbone.training.coco.records import Record, Unusable, number_ids, printable, shown, usable_id

Identified: TypeAlias = tuple[int | str, int, Record]
"""A record's id in the file, its number here, and the record."""
Skip: TypeAlias = Callable[[str, Unusable], None]


def usable_ids(records: list[Any]) -> Iterator[int | str]:
    """Yield the ids that are some, of the records that are some."""
    for record in records:
        if isinstance(record, dict):
            try:
                yield usable_id(record.get("id"), "id")
            except Unusable:
                continue


def identified(records: list[Any], kind: str, kinds: str, skip: Skip) -> Iterator[Identified]:
    """Yield the records with an id of their own; skip the others.

    Args:
        records: As the file has them.
        kind: What one is called, such as ``image``.
        kinds: What several are called.
        skip: Called with the record's title and the reason.
    """
    numbers = number_ids(usable_ids(records))
    first: dict[int | str, Record] = {}
    ambiguous = ambiguous_ids(records) if kind == "image" else {}
    for place, record in enumerate(records):
        try:
            if not isinstance(record, dict):
                raise Unusable("record of another type", f"must be an object with keys and values, got {shown(record)}")
            original = usable_id(record.get("id"), "id")
        except Unusable as why:
            skip(f"number {place} of {kinds}", why)
            continue
        if original in ambiguous:
            others = ", ".join(shown(name) for name in ambiguous[original][:3])
            detail = f"ids of {kinds} must differ, and this one names {others}: no annotation tells which it means"
            skip(f"{kind} {shown_id(original)}", Unusable("one id for several images", detail))
        elif original in first:
            detail = f"ids of {kinds} must differ, and this one was there before; the first is taken"
            skip(f"{kind} {shown_id(original)}", Unusable("id that was there before", detail))
        else:
            first[original] = record
            yield original, numbers[original], record


def ambiguous_ids(records: list[Any]) -> dict[int | str, list[object]]:
    """Return the ids under which several files are listed, with their names."""
    names: dict[int | str, dict[object, None]] = {}  # an ordered set
    for record in records:
        for original in usable_ids([record]):
            name = record.get("file_name")
            if isinstance(name, Hashable):
                names.setdefault(original, {})[name] = None
    return {original: [*listed] for original, listed in names.items() if len(listed) > 1}


def shown_id(original: object) -> str:
    """Return an id for a message: a string without quotation marks."""
    return printable(original) if isinstance(original, str) else shown(original)
