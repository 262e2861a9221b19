"""A COCO annotation file, read with care: what cannot be used is named, and skipped where the rest can go on."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from backbone.recipe import DetectorConfig
from backbone.training.coco.categories import labels_by_name, labels_of, named_categories
from backbone.training.coco.cleaned import NEEDS_KEYPOINTS, NEEDS_MASKS, Annotations
from backbone.training.coco.file import find_annotation_file, read_content
from backbone.training.coco.head import check_for_head
from backbone.training.coco.identities import Identified, identified, shown_id, usable_ids
from backbone.training.coco.image_files import ImageFiles
from backbone.training.coco.objects import Objects, Wanted
from backbone.training.coco.records import MAX_ID, Track, Unusable, number_ids, printable, shown, untracked

__all__ = ["NEEDS_KEYPOINTS", "NEEDS_MASKS", "Annotations", "read_annotations", "require_same_categories"]


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
    category_numbers = _read_categories(found, content["categories"], config, class_names)
    files = ImageFiles(folder)
    images = list(identified(content["images"], "image", "images", found.skip))
    found.content["images"] = list(_usable_images(found, files, images, track))
    objects = Objects(
        images={image["id"]: image for image in found.content["images"]},
        image_numbers=number_ids(usable_ids(content["images"])),
        category_numbers=category_numbers,
        wanted=_wanted(config),
    )
    found.content["annotations"] = list(_usable_objects(found, objects, content["annotations"], track))
    _number_objects(found)
    _judge_sideways(found, files)
    found.notes += [f"{count} images: each {what}" for what, count in files.notes.items()] + objects.notes()
    if not found.content["images"]:
        raise ValueError(f"nothing is left to read\n{found.summary()}")
    if config is not None:
        check_for_head(found, config, content["annotations"])
    if strict and found.skipped:
        raise ValueError(f"--strict refuses {len(found.skipped)} records that would be skipped\n{found.summary()}")
    return found


def _read_categories(
    found: Annotations, records: list[Any], config: DetectorConfig | None, class_names: Mapping[int, str] | None
) -> dict[int | str, int]:
    """Note the classes and their labels; return the number of each category by its id in the file."""
    categories = list(identified(records, "category", "categories", found.skip))
    found.content["categories"], notes = named_categories(categories)
    found.notes += notes
    if class_names is None:
        found.labels = labels_of(found.content["categories"], config.num_classes if config else None, found.file)
    else:
        found.labels = labels_by_name(found.content["categories"], class_names, found.file)
    return {original: number for original, number, _ in categories}


def _usable_images(
    found: Annotations, files: ImageFiles, images: list[Identified], track: Track
) -> Iterator[dict[str, Any]]:
    for original, number, record in track(images, f"images of {found.file.stem}"):
        try:
            yield files.usable(record, number)
        except Unusable as why:
            found.skip(f"image {shown_id(original)}", why)


def _wanted(config: DetectorConfig | None) -> Wanted:
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
