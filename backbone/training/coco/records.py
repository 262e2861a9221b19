"""Values as JSON holds them, anything in any place: what a number is, how a message shows it, what was skipped."""

import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, TypeAlias

MAX_COORDINATE: Final = 1e6
"""Image pixels. Nothing real lies beyond; the detectors' 32 bits still tell a sixteenth of a pixel there."""
MAX_ID: Final = 2**53
_MAX_NAME: Final = 120

Record: TypeAlias = Mapping[str, Any]
Track: TypeAlias = Callable[[Sequence[Any], str], Iterable[Any]]
"""Shows progress through a sequence, with a title, while it is gone through."""

_short = reprlib.Repr()
_short.maxlist = _short.maxdict = _short.maxtuple = 8
_short.maxstring = _short.maxother = _short.maxlong = 60
_short.maxlevel = 3


class Unusable(ValueError):  # noqa: N818 - it never leaves this package
    """Why a record, or a part of it, cannot be used.

    Args:
        reason: The kind of trouble, the same for all records that have it.
        detail: What it is here, with the received value.
        remedy: What to do about it.
    """

    def __init__(self, reason: str, detail: str, remedy: str = "mend the record, or remove it") -> None:
        super().__init__(detail)
        self.reason, self.detail, self.remedy = reason, detail, remedy


class Skipped(str):
    """One line on what was left out: which record, and why. It is a string with the parts it is made of.

    Attributes:
        record: Which image, annotation, category or part of one.
        reason: The kind of trouble.
        remedy: What to do about it.
    """

    __slots__ = ("detail", "reason", "record", "remedy")

    record: str
    reason: str
    detail: str
    remedy: str

    def __new__(cls, record: str, why: Unusable) -> "Skipped":
        """Make the line for a record."""
        line = super().__new__(cls, f"{record}: {why.detail}")
        line.record, line.reason, line.detail, line.remedy = record, why.reason, why.detail, why.remedy
        return line

    def __reduce__(self) -> tuple[Any, ...]:
        return Skipped, (self.record, Unusable(self.reason, self.detail, self.remedy))


def untracked(items: Sequence[Any], title: str) -> Iterable[Any]:
    """Go through a sequence without showing anything."""
    return items


def shown(value: object) -> str:
    """Return a value as a message shows it: in Python's notation, cut short, in one printable line."""
    try:
        return _short.repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python prints
        return f"a {type(value).__name__}"


def printable(text: str) -> str:
    """Return a name letter by letter, with what a terminal or a file cannot take as escapes, and not too long."""
    letters = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:_MAX_NAME])
    return letters + ("..." if len(text) > _MAX_NAME else "")


def is_number(value: object) -> bool:
    """Whether a value is a finite number that may be a coordinate; true and false are none."""
    return type(value) in (int, float) and -MAX_COORDINATE <= value <= MAX_COORDINATE  # type: ignore[operator]


def are_numbers(values: Sequence[Any]) -> bool:
    """Whether all are; quick, for there are millions of them."""
    if not set(map(type, values)) <= {int, float}:
        return False
    within = [-MAX_COORDINATE <= value <= MAX_COORDINATE for value in values]  # NaN is not
    return False not in within


def usable_id(value: object, what: str) -> int | str:
    """Return an id as the key of a record: a whole number, or a string.

    Raises:
        Unusable: If it is anything else.
    """
    if type(value) is float and value.is_integer() and abs(value) <= MAX_ID:
        return int(value)
    if type(value) is int or (isinstance(value, str) and value):
        return value
    raise Unusable(f"{what} is no id", f"{what} must be an integer or a string, got {shown(value)}")


def number_ids(ids: Iterable[int | str]) -> dict[int | str, int]:
    """Return a number for each id: its own, and for strings and what 64 bits do not hold, the next ones free."""
    ids = list(ids)
    own = {each for each in ids if isinstance(each, int) and abs(each) <= MAX_ID}
    following = max(own, default=0) + 1 if max(own, default=0) >= 0 else 1
    numbers: dict[int | str, int] = {}
    for each in ids:
        if each in own:
            numbers[each] = int(each)
        elif each not in numbers:
            numbers[each] = following
            following += 1
    return numbers
