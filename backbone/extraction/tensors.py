"""Tensors in safetensors' format, written as they come, and the same bytes each time.

The library writes what lies in memory, where a shard of maps is gigabytes, and its order of metadata is another in each
process. The format is the length of a header in 8 bytes, the header in JSON, which may end in spaces, and the numbers.
So the header's room is left free and filled last.
"""

import io
import json
import struct
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO, Final

import torch
from torch import Tensor

_DTYPES: Final = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_ENTRY_BYTES: Final = 160
"""What the header says of one tensor beside its name, at most: dtype, four sides and two offsets."""
_LENGTH_BYTES: Final = 8


class TensorStream:
    """Writes tensors by name into a file.

    Args:
        file: Empty, and open for writing.
        metadata: What to say of them.
        names: Of all tensors that may come.
    """

    def __init__(self, file: BinaryIO, metadata: Mapping[str, str], names: Iterable[str]) -> None:
        self.file, self.offset = file, 0
        self.header: dict[str, Any] = {"__metadata__": dict(metadata)}
        room = len(_json(self.header)) + sum(len(_json(name)) + _ENTRY_BYTES for name in names)
        self.room = room + -room % _LENGTH_BYTES  # the numbers begin where the library would have them
        file.seek(_LENGTH_BYTES + self.room)

    def add(self, name: str, values: Tensor) -> None:
        """Write one tensor, of any shape, in float32, bfloat16 or float16."""
        data = values.contiguous().reshape(-1).view(torch.uint8).numpy()
        end = self.offset + data.nbytes
        dtype, shape = _DTYPES[values.dtype], list(values.shape)
        self.header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [self.offset, end]}
        self.file.write(data.data)
        self.offset = end

    def finish(self) -> None:
        """Write the header; the file stays open."""
        header = _json(self.header)
        assert len(header) <= self.room
        self.file.seek(0)
        self.file.write(struct.pack("<Q", self.room) + header.ljust(self.room))


def encoded(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return tensors as the bytes of a file."""
    file = io.BytesIO()
    stream = TensorStream(file, metadata, tensors)
    for name, values in tensors.items():
        stream.add(name, values)
    stream.finish()
    return file.getvalue()


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
