"""A COCO annotation file, read with care: what cannot be used is named, and skipped where the rest can go on."""

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from backbone.recipe import SEGMENTERS, DetectorConfig
from backbone.training.coco.categories import labels_by_name, labels_of, named_categories
from backbone.training.coco.file import find_annotation_file, read_content
from backbone.training.coco.image_files import ImageFiles
from backbone.training.coco.objects import Objects, Wanted
from backbone.training.coco.records import (
    MAX_ID,
    Record,
    Skipped,
    Track,
    Unusable,
    number_ids,
    printable,
    shown,
    untracked,
    usable_id,
)
from backbone.training.coco.summary import summary_of

NEEDS_MASKS: Final = ("mask_rcnn", *SEGMENTERS)
NEEDS_KEYPOINTS: Final = ("keypoint_rcnn",)

Identified = tuple[int | str, int, Record]
"""A record's id in the file, its number here, and the record."""


@dataclass
class Annotations:
    """One split of a data set, cleaned.

    Attributes:
        folder: Where the images are.
        file: The annotation file.
        content: Images, annotations and categories without what was skipped. Ids are numbers, file names are found
            in ``folder``, sizes are the upright images' own; area and iscrowd are always there.
        skipped: One line for each image, annotation, category or part left out: which, and why.
        num_annotations: Annotations in the file, those of skipped images included.
        notes: What else there is to know before training, a line each.
        labels: The detector's class for each category's number, in the numbers' order; 0 is the background.
        fingerprint: SHA-256 of the file, in hexadecimal.
    """

    folder: Path
    file: Path
    content: dict[str, Any]
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    num_annotations: int = 0
    labels: dict[int, int] = field(default_factory=dict)
    fingerprint: str = ""

    @property
    def class_names(self) -> dict[int, str]:
        """Names of the categories by label, in the order of the category ids; no two are alike."""
        names = {category["id"]: str(category.get("name", category["id"])) for category in self.content["categories"]}
        return {label: names[number] for number, label in self.labels.items()}

    @property
    def keypoint_names(self) -> list[str]:
        """Names of the keypoints that the categories have; empty where the file tells none."""
        return next((list(c["keypoints"]) for c in self.content["categories"] if c.get("keypoints")), [])

    @property
    def num_objects(self) -> dict[str, int]:
        """Annotations of each class, by name."""
        counts = Counter(annotation["category_id"] for annotation in self.content["annotations"])
        return {name: counts[number] for number, name in zip(self.labels, self.class_names.values(), strict=True)}

    def summary(self) -> str:
        """Return what is there and what was skipped, with the first three lines of each reason."""
        return summary_of(self.file, self.content, self.num_objects, self.skipped, self.notes)

    def skip(self, record: str, why: Unusable) -> None:
        """Note what is left out."""
        self.skipped.append(Skipped(record, why))


def read_annotations(
    data: Path,
    split: str,
    config: DetectorConfig | None,
    *,
    class_names: Mapping[int, str] | None = None,
    strict: bool = False,
    track: Track = untracked,
) -> Annotations:
    """Read ``data/annotations/<split>.json`` for the images in ``data/<split>``, and check it against the recipe.

    Every record is looked at before anything is drawn or trained: what cannot be used is skipped by name, an image with
    all its annotations, an annotation, or one polygon of it. Images without annotations stay: a detector learns from
    them what is background. Of the images only the headers are read, and the pixels of those with more than 8 bits.

    Args:
        data: Folder of the data set.
        split: Such as ``train``.
        config: The recipe; None checks masks and keypoints wherever there are some, and numbers the classes from 1.
        class_names: By label, of weights that are to be measured: the file's classes get the labels of equal names.
        strict: Whether anything that would be skipped is an error.
        track: Shows progress.

    Raises:
        FileNotFoundError: If the folder or the file does not exist.
        ValueError: If the file is not COCO's format or does not fit the recipe, or nothing usable is left.
    """
    folder, file = find_annotation_file(data, split)
    content, fingerprint = read_content(file)
    found = Annotations(folder, file, {}, num_annotations=len(content["annotations"]), fingerprint=fingerprint)
    categories = list(_identified(found, content["categories"], "category", "categories"))
    found.content["categories"], notes = named_categories(categories)
    found.notes += notes
    if class_names is None:
        found.labels = labels_of(found.content["categories"], config.num_classes if config else None, file)
    else:
        found.labels = labels_by_name(found.content["categories"], class_names, file)
    images = list(_identified(found, content["images"], "image", "images"))
    objects = Objects(
        images={},
        image_numbers=number_ids(usable_ids(content["images"])),
        labels=found.labels,
        category_numbers={original: number for original, number, _ in categories},
        wanted=_wanted(config, content["annotations"]),
    )
    files = ImageFiles(folder)
    found.content["images"] = list(_usable_images(found, files, images, track))
    objects.images = {image["id"]: image for image in found.content["images"]}
    found.content["annotations"] = list(_usable_objects(found, objects, content["annotations"], track))
    _number_objects(found)
    _judge_sideways(found, files)
    found.notes += [f"{count} images: each {what}" for what, count in files.notes.items()] + objects.notes()
    if not found.content["images"]:
        raise ValueError(f"nothing is left to read\n{found.summary()}")
    if config is not None:
        _check_for_head(found, config, content["annotations"])
    if strict and found.skipped:
        raise ValueError(f"--strict refuses {len(found.skipped)} records that would be skipped\n{found.summary()}")
    return found


