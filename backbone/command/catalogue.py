"""What there is to choose from: names with their origin, and filters by size and strides."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from backbone.command.measurements import MeasurementCache
from backbone.registry import list_backbones, origin


@dataclass(frozen=True, slots=True)
class Entry:
    """One backbone.

    Attributes:
        name: As a config writes it.
        origin: Who provides it, as ``registry.origin`` says.
        parameters: Scalar parameters without a classifier; None if nobody asked.
        strides: Stride of each feature map, finest first; None if nobody asked.
    """

    name: str
    origin: str
    parameters: int | None = None
    strides: tuple[int, ...] | None = None


def find_backbones(
    pattern: str = "*",
    *,
    provider: str | None = None,
    max_parameters: int | None = None,
    strides: Iterable[int] = (),
    measured: bool = False,
    on_error: Callable[[str, Exception], None],
    on_miss: Callable[[str, str], None] = lambda name, reason: None,
    track: Callable[[list[str]], Iterable[str]] = iter,
) -> Iterator[Entry]:
    """Yield the backbones that pass every filter, sorted by name.

    Filters by size and strides build each candidate on the meta device, a tenth of a second each; without them nothing
    is built and no plugin is imported. A library's models are measured once per version of the library.

    Args:
        pattern: Shell pattern of the names, as in ``list_backbones``.
        provider: ``built in``, ``timm`` or a plugin's package.
        max_parameters: Largest number of scalar parameters.
        strides: Strides that must be among those of the feature maps, in image pixels.
        measured: Whether to measure without a filter, too.
        on_error: Told of each backbone that cannot be measured, such as one of a plugin that fails to import.
        on_miss: Told of each of a library's models that has no feature maps for us, and why.
        track: Wraps the names that are measured, such as in a progress bar.
    """
    wanted = set(strides)
    names = list_backbones(pattern, provider=provider)
    if max_parameters is None and not wanted and not measured:
        yield from (Entry(name, origin(name)) for name in names)
        return
    with MeasurementCache() as cache:
        for name in track(names):
            try:
                found = cache.measure(name)
            except Exception as error:  # a plugin's own code runs here
                on_error(name, error)
                continue
            if found.refusal:
                on_miss(name, found.refusal)
            elif wanted <= set(found.strides) and (max_parameters is None or found.parameters <= max_parameters):
                yield Entry(name, origin(name), found.parameters, found.strides)


def parse_count(text: str) -> int:
    """Return the number that ``30M``, ``2.5m``, ``500k`` or ``1000000`` stands for.

    Raises:
        ValueError: If it is none.
    """
    units = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmb]?)", text.strip().lower())
    if match is None:
        raise ValueError(f"a number of parameters must look like 30M, 500k or 1000000, got {text!r}")
    return int(float(match[1]) * units[match[2]])


def parse_strides(text: str) -> tuple[int, ...]:
    """Return the numbers of a list such as ``4,8,16,32``.

    Raises:
        ValueError: If it is no such list.
    """
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise ValueError(f"strides must be a list such as 4,8,16,32 (image pixels), got {text!r}")
    return tuple(map(int, text.split(",")))
