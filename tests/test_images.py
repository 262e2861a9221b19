"""One reader of images: whatever the file holds comes out upright, in RGB, with the brightness that was meant."""

import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from backbone import images
from backbone.images import UnreadableImageError, read_image, read_size

RAMP = np.linspace(0, 1, 12 * 16).reshape(12, 16)
"""Black to white, 16 x 12 pixels; as 8 bits it is what every gray file below must be read as."""
GRAYS = (RAMP * 255).round().astype(np.uint8)


@pytest.fixture(autouse=True)
def _nothing_said_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_said", set())


def saved(path: Path, pixels: Any, **options: Any) -> Path:
    Image.fromarray(pixels).save(path, **options)
    return path


SIGNED = struct.pack("<HHIHH", 339, 3, 1, 2, 0)
"""An entry of a TIFF's directory: the format of its samples, one short number, signed."""

SCALED: dict[str, tuple[str, Any, str | None]] = {
    "8 bits": ("png", GRAYS, None),
    "16 bits": ("png", (RAMP * 65535).round().astype(np.uint16), None),
    "16 bits, TIFF": ("tiff", (RAMP * 65535).round().astype(np.uint16), None),
    "12 bits in 16": ("png", (RAMP * 4095).round().astype(np.uint16), "has no gray above 4095 in 16 bits"),
    "12 bits in 16, TIFF": ("tiff", (RAMP * 4095).round().astype(np.uint16), "has no gray above 4095 in 16 bits"),
    "8 bits in 16": ("png", GRAYS.astype(np.uint16), "has no gray above 255 in 16 bits, read as 8 bits"),
    "8 bits in 32": ("tiff", GRAYS.astype(np.int32), "has no gray above 255 in 32 bits, read as 8 bits"),
    "16 bits in 32": ("tiff", (RAMP * 65535).round().astype(np.int32), "has no gray above 65535 in 32 bits"),
    "32 bits": ("tiff", (RAMP * (2**32 - 1)).round().astype(np.uint32).view(np.int32), None),
    "floats of 0 to 1": ("tiff", RAMP.astype(np.float32), "floating-point pixels of 0 to 1"),
    "floats of 0 to 255": ("tiff", (RAMP * 255).astype(np.float32), "floating-point pixels of at most 255"),
}


@pytest.mark.parametrize("case", SCALED)
def test_gray_of_any_depth_is_read_from_black_to_white(case: str, tmp_path: Path) -> None:
    kind, pixels, note = SCALED[case]
    path = saved(tmp_path / f"a.{kind}", pixels)
    if pixels.dtype == np.int32:  # Pillow writes what it holds as signed
        path.write_bytes(path.read_bytes().replace(SIGNED, SIGNED.replace(b"\2", b"\1")))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            image = read_image(path)
    assert image.mode == "RGB"
    difference = np.abs(np.asarray(image).astype(int) - GRAYS[..., None])
    assert difference.max() <= 1
    assert len(said) == (note is not None)  # once, where it is a guess
    assert all(str(note) in str(each.message) for each in said)


REFUSED = {
    "floats beyond 255": ((RAMP * 300).astype(np.float32), "must be 0 to 1, or 0 to 255, and are 0 to 300"),
    "floats below 0": ((RAMP - 0.5).astype(np.float32), "are -0.5 to 0.5"),
    "NaN": (np.where(RAMP > 0.5, np.nan, RAMP).astype(np.float32), "not all finite"),
    "infinity": (np.where(RAMP > 0.5, np.inf, RAMP).astype(np.float32), "not all finite"),
    "integers below 0": ((RAMP * 300 - 100).astype(np.int32), "must be at least 0, and are from -100 on"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_numbers_without_a_plain_meaning_are_refused(case: str, tmp_path: Path) -> None:
    pixels, message = REFUSED[case]
    with pytest.raises(UnreadableImageError, match=message) as raised:
        read_image(saved(tmp_path / "a.tiff", pixels))
    assert str(tmp_path / "a.tiff") in str(raised.value)


COLOURS = np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8)
UPRIGHT: dict[int, Any] = {
    1: lambda pixels: pixels,
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).transpose(1, 0, 2),
    8: np.rot90,
}
"""How pixels stored with each of EXIF's orientations stand upright."""