def usable_ids(records: list[Any]) -> Iterator[int | str]:
    """Yield the ids that are some, of the records that are some."""
    for record in records:
        if isinstance(record, dict):
            try:
                yield usable_id(record.get("id"), "id")
            except Unusable:
                continue


def _identified(found: Annotations, records: list[Any], kind: str, kinds: str) -> Iterator[Identified]:
    """Yield the records with an id of their own; skip the others."""
    numbers = number_ids(usable_ids(records))
    first: dict[int | str, Record] = {}
    ambiguous = _ambiguous(records) if kind == "image" else {}
    for place, record in enumerate(records):
        try:
            if not isinstance(record, dict):
                raise Unusable("record of another type", f"must be an object with keys and values, got {shown(record)}")
            original = usable_id(record.get("id"), "id")
        except Unusable as why:
            found.skip(f"number {place} of {kinds}", why)
            continue
        if original in ambiguous:
            others = ", ".join(shown(name) for name in ambiguous[original])
            detail = f"ids of {kinds} must differ, and this one names {others}: no annotation tells which it means"
            found.skip(f"{kind} {shown_id(original)}", Unusable("one id for several images", detail))
        elif original in first:
            detail = f"ids of {kinds} must differ, and this one was there before; the first is taken"
            found.skip(f"{kind} {shown_id(original)}", Unusable("id that was there before", detail))
        else:
            first[original] = record
            yield original, numbers[original], record


def _ambiguous(records: list[Any]) -> dict[int | str, list[object]]:
    """Return the ids under which several files are listed, with their names."""
    names: dict[int | str, list[object]] = {}
    for record in records:
        for original in usable_ids([record]):
            name = record.get("file_name")
            if isinstance(name, Hashable) and name not in names.setdefault(original, []):
                names[original].append(name)
    return {original: listed for original, listed in names.items() if len(listed) > 1}


def shown_id(original: object) -> str:
    """Return an id for a message: a string without quotation marks."""
    return printable(original) if isinstance(original, str) else shown(original)


def _usable_images(
    found: Annotations, files: ImageFiles, images: list[Identified], track: Track
) -> Iterator[dict[str, Any]]:
    for original, number, record in track(images, f"images of {found.file.stem}"):
        try:
            yield files.usable(record, number)
        except Unusable as why:
            found.skip(f"image {shown_id(original)}", why)


def _wanted(config: DetectorConfig | None, annotations: list[Any]) -> Wanted:
    if config is None:
        return Wanted(whatever_is_there=True, keypoints=None)
    if config.detector not in NEEDS_KEYPOINTS:
        return Wanted(masks=config.detector in NEEDS_MASKS)
    return Wanted(keypoints=config.num_keypoints)


def _usable_objects(found: Annotations, objects: Objects, records: list[Any], track: Track) -> Iterator[dict[str, Any]]:
    for place, record in enumerate(track(records, f"annotations of {found.file.stem}")):
        title = f"number {place} of annotations"
        try:
            if not isinstance(record, dict):
                raise Unusable("record of another type", f"must be an object with keys and values, got {shown(record)}")
            if "id" in record:
                title = f"annotation {shown_id(record['id'])}"
            image = objects.image_of(record)
            if image is None:
                continue  # the image itself was named
            title += f" of {printable(image['file_name'])}"
            made = objects.usable(record, image)
        except Unusable as why:
            found.skip(title, why)
            continue
        for part, problem in objects.parts:
            found.skip(f"{part} of {title}", problem)
        yield made


