"""One reader of photos for training, prediction and ``extract``: upright, RGB, 8 bits, whatever the file holds."""

import io
import struct
import warnings
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

SIDEWAYS: Final = (5, 6, 7, 8)
"""Orientations of EXIF that exchange width and height."""

DEPTHS: Final = (8, 12, 16, 32)
"""Bits that a gray value of an integer file may have been meant in; the fewest that hold the largest are taken."""

_PNG_SIGNATURE_BYTES: Final = 8
_UNSIGNED = 1
_WIDTH, _HEIGHT, _SAMPLE_FORMAT = 256, 257, 339  # tags of TIFF
_said: set[str] = set()


class UnreadableImageError(ValueError):
    """A file that is no image, or one whose numbers have no plain meaning as brightness.

    Attributes:
        reason: Why, without the file's name.
    """

    reason: str = ""


def read_image(path: Path) -> Image.Image:
    """Return the photo upright and in RGB, 8 bits a channel.

    Of an animation or a file of several pages it is the first one. Transparency is dropped, as torchvision and
    pycocotools do. Gray values of more than 8 bits are scaled; where that is a guess a warning says so, once.

    Raises:
        UnreadableImageError: (a ValueError) If the file cannot be read as an image.
    """
    image, notes = read_with_notes(path)
    for note in notes:
        if note not in _said:
            _said.add(note)
            warnings.warn(f"{path}: {note}; said once, for the first such image", stacklevel=2)
    return image


def read_with_notes(
    path: Path, *, data: bytes | None = None, max_pixels: int | None = None
) -> tuple[Image.Image, list[str]]:
    """Return what ``read_image`` does, and what had to be guessed for it, without a warning.

    Args:
        path: The file, or what to call the image whose bytes are given.
        data: The file's bytes, where they are read already.
        max_pixels: Largest width times height that is decoded; None leaves it to Pillow's limit.

    Raises:
        UnreadableImageError: As ``read_image``, and of an image of more than ``max_pixels``.
    """
    try:
        with _opened(path, data) as file:
            if max_pixels is not None and file.width * file.height > max_pixels:
                raise _refused(f"has {file.width} x {file.height} pixels, and {max_pixels:,} are decoded at most")
            signed = _UNSIGNED not in getattr(file, "tag_v2", {}).get(_SAMPLE_FORMAT, (_UNSIGNED,))
            return _to_rgb(ImageOps.exif_transpose(file), signed=signed)
    except UnreadableImageError as error:
        raise _named(path, error.reason) from None
    except Exception as error:  # damaged bytes fail in many ways
        raise _named(path, reason_of(path, error) if data is None else _reason_within(data, error)) from None


def read_size(path: Path) -> tuple[tuple[int, int], bool, str]:
    """Return width and height of the upright photo, whether it is stored sideways, and its mode, by its header alone.

    Raises:
        UnreadableImageError: (a ValueError) If the header is none of an image.
    """
    try:
        with _opened(path) as file:
            sideways = _orientation(file, path) in SIDEWAYS
            tags = getattr(file, "tag_v2", {})  # Pillow tells the size of a TIFF as it stands upright
            width, height = (tags[_WIDTH], tags[_HEIGHT]) if {_WIDTH, _HEIGHT} <= set(tags) else file.size
            return ((height, width) if sideways else (width, height)), sideways, file.mode
    except Exception as error:  # damaged bytes fail in many ways
        raise _named(path, reason_of(path, error)) from None


def must_be_scaled(mode: str) -> bool:
    """Whether images of this mode have more than 8 bits, so that only their pixels tell how they are read."""
    return mode == "F" or mode.startswith("I")


def say_no_more(notes: list[str]) -> None:
    """Take these guesses as said: ``read_image`` will not warn of them."""
    _said.update(notes)


def reason_of(path: Path, error: Exception) -> str:
    """Return why a file could not be opened: the plain causes first, then the library's words."""
    try:
        if not path.exists():
            return "does not exist"
        if not path.is_file():
            return "is no file"
        if not path.stat().st_size:
            return "is empty"
    except (OSError, ValueError) as other:  # a name that the system does not take
        error = other
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error) or type(error).__name__


