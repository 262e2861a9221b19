"""Files into tensors: told by their first bytes, limits checked before anything is allocated, no code run."""

import argparse
import io
import math
import mmap
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

import torch
from torch import Tensor

from backbone.weights.metadata import HEADER_KEY, Metadata
from backbone.weights.pickles import PickledArray, read_pickle, scan

CHECKPOINT_SUFFIXES: Final = (".pth", ".pt", ".safetensors", ".pkl", ".ckpt", ".bin", ".tar")

MAX_FILE_BYTES: Final = 16 * 2**30
MAX_TENSOR_NUMBERS: Final = 2**31
MAX_DEPTH: Final = 8
MAX_ENTRIES: Final = 10_000
MAX_KEY_LENGTH: Final = 300
MAX_PICKLE_BYTES: Final = 64 * 2**20  # of the part of a .pth that is not tensors

_TORCH_MAGIC: Final = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # of torch.save before 1.6
_TORCH_PICKLES: Final = 5  # magic number, protocol, system, contents, storage keys


@dataclass(frozen=True)
class Origin:
    """From what a checkpoint's names were translated already.

    Attributes:
        format: The library whose names they were.
        why: By what that was recognised.
        prefix: What stood before the network's keys.
        dropped: Keys that are no part of the network, by reason.
    """

    format: str
    why: str
    prefix: str
    dropped: Mapping[str, list[str]]