def _number_objects(found: Annotations) -> None:
    """Number the annotations from 1 where their ids cannot serve: COCOeval takes a match with id 0 for none."""
    annotations = found.content["annotations"]
    ids = [annotation["id"] for annotation in annotations]
    proper = all(type(each) is int and 0 < each <= MAX_ID for each in ids)
    if proper and len(set(ids)) == len(ids):
        return
    odd = Counter(shown(each) for each in ids if type(each) not in (int, str))
    repeated = len(ids) - len(set(map(repr, ids)))
    for count, what in ((odd.total(), "have no id"), (repeated, "have an id that was there before")):
        if count:
            found.notes.append(f"{count} annotations {what}: they are told apart by their places in the file")
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number


def _judge_sideways(found: Annotations, files: ImageFiles) -> None:
    """Decide on images whose stated size is that of the file before EXIF turns it: for which picture were they drawn?

    A box that reaches beyond the upright picture, and not beyond the one that lies, tells it for all of them.
    """
    if not files.sideways:
        return
    images = {image["id"]: image for image in found.content["images"] if image["id"] in files.sideways}
    drawn = [(images[a["image_id"]], a["bbox"]) for a in found.content["annotations"] if a["image_id"] in images]
    lying = any(
        (x + w > image["width"] + 1 or y + h > image["height"] + 1)
        and x + w <= image["height"] + 1
        and y + h <= image["width"] + 1
        for image, (x, y, w, h) in drawn
    )
    if not lying:
        found.notes.append(
            f"{len(images)} images: each is turned upright by its EXIF orientation, and its record states the size "
            f"before that: make sure that its boxes and masks are those of the upright image"
        )
        return
    for image in images.values():
        detail = "its boxes are those of the file as it lies, before EXIF turns it upright"
        remedy = "write the images upright (PIL.ImageOps.exif_transpose) without EXIF, or annotate them as they stand"
        found.skip(f"image {image['file_name']}", Unusable("annotated before it was turned upright", detail, remedy))
    for key, name in (("images", "id"), ("annotations", "image_id")):
        found.content[key] = [each for each in found.content[key] if each[name] not in images]


def _check_for_head(found: Annotations, config: DetectorConfig, records: list[Any]) -> None:
    """Refuse a file without anything that the detector learns from.

    Raises:
        ValueError: If it is one.
    """
    if config.detector in NEEDS_KEYPOINTS:
        _check_keypoints(found, config, records)
    if not found.content["annotations"]:
        needs = "masks (segmentation)" if config.detector in NEEDS_MASKS else "boxes"
        raise ValueError(f"detector {config.detector} learns from {needs}, and none is left\n{found.summary()}")


def _check_keypoints(found: Annotations, config: DetectorConfig, records: list[Any]) -> None:
    """Refuse a file without keypoints, or with none of the recipe's number; tell of sides that have no names."""
    points = [record.get("keypoints") for record in records if isinstance(record, dict)]
    counts = {len(each) for each in points if isinstance(each, list) and each}
    if not counts:
        raise ValueError(f"detector {config.detector} learns from keypoints, and {found.file} has none")
    if 3 * config.num_keypoints not in counts:
        raise ValueError(
            f"num_keypoints must be the number of keypoints (x, y, visibility) of every annotation in {found.file}, "
            f"{' or '.join(f'{count / 3:g}' for count in sorted(counts))}; got {config.num_keypoints}"
        )
    names = found.keypoint_names
    if names and len(names) != config.num_keypoints:
        found.notes.append(f"{found.file} names {len(names)} keypoints, and objects have {config.num_keypoints}")
        for category in found.content["categories"]:
            category.pop("keypoints", None)
    if not any(side in name for name in found.keypoint_names for side in ("left", "right")):
        found.notes.append(f"{found.file} names no left and right keypoints; a mirrored image keeps their order")


def require_same_categories(splits: Mapping[str, Annotations]) -> None:
    """Give every split the labels of the first, by the classes' names, whatever their order and ids.

    Raises:
        ValueError: If the splits have other classes.
    """
    first, *others = splits.values()
    for second in others:
        names = [sorted(each.class_names.values()) for each in (first, second)]
        if names[0] != names[1]:
            raise ValueError(f"train and val must have the same categories, got {names[0]} and {names[1]}")
        second.labels = labels_by_name(second.content["categories"], first.class_names, second.file)