@pytest.mark.parametrize("kind", ["png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_every_orientation_is_turned_upright_in_pixels_and_by_the_header(
    orientation: int, kind: str, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = saved(tmp_path / f"a.{kind}", COLOURS, exif=exif, **({"lossless": True} if kind == "webp" else {}))
    image = read_image(path)
    assert np.array_equal(np.asarray(image), UPRIGHT[orientation](COLOURS))
    assert read_size(path)[:2] == (image.size, orientation >= 5)


def test_an_orientation_behind_a_pngs_pixels_counts_by_the_header_too(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    body = exif.tobytes().removeprefix(b"Exif\0\0")
    data = saved(tmp_path / "a.png", COLOURS).read_bytes()
    chunk = struct.pack(">I", len(body)) + b"eXIf" + body + struct.pack(">I", zlib.crc32(b"eXIf" + body))
    (tmp_path / "a.png").write_bytes(data[:-12] + chunk + data[-12:])
    assert read_image(tmp_path / "a.png").size == read_size(tmp_path / "a.png")[0] == (12, 16)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "RGBX"])
def test_every_mode_gives_the_colours_that_pillow_gives(mode: str, tmp_path: Path) -> None:
    kind = "png" if mode in ("1", "L", "LA", "P", "RGBA") else "tiff"
    image = Image.fromarray(COLOURS).convert("P" if mode == "PA" else mode)
    image.save(tmp_path / f"a.{kind}")
    with Image.open(tmp_path / f"a.{kind}") as stored:
        expected = np.asarray(stored.convert("RGB"))
    assert np.array_equal(np.asarray(read_image(tmp_path / f"a.{kind}")), expected)


@pytest.mark.parametrize("kind", ["gif", "tiff", "webp", "png"])
def test_of_several_frames_the_first_is_read(kind: str, tmp_path: Path) -> None:
    first, second = (Image.new("RGB", (16, 12), colour) for colour in ("red", "blue"))
    options = {"lossless": True} if kind == "webp" else {}
    first.save(tmp_path / f"a.{kind}", save_all=True, append_images=[second], **options)  # type: ignore[arg-type]
    assert read_image(tmp_path / f"a.{kind}").getpixel((3, 3)) == (255, 0, 0)


UNREADABLE: dict[str, tuple[Any, str]] = {
    "absent": (lambda path: None, "does not exist"),
    "empty": (lambda path: path.touch(), "is empty"),
    "text": (lambda path: path.write_text("no picture"), "cannot identify image file"),
    "folder": (lambda path: path.mkdir(), "is no file"),
    "pipe": (os.mkfifo, "is no file"),
}


@pytest.mark.parametrize("case", UNREADABLE)
@pytest.mark.parametrize("read", [read_image, read_size])
def test_what_is_no_image_is_named_with_the_reason(case: str, read: Any, tmp_path: Path) -> None:
    make, message = UNREADABLE[case]
    make(tmp_path / "a.png")
    with pytest.raises(UnreadableImageError, match=rf"a\.png: cannot be read as an image \(.*{message}"):
        read(tmp_path / "a.png")


def test_more_pixels_than_any_photo_are_refused_and_a_large_photo_is_not(tmp_path: Path) -> None:
    def header(side: int) -> Path:
        def chunk(kind: bytes, body: bytes) -> bytes:
            return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

        head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
        path = tmp_path / f"{side}.png"
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
        return path

    with pytest.raises(UnreadableImageError, match="pixels"):
        read_image(header(60_000))
    assert read_size(header(10_000))[0] == (10_000, 10_000)  # warnings are errors here


def test_a_guess_that_was_told_of_elsewhere_is_not_said_again(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", (RAMP * 4095).round().astype(np.uint16))
    images.say_no_more(images.read_with_notes(path)[1])
    read_image(path)  # warnings are errors here


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "tiff", "webp", "bmp"])
def test_damaged_bytes_are_read_or_named_and_nothing_else(kind: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    whole = saved(tmp_path / f"a.{kind}", COLOURS, **({"exif": exif} if kind in ("png", "jpeg") else {})).read_bytes()
    chance = np.random.default_rng(0)
    num_refused = 0
    for _ in range(150):
        damaged = bytearray(whole[: chance.integers(1, len(whole) + 1)])
        for place in chance.integers(0, len(damaged), 3):
            damaged[place] = chance.integers(0, 256)
        (tmp_path / f"a.{kind}").write_bytes(damaged)
        for read in (read_image, read_size):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow warns of some damage
                try:
                    read(tmp_path / f"a.{kind}")
                except UnreadableImageError:
                    num_refused += 1
    assert num_refused > 20