@dataclass(frozen=True)
class Checkpoint:
    """What a source holds, flat.

    Attributes:
        source: Its name for messages.
        tensors: By dotted path: wrappers such as ``state_dict`` come first.
        notes: Strings found beside the tensors, by dotted path.
        beside: Paths of everything else that is no tensor.
        facts: What its publisher, or our own header in it, says of its training.
        origin: Set where its names are no longer the file's own.
    """

    source: str
    tensors: Mapping[str, Tensor]
    notes: Mapping[str, str] = field(default_factory=dict)
    beside: tuple[str, ...] = ()
    facts: Metadata | None = None
    origin: Origin | None = None


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint of any known container; tensors are mapped from the file where the container allows it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, carries code, exceeds a limit or is no checkpoint.
    """
    if not path.is_file():
        raise FileNotFoundError(f"weights must be an existing file, got {str(path)!r}; check the path")
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise ValueError(f"{path}: a checkpoint must be at most {MAX_FILE_BYTES} bytes, got {size}")
    content: object
    header = None
    try:
        with path.open("rb") as file:
            head = file.read(len(_TORCH_MAGIC))
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
            content, header = _read_safetensors(path)
        elif head.startswith(b"PK\x03\x04"):
            content = _read_torch_zip(path)
        elif head == _TORCH_MAGIC:
            content = _read_old_torch(path)
        elif head[:1] in (b"\x80", b"(", b"}") and head:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                content = read_pickle(cast(BinaryIO, mapped))
        else:
            raise ValueError("it begins like none of .pth, .safetensors and .pkl")
    except Exception as error:  # damaged bytes fail in many ways: struct.error, AssertionError, AttributeError, ...
        remedy = "fetch it again, or save it with torch.save(model.state_dict(), path)"
        raise unreadable(error, str(path), remedy) from None
    return flatten(content, str(path), header)


def unreadable(error: Exception, source: str, remedy: str) -> ValueError:
    """Explain why a checkpoint could not be read."""
    if not isinstance(error, pickle.UnpicklingError):
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        return ValueError(f"{source}: cannot be read as a checkpoint, it may be truncated; {remedy}. ({first_line})")
    found = re.search(r"GLOBAL (\S+)", str(error))  # the rest of torch's message advises to run the code
    example = f", such as {found[1][:80]}" if found else ""
    return ValueError(
        f"{source}: not a plain checkpoint of tensors; it was refused without running anything it carries{example}; "
        f"{remedy}"
    )


def flatten(content: object, source: str, header: str | None = None) -> Checkpoint:
    """Return the tensors of nested mappings by dotted path.

    Raises:
        ValueError: If they are nested too deep, too many, too large, not dense or two have one path.
    """
    tensors: dict[str, Tensor] = {}
    notes: dict[str, str] = {}
    beside: list[str] = []
    if not isinstance(content, dict):
        raise ValueError(
            f"{source}: must hold a state dict (parameter name -> tensor), got {type(content).__name__}; save the "
            f"network's own state_dict()"
        )
    for number, (path, value) in enumerate(_leaves(content, "", 0, source)):
        if number > MAX_ENTRIES or len(path) > MAX_KEY_LENGTH or path in tensors:
            rule = f"it has more than {MAX_ENTRIES} entries, or keys of more than {MAX_KEY_LENGTH} letters"
            rule = f"{path} is there twice" if path in tensors else rule
            raise ValueError(f"{source}: not a checkpoint of one network: {rule}")
        if isinstance(value, Tensor):
            _check_tensor(path, value, source)
            tensors[path] = value.detach()
        elif isinstance(value, str):
            notes[path] = value
        else:
            beside.append(path)
    ours = getattr(content, "_metadata", None)  # what nn.Module.state_dict() hangs on its result
    ours = ours.get(HEADER_KEY) if isinstance(ours, Mapping) else notes.pop(HEADER_KEY, header)
    try:
        facts = Metadata.from_json(ours) if isinstance(ours, str) else None
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    return Checkpoint(source, tensors, notes, tuple(beside), facts)


def _leaves(content: dict[Any, Any], prefix: str, depth: int, source: str) -> Iterator[tuple[str, object]]:
    if depth > MAX_DEPTH:
        raise ValueError(f"{source}: not a checkpoint of one network: it is nested more than {MAX_DEPTH} deep")
    for key, value in dict.items(content):  # a pickle may put anything in the place of an OrderedDict's own items()
        if not isinstance(key, str | int):
            raise ValueError(f"{source}: not a checkpoint of one network: {type(key).__name__} among its keys")
        path = f"{prefix}{key}"
        if isinstance(value, PickledArray):
            yield path, value.tensor
        elif isinstance(value, dict) and len(value):
            yield from _leaves(value, f"{path}.", depth + 1, source)
        else:
            yield path, value


def _check_tensor(path: str, value: Tensor, source: str) -> None:
    """Refuse what could not be copied into a parameter, or would take more memory than any network here."""
    if value.layout is not torch.strided or value.is_quantized or value.is_complex() or value.is_nested:
        raise ValueError(f"{source}: {path} must be a dense tensor of numbers, got {value.layout}, {value.dtype}")
    if value.numel() > MAX_TENSOR_NUMBERS:
        raise ValueError(f"{source}: {path} must have at most {MAX_TENSOR_NUMBERS} numbers, got {tuple(value.shape)}")
    if not value.is_meta and value.nbytes > (stored := value.untyped_storage().nbytes()):  # strides of 0 cost no file
        raise ValueError(f"{source}: {path} must store all its {value.nbytes} bytes, got {stored}; save it contiguous")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], str | None]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, (file.metadata() or {}).get(HEADER_KEY)  # noqa: SIM118


def _read_torch_zip(path: Path) -> object:
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise ValueError("its records are compressed, which torch.save never does")
        if math.fsum(record.file_size for record in records) > path.stat().st_size:
            raise ValueError("its records declare more bytes than it has")
        # torch can be told not to compute checksums: all are 0 then
        if any(record.CRC for record in records) and (damaged := archive.testzip()):
            raise ValueError(f"the checksum of its record {damaged} is wrong")
        for record in records:
            if record.filename.endswith("data.pkl"):
                if record.file_size > MAX_PICKLE_BYTES:
                    raise ValueError(f"its pickle must be at most {MAX_PICKLE_BYTES} bytes, got {record.file_size}")
                scan(io.BytesIO(archive.read(record)))
    return _load_torch(path, mapped=True)


def _read_old_torch(path: Path) -> object:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        for _ in range(_TORCH_PICKLES):
            scan(cast(BinaryIO, mapped))
    return _load_torch(path, mapped=False)


def _load_torch(path: Path, *, mapped: bool) -> object:
    # mmap: pages are read as they are copied, so that loading needs the model's own memory and no more.
    # A Namespace is what argparse leaves in many training checkpoints; it holds values and runs nothing.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
