"""Files that call themselves images: damaged, huge, strange. Each kind is made from a seed.

python tests/extraction/hostile.py FOLDER 1000  writes so many, of all kinds in turn.
"""

import io
import os
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

Random = np.random.Generator


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(rng: Random, width: int = 64, height: int = 48) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def cut(data: bytes, rng: Random) -> bytes:
    return data[: int(rng.integers(1, len(data) - 16))]


def flipped(data: bytes, rng: Random) -> bytes:
    changed = bytearray(data)
    for place in rng.integers(0, len(data), 8):
        changed[place] ^= int(rng.integers(1, 256))
    return bytes(changed)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, rows: bytes | None, *, bits: int = 1, colour: int = 0, extra: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    data = b"" if rows is None else chunk(b"IDAT", zlib.compress(rows, 1))
    return b"\x89PNG\r\n\x1a\n" + header + extra + data + chunk(b"IEND", b"")


def white_png(width: int, height: int) -> bytes:
    return png(width, height, (b"\0" + b"\xff" * -(-width // 8)) * height)


def jpeg_of_many_scans(rng: Random, scans: int = 20_000) -> bytes:
    """A progressive JPEG whose last scan, a few bytes, comes again and again: each costs a pass over all pixels."""
    data = encoded(Image.new("RGB", (2000, 2000)), "JPEG", progressive=True)
    start = data.rfind(b"\xff\xda")
    return data[:start] + data[start:-2] * scans + data[-2:]


def animated(rng: Random, kind: str) -> bytes:
    return encoded(noise(rng), kind, save_all=True, append_images=[noise(rng) for _ in range(3)])


def gray16(rng: Random) -> Image.Image:
    return Image.fromarray(rng.integers(0, 2**16, (48, 64), dtype=np.uint16))


KINDS: Final[dict[str, tuple[bool, Callable[[Random], bytes]]]] = {
    "photo.jpg": (True, lambda rng: encoded(noise(rng), "JPEG")),
    "photo.png": (True, lambda rng: encoded(noise(rng), "PNG")),
    "png-called.jpg": (True, lambda rng: encoded(noise(rng), "PNG")),
    "jpeg-called.png": (True, lambda rng: encoded(noise(rng), "JPEG")),
    "gif-called.bmp": (True, lambda rng: encoded(noise(rng), "GIF")),
    "animated-gif.png": (True, lambda rng: animated(rng, "GIF")),
    "animated.webp": (True, lambda rng: animated(rng, "WEBP")),
    "animated.png": (True, lambda rng: animated(rng, "PNG")),
    "pages.tif": (True, lambda rng: animated(rng, "TIFF")),
    "one-pixel.png": (True, lambda rng: encoded(noise(rng, 1, 1), "PNG")),
    "one-pixel.jpg": (True, lambda rng: encoded(noise(rng, 1, 1), "JPEG")),
    "gray-16.png": (True, lambda rng: encoded(gray16(rng), "PNG")),
    "gray-16.tif": (True, lambda rng: encoded(gray16(rng), "TIFF")),
    "rgb-16.png": (True, lambda _: png(4, 4, (b"\0" + b"\x12\x34" * 12) * 4, bits=16, colour=2)),
    "cmyk.jpg": (True, lambda rng: encoded(noise(rng).convert("CMYK"), "JPEG")),
    "cmyk.tif": (True, lambda rng: encoded(noise(rng).convert("CMYK"), "TIFF")),
    "lab.tif": (True, lambda rng: encoded(Image.new("LAB", (9, 9)), "TIFF")),
    "palette.png": (True, lambda rng: encoded(noise(rng).convert("P"), "PNG", transparency=3)),
    "gray-alpha.png": (True, lambda rng: encoded(noise(rng).convert("LA"), "PNG")),
    "one-bit.bmp": (True, lambda rng: encoded(noise(rng).convert("1"), "BMP")),
    "progressive.jpg": (True, lambda rng: encoded(noise(rng), "JPEG", progressive=True)),
    "wide.png": (True, lambda rng: encoded(noise(rng, 30_000, 1), "PNG")),
    "tall.jpg": (True, lambda rng: encoded(noise(rng, 1, 30_000), "JPEG")),
    "float.tif": (True, lambda rng: encoded(Image.fromarray(rng.random((9, 9), dtype=np.float32)), "TIFF")),
    "nan.tif": (False, lambda _: encoded(Image.fromarray(np.full((9, 9), np.nan, np.float32)), "TIFF")),
    "negative.tif": (False, lambda _: encoded(Image.fromarray(np.full((9, 9), -5, np.int32)), "TIFF")),
    "nothing.jpg": (False, lambda _: b""),
    "words.jpg": (False, lambda _: b"no photo" * 100),
    "zeros.png": (False, lambda _: bytes(5000)),
    "random.webp": (False, lambda rng: rng.bytes(5000)),
    "page.jpg": (False, lambda _: b"<html><body>404</body></html>"),
    "drawing.png": (False, lambda _: b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    "half.png": (False, lambda rng: encoded(noise(rng), "PNG")[:3000]),
    "half.jpg": (False, lambda rng: encoded(noise(rng), "JPEG")[:1500]),
    "no-data.png": (False, lambda _: png(64, 64, None)),
    "no-sides.png": (False, lambda _: png(0, 0, b"")),
    "bomb-50000.png": (False, lambda _: png(50_000, 50_000, bytes(6251 * 500))),
    "bomb-20000.png": (False, lambda _: white_png(20_000, 20_000)),
    "bomb-12000.png": (False, lambda _: white_png(12_000, 12_000)),
    "bomb.gif.png": (
        False,
        lambda _: b"GIF89a\xff\xff\xff\xff\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0\xff\xff\xff\xff\0\2\2D\1\0;",
    ),
    "large.png": (False, lambda _: white_png(8000, 8000)),
    "bomb-of-words.png": (
        False,
        lambda _: png(8, 8, b"\0\0" * 8, extra=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(50_000_000)))),
    ),
    "comment.jpg": (True, lambda rng: encoded(noise(rng), "JPEG", comment=b"x" * 60_000)),
    "exif.jpg": (True, lambda rng: encoded(noise(rng), "JPEG", exif=b"Exif\0\0" + rng.bytes(500))),
}
"""By file name: whether it has features, and what it holds. What is only sometimes an image is in ``UNCERTAIN``."""

UNCERTAIN: Final[dict[str, Callable[[Random], bytes]]] = {
    "cut.jpg": lambda rng: cut(encoded(noise(rng), "JPEG"), rng),
    "cut.png": lambda rng: cut(encoded(noise(rng), "PNG"), rng),
    "cut.webp": lambda rng: cut(encoded(noise(rng), "WEBP"), rng),
    "cut.tif": lambda rng: cut(encoded(noise(rng), "TIFF"), rng),
    "flipped.jpg": lambda rng: flipped(encoded(noise(rng), "JPEG"), rng),
    "flipped.png": lambda rng: flipped(encoded(noise(rng), "PNG"), rng),
    "flipped.bmp": lambda rng: flipped(encoded(noise(rng), "BMP"), rng),
    "flipped.tif": lambda rng: flipped(encoded(noise(rng), "TIFF", compression="tiff_lzw"), rng),
    "flipped.webp": lambda rng: flipped(encoded(noise(rng), "WEBP"), rng),
    "flipped-gif.png": lambda rng: flipped(animated(rng, "GIF"), rng),
    "flipped.ppm": lambda rng: flipped(encoded(noise(rng), "PPM"), rng),
}

SLOW: Final[dict[str, Callable[[Random], bytes]]] = {"scans.jpg": jpeg_of_many_scans}
"""What takes all the time that it is given."""


def write_strange_files(folder: Path) -> None:
    """Write what has an image's name and is no file: a pipe, a link to nowhere."""
    os.mkfifo(folder / "pipe.jpg")
    (folder / "link.jpg").symlink_to(folder / "nowhere.jpg")


def write(folder: Path, count: int) -> None:
    """Write ``count`` files, of all kinds in turn."""
    makers = {name: make for name, (_, make) in KINDS.items()} | UNCERTAIN | SLOW
    heavy = {"bomb-20000.png", "bomb-12000.png", "large.png", "bomb-of-words.png", *SLOW}
    folder.mkdir(parents=True)
    write_strange_files(folder)
    number = 2
    turn = 0
    while number < count:
        for name, make in makers.items():
            if number < count and (name not in heavy or turn < 3):
                (folder / f"{number:04d}-{name}").write_bytes(make(np.random.default_rng([number, turn])))
                number += 1
        turn += 1


if __name__ == "__main__":
    write(Path(sys.argv[1]), int(sys.argv[2]))
