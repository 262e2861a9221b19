"""Shards as files: each is written beside its place and moved there whole."""

import io
import json
import os
import tarfile
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple, Protocol

import torch
from torch import Tensor

from backbone.extraction.request import Request
from backbone.extraction.tensors import TensorStream, encoded
from backbone.features import FeatureSpec


class ShardFormat(StrEnum):
    """How shards are stored."""

    SHARDS = "shards"
    WEBDATASET = "webdataset"
    PARQUET = "parquet"


SUFFIXES: Final = {
    ShardFormat.SHARDS: ".safetensors",
    ShardFormat.WEBDATASET: ".tar",
    ShardFormat.PARQUET: ".parquet",
}


class Item(NamedTuple):
    """An image with its features, on the CPU.

    Attributes:
        number: Its place in the list.
        name: What it is called there.
        size: Height and width in pixels, as the network saw it.
        features: By level a vector (C,) or a map (C, H / stride, W / stride).
    """

    number: int
    name: str
    size: tuple[int, int]
    features: Mapping[str, Tensor]


class ShardWriter(Protocol):
    """Writes one shard."""

    def add(self, item: Item) -> None:
        """Take one image."""

    def finish(self) -> Mapping[int, str]:
        """Write what is left, and return for each image, by its number, the key of its features in the shard."""


def open_shard(
    file: BinaryIO,
    format: ShardFormat,
    request: Request,
    specs: Mapping[str, FeatureSpec],
    metadata: Mapping[str, str],
    names: Sequence[str],
) -> ShardWriter:
    """Return what writes a shard into ``file``.

    Args:
        file: Empty, and open for writing.
        format: How.
        request: What was computed.
        specs: The levels that are kept.
        metadata: What to say of the features.
        names: Of all images that may come.
    """
    if format is ShardFormat.WEBDATASET:
        return _TarWriter(file, metadata)
    if request.pool == "none":
        return _MapsWriter(file, metadata, [f"{name}/{level}" for name in names for level in specs])
    encode = _parquet if format is ShardFormat.PARQUET else _safetensors
    return _VectorsWriter(file, metadata, specs, getattr(torch, request.stored_dtype), encode)


def require_format(format: ShardFormat, request: Request) -> None:
    """Make sure that what is asked for can be stored so.

    Raises:
        ValueError: If it cannot.
        ModuleNotFoundError: If the format's library is not installed.
    """
    if format is not ShardFormat.PARQUET:
        return
    if request.pool == "none":
        raise ValueError("parquet holds vectors; pool maps by --pool avg or gem, or use --format shards or webdataset")
    if request.stored_dtype == "bfloat16":
        raise ValueError("parquet has no bfloat16; use --store float32 or float16, or --format shards")
    if find_spec("pyarrow") is None:
        raise ModuleNotFoundError(
            "--format parquet needs pyarrow, which is not installed: pip install 'backbone[parquet]'", name="pyarrow"
        )


class _VectorsWriter:
    """Vectors of a shard as one matrix a level, in the list's order: they are small, and held until the end."""

    def __init__(
        self,
        file: BinaryIO,
        metadata: Mapping[str, str],
        specs: Mapping[str, FeatureSpec],
        dtype: torch.dtype,
        encode: Callable[[Sequence[Item], Mapping[str, Tensor], Mapping[str, str]], bytes],
    ) -> None:
        self.file, self.metadata, self.specs, self.dtype, self.encode = file, metadata, specs, dtype, encode
        self.items: list[Item] = []

    def add(self, item: Item) -> None:
        self.items.append(item)

    def finish(self) -> Mapping[int, str]:
        items = sorted(self.items, key=lambda item: item.number)
        matrices = {
            level: torch.stack([item.features[level] for item in items])
            if items
            else torch.empty(0, spec.channels, dtype=self.dtype)
            for level, spec in self.specs.items()
        }
        self.file.write(self.encode(items, matrices, self.metadata))
        return {item.number: str(row) for row, item in enumerate(items)}


def _safetensors(_items: Sequence[Item], matrices: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    return encoded(matrices, metadata)


def _parquet(items: Sequence[Item], matrices: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {
        "image": pa.array([item.name for item in items], pa.string()),
        "height": pa.array([item.size[0] for item in items], pa.int32()),
        "width": pa.array([item.size[1] for item in items], pa.int32()),
    }
    for level, matrix in matrices.items():
        columns[level] = pa.FixedSizeListArray.from_arrays(pa.array(matrix.numpy().reshape(-1)), matrix.shape[1])
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns).replace_schema_metadata(dict(metadata)), buffer, use_dictionary=False)
    return buffer.getvalue()


class _TarWriter:
    """WebDataset's tar: of each image a ``.safetensors`` with its levels, and a ``.json``, as they come."""

    def __init__(self, file: BinaryIO, metadata: Mapping[str, str]) -> None:
        self.tar = tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self.metadata, self.keys = metadata, dict[int, str]()

    def add(self, item: Item) -> None:
        key = f"{item.number:09d}"
        facts = {"image": item.name, "height": item.size[0], "width": item.size[1]}
        self._member(f"{key}.json", json.dumps(facts).encode())
        self._member(f"{key}.safetensors", encoded(item.features, self.metadata))
        self.keys[item.number] = key

    def finish(self) -> Mapping[int, str]:
        self.tar.close()
        return self.keys

    def _member(self, name: str, content: bytes) -> None:
        member = tarfile.TarInfo(name)  # no time and no owner: the same bytes each time
        member.size = len(content)
        self.tar.addfile(member, io.BytesIO(content))


class _MapsWriter:
    """Maps in a safetensors file, ``<name>/<level>`` (C, H / stride, W / stride), written as they come."""

    def __init__(self, file: BinaryIO, metadata: Mapping[str, str], names: Sequence[str]) -> None:
        self.stream, self.keys = TensorStream(file, metadata, names), dict[int, str]()

    def add(self, item: Item) -> None:
        for level, values in item.features.items():
            self.stream.add(f"{item.name}/{level}", values)
        self.keys[item.number] = item.name

    def finish(self) -> Mapping[int, str]:
        self.stream.finish()
        return self.keys


def draft_of(path: Path) -> Path:
    """Return where a process writes what is to become ``path``; another process has another draft."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")
