"""An annotation file as text: which paths it must have, its encoding, its three lists, and what else it may be."""

import hashlib
import json
from pathlib import Path
from typing import Any, Final

from backbone.training.coco.records import shown

LISTS: Final = ("images", "annotations", "categories")
_LOOKED_AT: Final = 200  # files of a folder, to recognise another format

_OTHER_FORMATS: Final = {
    "Pascal VOC's XML": "`pip install supervision`, then supervision.DetectionDataset.from_pascal_voc().as_coco()",
    "LabelMe's JSON": "`pip install labelme2coco`, then labelme2coco.convert(FOLDER, OUT)",
    "YOLO's text": "`pip install supervision`, then supervision.DetectionDataset.from_yolo().as_coco()",
}


def find_annotation_file(data: Path, split: str) -> tuple[Path, Path]:
    """Return the folder of images ``data/<split>`` and ``data/annotations/<split>.json``.

    Raises:
        FileNotFoundError: If one does not exist; says so where the folder holds another format.
    """
    folder, file = data / split, data / "annotations" / f"{split}.json"
    for path, kind in ((data, "a folder"), (folder, "a folder of images"), (file, "a file in COCO's format")):
        if not path.exists():
            raise FileNotFoundError(
                f"--data must hold train/, val/ and annotations/train.json and val.json; {path} ({kind}) does not "
                f"exist{_hint(_format_of(data))}"
            )
    return folder, file


def read_content(file: Path) -> tuple[dict[str, list[Any]], str]:
    """Return the three lists of an annotation file, and its fingerprint.

    Raises:
        ValueError: If it is not JSON of that kind.
    """
    try:
        text = file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror or error}); check the path") from None
    try:
        content = json.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file}: must be UTF-8 and is not (byte {text[error.start] if error.start < len(text) else 0:#04x} at "
            f"{error.start}); it looks like Latin-1 (ISO 8859-1, Windows-1252): read it with that encoding and write "
            f"it with encoding='utf-8'"
        ) from None
    except RecursionError:
        raise ValueError(f"{file}: is nested too deep for an annotation file; write it again") from None
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON, it may be truncated ({error}); write it again") from None
    if not isinstance(content, dict):
        kind = "list" if isinstance(content, list) else type(content).__name__
        raise ValueError(f"{file}: must have the lists images, annotations and categories, and is a {kind}")
    if absent := [key for key in LISTS if not isinstance(content.get(key), list)]:
        hint = _hint("LabelMe's JSON" if "shapes" in content else None)
        got = "".join(f"; {key} is {shown(content[key])}" for key in absent if key in content)
        raise ValueError(
            f"{file}: must have the lists images, annotations and categories; absent: {', '.join(absent)}{got}{hint}"
        )
    return {key: content[key] for key in LISTS}, hashlib.sha256(text).hexdigest()


def _format_of(data: Path) -> str | None:
    """Return the name of the format that a folder seems to be in, by some files of it and of the folders in it."""
    if not data.is_dir():
        return None
    folders = [data, *sorted(path for path in data.iterdir() if path.is_dir())[:20]]
    files = [path for folder in folders for path in sorted(folder.iterdir())[:_LOOKED_AT] if path.is_file()]
    if any(path.suffix == ".xml" and "<annotation" in _beginning(path) for path in files):
        return "Pascal VOC's XML"
    if any(path.suffix == ".json" and '"shapes"' in _beginning(path) for path in files):
        return "LabelMe's JSON"
    return "YOLO's text" if (data / "data.yaml").exists() or (data / "labels").is_dir() else None


def _beginning(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(4096).decode("latin-1")
    except OSError:
        return ""


def _hint(name: str | None) -> str:
    return f"; this looks like {name}: convert it to COCO's with {_OTHER_FORMATS[name]}" if name else ""
