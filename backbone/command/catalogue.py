"""What there is to choose from: names with their origin, and filters by size and strides."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from backbone.config import BackboneConfig
from backbone.registry import find_constructor, find_library, list_backbones, origin


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
    on_error: Callable[[str, Exception], None],
) -> Iterator[Entry]:
    """Yield the backbones that pass every filter, sorted by name.

    Filters by size and strides build each candidate on the meta device, a tenth of a second each; without them nothing
    is built and no plugin is imported.

    Args:
        pattern: Shell pattern of the names, as in ``list_backbones``.
        provider: ``built in``, ``timm`` or a plugin's package.
        max_parameters: Largest number of scalar parameters.
        strides: Strides that must be among those of the feature maps, in image pixels.
        on_error: Told of each backbone that cannot be measured, such as one of a plugin that fails to import.
    """
    wanted = set(strides)
    for name in list_backbones(pattern, provider=provider):
        if max_parameters is None and not wanted:
            yield Entry(name, origin(name))
            continue
        try:
            parameters, offered = _measure(name)
        except Exception as error:  # a plugin's own code runs here
            on_error(name, error)
            continue
        if wanted <= set(offered) and (max_parameters is None or parameters <= max_parameters):
            yield Entry(name, origin(name), parameters, offered)


def _measure(name: str) -> tuple[int, tuple[int, ...]]:
    """Return number of parameters and strides."""
    library = find_library(name)
    if library is not None:
        return library.measure(name)  # type: ignore[no-any-return]
    constructor = find_constructor(name)
    with torch.device("meta"):
        backbone = constructor(BackboneConfig(name=name))
    parameters = sum(parameter.numel() for parameter in backbone.parameters())
    return parameters, tuple(spec.stride for spec in backbone.feature_specs.values())


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
