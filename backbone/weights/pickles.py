"""Plain pickles of arrays, read without running anything they name.

Nothing of NumPy is called on what a pickle says: stand-ins receive it, and an array is made only once its declared
shape is known to be that of the bytes that are there.
"""

import math
import pickle
import pickletools
import re
import warnings
from collections import OrderedDict
from typing import Any, BinaryIO, Final

import numpy as np
import torch
from torch import Tensor

MAX_OPCODES: Final = 300_000
MAX_TUPLES: Final = 15_000  # each could be nested in the next, and hashing them would exhaust the C stack
MAX_DIMENSIONS: Final = 8
DTYPES: Final = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1")

_PLAIN: Final = re.compile(
    r"MARK|STOP|POP|POP_MARK|DUP|NONE|NEWTRUE|NEWFALSE|(BIN)?INT[12]?|LONG[14]?|(BIN)?FLOAT|STRING|UNICODE|"
    r"(SHORT_)?BIN(STRING|BYTES|UNICODE)|SHORT_BINUNICODE|(BIN(BYTES|UNICODE)|BYTEARRAY)8|EMPTY_(LIST|TUPLE|DICT)|APPENDS?|LIST|"
    r"TUPLE[123]?|DICT|SETITEMS?|(LONG_)?(BIN)?(GET|PUT)|MEMOIZE|PROTO|FRAME|(STACK_)?GLOBAL|REDUCE|BUILD"
)
"""What arrays and containers need. Not among them: INST, OBJ, NEWOBJ, persistent ids, extensions and sets."""


def read_pickle(file: BinaryIO) -> object:
    """Return what the pickle holds: containers, strings, numbers and arrays (as ``PickledArray``).

    Raises:
        pickle.UnpicklingError: If it asks for anything else; says ``GLOBAL <name>`` of what it asked for.
        Exception: Of any kind, if it is damaged.
    """
    scan(file, _PLAIN)
    file.seek(0)
    return _Unpickler(file, encoding="latin1").load()


def scan(file: BinaryIO, allowed: re.Pattern[str] | None = None) -> None:
    """Check the opcodes of the pickle at the file's position without running them, and stop behind it.

    Raises:
        pickle.UnpicklingError: If an opcode is not ``allowed``.
        ValueError: If its size would exhaust time, memory or stack; any other Exception if it is damaged.
    """
    tuples = 0
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        tuples += opcode.name.startswith("TUPLE")
        if allowed is not None and not allowed.fullmatch(opcode.name):
            raise pickle.UnpicklingError(f"GLOBAL {opcode.name}")
        if count > MAX_OPCODES or tuples > MAX_TUPLES:
            raise ValueError(f"its pickle has more than {MAX_OPCODES} instructions or {MAX_TUPLES} tuples")
        if "PUT" in opcode.name and int(argument or 0) > MAX_OPCODES:  # the memo is a table of that length
            raise ValueError(f"its pickle numbers an object {argument}")


class PickledArray:
    """Stands for numpy's ``_reconstruct``: an array whose contents come by ``__setstate__``, if at all."""

    tensor: Tensor | None = None

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: tuple[int, tuple[int, ...], "_DType", bool, bytes | str]) -> None:
        _, shape, dtype, fortran_order, data = state
        self.tensor = _tensor(
            data.encode("latin1") if isinstance(data, str) else data, shape, dtype, bool(fortran_order)
        )


class _ArrayOfBuffer(PickledArray):
    """Stands for numpy's ``_frombuffer``."""

    def __init__(self, data: bytes, dtype: "_DType", shape: tuple[int, ...], order: str) -> None:
        self.tensor = _tensor(data, shape, dtype, order == "F")


class _Scalar(PickledArray):
    """Stands for numpy's ``scalar``."""

    def __init__(self, dtype: "_DType", data: bytes | str) -> None:
        self.tensor = _tensor(data.encode("latin1") if isinstance(data, str) else data, (), dtype, False)


class _DType:
    """Stands for ``numpy.dtype``."""

    def __init__(self, code: str, *_: object) -> None:
        self.code, self.byte_order = code.lstrip("<|="), "<"

    def __setstate__(self, state: tuple[object, ...]) -> None:
        self.byte_order = str(state[1])


class _Name:
    """Stands for ``numpy.ndarray``, which a pickle names and never needs."""

    def __setstate__(self, state: object) -> None: ...


class _Bytes(bytes):
    """Stands for ``_codecs.encode``, by which Python 3 writes bytes in old protocols."""

    def __new__(cls, text: str, encoding: str) -> "_Bytes":
        if encoding != "latin1":
            raise ValueError(f"bytes must be written as latin1, got {encoding!r}")
        return super().__new__(cls, text.encode("latin1"))

    def __setstate__(self, state: object) -> None: ...


_NAMES: Final = {
    "multiarray _reconstruct": PickledArray,
    "multiarray scalar": _Scalar,
    "numeric _frombuffer": _ArrayOfBuffer,
    "numpy ndarray": _Name,
    "numpy dtype": _DType,
    "_codecs encode": _Bytes,
    "collections OrderedDict": OrderedDict,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401
        known = _NAMES.get(f"{re.sub(r'^numpy[.](_?core)[.]', '', module)} {name}")
        if known is None:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return known


def _tensor(data: bytes, shape: tuple[int, ...], dtype: _DType, fortran_order: bool) -> Tensor:
    """Return the bytes as a tensor without copying them."""
    if not isinstance(dtype, _DType) or dtype.code not in DTYPES or dtype.byte_order not in "<|=":
        raise ValueError(f"arrays must be little-endian numbers, one of {', '.join(DTYPES)}")
    if len(shape) > MAX_DIMENSIONS or any(type(size) is not int or size < 0 for size in shape):
        raise ValueError(f"an array's shape must be at most {MAX_DIMENSIONS} sizes of at least 0")
    kind = np.dtype(dtype.code)
    if math.prod(shape) * kind.itemsize != len(data):
        raise ValueError(
            f"an array declares {math.prod(shape)} numbers of {kind.itemsize} bytes and carries {len(data)}"
        )
    array = np.frombuffer(data, kind).reshape(shape, order="F" if fortran_order else "C")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # it is only read
        return torch.from_numpy(array)
