"""How large a backbone is and what strides it has, measured once and kept for a library's thousand models."""

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

import torch

from backbone.config import BackboneConfig
from backbone.registry import find_constructor, find_library
from backbone.weights.writing import write_atomically


@dataclass(frozen=True, slots=True)
class Measurement:
    """What was measured of one backbone.

    Attributes:
        parameters: Scalar parameters without a classifier.
        strides: Stride of each feature map, finest first, in image pixels.
        refusal: Why a library's model gives no feature maps at all; empty where it gives some.
    """

    parameters: int = 0
    strides: tuple[int, ...] = ()
    refusal: str = ""


def cache_folder() -> Path:
    """Return where this package keeps what can be had again: ``$BACKBONE_CACHE``, by default ~/.cache/backbone."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "backbone"
    return Path(os.environ.get("BACKBONE_CACHE") or default)


class MeasurementCache:
    """Measurements of libraries' models, in a JSON file per library and version; others are measured each time.

    A context: what was measured is written when it ends, also by an error or Ctrl-C. A cache that cannot be read or
    written costs time and nothing else.
    """

    def __init__(self) -> None:
        self._tables: dict[Path, dict[str, Any]] = {}
        self._changed: set[Path] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for path in self._changed:
            text = json.dumps(self._tables[path], indent=0)
            with suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, lambda draft, text=text: draft.write_text(text))  # type: ignore[misc]

    def measure(self, name: str) -> Measurement:
        """Return the measurement of a backbone; raises what its constructor raises, unless it is a library's."""
        library = find_library(name)
        if library is None:
            return _measure(name)
        path = cache_folder() / f"{name.partition('/')[0]}-{_version(name.partition('/')[0])}.json"
        table = self._tables.setdefault(path, _read(path))
        if name not in table:
            try:
                parameters, strides = library.measure(name)
                table[name] = {"parameters": parameters, "strides": list(strides), "refusal": ""}
            except ValueError as error:
                table[name] = {"parameters": 0, "strides": [], "refusal": str(error)}
            self._changed.add(path)
        kept = table[name]
        return Measurement(kept["parameters"], tuple(kept["strides"]), kept["refusal"])


def _measure(name: str) -> Measurement:
    constructor = find_constructor(name)
    with torch.device("meta"):
        backbone = constructor(BackboneConfig(name=name))
    parameters = sum(parameter.numel() for parameter in backbone.parameters())
    return Measurement(parameters, tuple(spec.stride for spec in backbone.feature_specs.values()))


def _read(path: Path) -> dict[str, Any]:
    """Return what the file holds; nothing where it is absent or not of our making."""
    try:
        table = json.loads(path.read_bytes())
        for kept in table.values():
            Measurement(int(kept["parameters"]), tuple(map(int, kept["strides"])), str(kept["refusal"]))
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return {}
    return table  # type: ignore[no-any-return]


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "unknown"
