"""The image files that an annotation file names: found, opened, and held against what it says of them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backbone.images import UnreadableImageError, must_be_scaled, read_size, read_with_notes, reason_of, say_no_more
from backbone.training.coco.records import MAX_COORDINATE, Record, Unusable, printable, shown

_WHERE = "put the file there, or mend file_name, which counts from the folder of the split"


@dataclass
class ImageFiles:
    """The images of one split.

    Attributes:
        folder: Where they are.
        sideways: Ids of images whose stated size is that of the file before EXIF turns it upright.
        notes: How many images have which peculiarity.
    """

    folder: Path
    sideways: set[int] = field(default_factory=set)
    notes: dict[str, int] = field(default_factory=dict)

    def usable(self, record: Record, number: int) -> dict[str, Any]:
        """Return an image's record with the file as it was found and the size that it has upright.

        Raises:
            Unusable: If there is no such image, or it has another size than the record says.
        """
        name = record.get("file_name")
        if not isinstance(name, str) or not name:
            raise Unusable("file_name is no name", f"file_name must be a file's name, got {shown(name)}", _WHERE)
        path, found = self._find(name)
        try:
            (width, height), turned, mode = read_size(path)
            notes = read_with_notes(path)[1] if must_be_scaled(mode) else []
        except UnreadableImageError as error:
            raise Unusable("cannot be read", f"{printable(str(path))}: {error.reason}", "replace the file") from None
        for note in notes:
            self._note(note)
        say_no_more(notes)
        if turned:
            self._note("is turned upright by its EXIF orientation: boxes and masks must be those of the upright image")
        self._compare(record, number, (width, height), turned=turned)
        return {"id": number, "file_name": found, "width": width, "height": height}

    def _find(self, name: str) -> tuple[Path, str]:
        """Return the path of a file and its name within the folder: as it stands, or as other systems write it.

        Raises:
            Unusable: If there is none; says what was tried.
        """
        tried = []
        for candidate in self._candidates(name):
            path = self.folder / candidate
            try:
                if path.exists():
                    return path, candidate
                why = "does not exist"
            except (OSError, ValueError) as error:  # a name that the system does not take
                why = reason_of(path, error)
            tried.append((path, why))
        (path, why), *others = tried
        also = f" (nor {', '.join(printable(str(other)) for other, _ in others)})" if others else ""
        address = "; an address is not fetched" if "://" in name else ""
        raise Unusable("image file is not there", f"{printable(str(path))}: {why}{also}{address}", _WHERE)

    def _candidates(self, name: str) -> list[str]:
        parts = [part for part in name.replace("\\", "/").split("/") if part != "."]
        within = "/".join(parts[1:]) if parts[:1] == [self.folder.name] else None
        return list(dict.fromkeys([name, *filter(None, ("/".join(parts), within))]))

    def _compare(self, record: Record, number: int, size: tuple[int, int], *, turned: bool) -> None:
        """Hold the size that the record states, where it states one, against that of the file."""
        stated = record.get("width"), record.get("height")
        for value in stated:
            if type(value) not in (int, float) or not 0 < value <= MAX_COORDINATE:  # type: ignore[operator]
                if value is not None:
                    self._note("has a width or height in its record that is no size: the file's is taken")
                return
        if stated == size:
            return
        if turned and stated == size[::-1]:
            self.sideways.add(number)
            return
        (width, height), (wide, high) = stated, size
        same_shape = abs(width / wide - height / high) < 0.02 * width / wide  # type: ignore[operator]
        looks = f"; the image looks resized by {wide / width:.3g} after it was annotated" if same_shape else ""  # type: ignore[operator]
        raise Unusable(
            "image of another size than its record says",
            f"its record says {shown(width)} x {shown(height)} (width x height), its file is {wide} x {high}{looks}",
            "scale the annotations to the file, put back the file they were drawn on, or mend the record",
        )

    def _note(self, what: str) -> None:
        self.notes[what] = self.notes.get(what, 0) + 1