def _reason_within(data: bytes, error: Exception) -> str:
    """Return why the bytes of a file are no image."""
    if not data:
        return "is empty"
    if isinstance(error, UnidentifiedImageError):  # its words name a place in memory
        return "no kind of image is known to begin like this"
    return str(error) or type(error).__name__


def _opened(path: Path, data: bytes | None = None) -> Image.Image:
    if data is None and path.exists() and not path.is_file():
        raise OSError("is no file")  # reading a pipe would wait for ever
    with warnings.catch_warnings():  # a photo of more than 89 megapixels is large, and no attack
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(path if data is None else io.BytesIO(data))


def _named(path: Path, reason: str) -> UnreadableImageError:
    error = UnreadableImageError(f"{path}: cannot be read as an image ({reason}); give a JPEG, PNG or the like")
    error.reason = reason
    return error


def _refused(reason: str) -> UnreadableImageError:
    error = UnreadableImageError(reason)
    error.reason = reason
    return error


def _orientation(file: Image.Image, path: Path) -> int:
    """Return EXIF's orientation; a PNG may carry it behind its pixels, where Pillow would read them all."""
    early = {"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"} & file.info.keys()
    if file.format == "PNG" and not early and not _has_late_exif(path):
        return 1
    value = file.getexif().get(ExifTags.Base.Orientation, 1)
    return value if isinstance(value, int) else 1


def _has_late_exif(path: Path) -> bool:
    """Whether a chunk behind a PNG's pixels may tell an orientation."""
    with path.open("rb") as file:
        file.seek(_PNG_SIGNATURE_BYTES)
        while len(head := file.read(8)) == 8:  # noqa: PLR2004 - length and type
            length, kind = struct.unpack(">I4s", head)
            if kind in (b"eXIf", b"zTXt", b"tEXt", b"iTXt"):
                return True
            file.seek(length + 4, 1)
    return False


def _to_rgb(image: Image.Image, *, signed: bool) -> tuple[Image.Image, list[str]]:
    """Return the image in RGB and what was guessed."""
    if image.mode == "F":
        scaled, note = _from_floats(np.asarray(image))
        return scaled, [note]
    if image.mode.startswith("I"):  # Pillow would cut these off at 255
        return _from_integers(np.asarray(image), signed=signed)
    if "transparency" in image.info:  # a palette's; Pillow warns of going straight to RGB
        image = image.convert("RGBA")
    return image.convert("RGB"), []


def _from_floats(values: NDArray[Any]) -> tuple[Image.Image, str]:
    if not np.isfinite(values).all():
        raise _refused("its floating-point pixels are not all finite; replace NaN and infinity")
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 255:  # noqa: PLR2004
        raise _refused(
            f"its floating-point pixels must be 0 to 1, or 0 to 255, and are {low:g} to {high:g}; scale them to 0 to 1"
        )
    if high <= 1:
        return _gray(values * 255.0), "has floating-point pixels of 0 to 1, read as black to white"
    return _gray(values), "has floating-point pixels of at most 255, read as black to white"


def _from_integers(values: NDArray[Any], *, signed: bool) -> tuple[Image.Image, list[str]]:
    if values.dtype == np.int32 and not signed:
        values = values.view(np.uint32)  # Pillow knows 32 bits with a sign only
    if values.min() < 0:
        raise _refused(f"its integer pixels must be at least 0, and are from {values.min()} on; add an offset")
    high, stored = int(values.max()), 8 * values.dtype.itemsize
    bits = next(depth for depth in DEPTHS if high < 1 << depth)
    guess = [f"has no gray above {(1 << bits) - 1} in {stored} bits, read as {bits} bits"] if bits < stored else []
    return _gray(values * (255.0 / ((1 << bits) - 1))), guess


def _gray(values: NDArray[Any]) -> Image.Image:
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8)).convert("RGB")
