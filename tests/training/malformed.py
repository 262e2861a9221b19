"""Odd records of COCO files, as a table, and a program that reads each under limits of time and memory.

A small valid file is changed in one place; a letter says what must come of it:

    .  no such case                      k  as if nothing had been changed
    s  the object is skipped             z  as if its keypoints were all unseen
    i  the image is skipped, with its objects      b  the image stays, without its objects
    g  the class is skipped, with its objects      c  the object counts as a crowd
    x  it is read, and means something else        r  the file is refused
"""

import copy
import faulthandler
import functools
import json
import math
import os
import resource
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from PIL import Image

from backbone.recipe import DetectorConfig
from backbone.training.coco.annotations import read_annotations
from backbone.training.coco.data import CocoImages
from backbone.training.coco.metrics import CocoMetrics

Content = dict[str, Any]

MISSING: Final = object()
VALUES: Final[dict[str, Any]] = {
    "missing": MISSING,
    "null": None,
    "text": "x",
    "true": True,
    "NaN": math.nan,
    "infinite": math.inf,
    "1e300": 1e300,
    "10^400": 10**400,
    "negative": -5,
    "empty": [],
    "nested": [[1]],
    "object": {},
}
ROWS: Final[dict[tuple[str, str], str]] = {
    # detector, place            a letter for each of VALUES
    ("retinanet", "annotations 0 id"): "kkkkkkkkkkkk",
    ("retinanet", "annotations 0 image_id"): "ssssssssssss",
    ("retinanet", "annotations 0 category_id"): "ssssssssssss",
    ("retinanet", "annotations 0 bbox"): "ssssssssssss",
    ("retinanet", "annotations 0 bbox 2"): "ssssssssssss",
    ("mask_rcnn", "annotations 0 bbox 0"): "ssssssssssss",
    ("retinanet", "annotations 0 area"): "kkkkkkkkkkkk",
    ("keypoint_rcnn", "annotations 0 area"): "kkkkkkkkkkkk",
    ("retinanet", "annotations 0 iscrowd"): "kssc" + "ssssssss",
    ("fcn", "annotations 0 iscrowd"): "kssc" + "ssssssss",
    ("retinanet", "annotations 0 segmentation"): "kkkkkkkkkkkk",
    ("mask_rcnn", "annotations 0 segmentation"): "ssssssssssss",
    ("fcn", "annotations 0 segmentation"): "ssssssssssss",
    ("mask_rcnn", "annotations 0 segmentation 0"): "ssssssssssss",
    ("mask_rcnn", "annotations 0 segmentation 0 3"): "ssssssssxsss",
    ("mask_rcnn", "annotations 1 segmentation size"): "ssssssssssss",
    ("mask_rcnn", "annotations 1 segmentation size 0"): "ssssssssssss",
    ("mask_rcnn", "annotations 1 segmentation counts"): "ssssssssssss",
    ("fcn", "annotations 1 segmentation counts"): "ssssssssssss",
    ("mask_rcnn", "annotations 1 segmentation counts 1"): "ssssssssssss",
    ("keypoint_rcnn", "annotations 0 keypoints"): "zzsssssss" + "zss",
    ("keypoint_rcnn", "annotations 0 keypoints 0"): "ssssssssxsss",
    ("keypoint_rcnn", "annotations 0 keypoints 2"): "ssssssssssss",
    ("keypoint_rcnn", "annotations 0 num_keypoints"): "kkkkkkkkkkkk",
    ("retinanet", "annotations 0"): ".sssssssssss",
    ("mask_rcnn", "annotations 0 attributes"): "kkkkkkkkkkkk",
    ("retinanet", "images 1 id"): "iibiiiibbiii",
    ("retinanet", "images 1 file_name"): "iiiiiiiiiiii",
    ("retinanet", "images 1 width"): "kkkkkkkkkkkk",
    ("mask_rcnn", "images 1 height"): "kkkkkkkkkkkk",
    ("retinanet", "images 1"): ".iiiiiiiiiii",
    ("retinanet", "categories 1 id"): "gggggggg" + "xggg",
    ("retinanet", "categories 1 name"): "kkkkkkkkkkkk",
    ("keypoint_rcnn", "categories 0 keypoints"): "kkkkkkkkkkkk",
    ("retinanet", "categories 1"): ".ggggggggggg",
    ("retinanet", "images"): "rrrrrrrrrrrr",
    ("retinanet", "annotations"): "rrrrrrrrrrrr",
    ("mask_rcnn", "categories"): "rrrrrrrrrrrr",
    ("retinanet", "info"): "kkkkkkkkkkkk",
}
SECONDS, MEBIBYTES = 10, 1024

BAD: Final = [1, 2, 1, 2]  # a polygon of two points
FAR: Final = [1, 1, 1e12, 1, 9, 9]
ENDLESS: Final = [0, 0, 900_000, 0, 900_000, 900_000]
ZIGZAG: Final = [value for turn in range(60_000) for value in (16 * (turn % 2), 0)]


def first(content: Content) -> Content:
    record: Content = content["annotations"][0]
    return record


def rle(content: Content, **changes: Any) -> None:
    content["annotations"][1]["segmentation"].update(changes)


def polygons(content: Content, *more: Any) -> None:
    first(content)["segmentation"] += more


def ids_to(content: Content, change: Callable[[Any], Any]) -> None:
    """Change every id and every reference to one."""
    for kind, keys in {
        "images": ["id"],
        "categories": ["id"],
        "annotations": ["id", "image_id", "category_id"],
    }.items():
        for record in content[kind]:
            record |= {key: change(record[key]) for key in keys}


def numbered_from(content: Content, start: int) -> None:
    for number, record in enumerate(content["annotations"], start=start):
        record["id"] = number


def name_of(content: Content, name: str) -> None:
    content["images"][1]["file_name"] = name


SPECIAL: Final[dict[str, tuple[str, Callable[[Content], Any], str]]] = {
    # name: (detector, change, letter)
    "box of texts": ("retinanet", lambda c: first(c).update(bbox=["1", "2", "5", "5"]), "s"),
    "box of lists": ("retinanet", lambda c: first(c).update(bbox=[[1, 2], [5, 5]]), "s"),
    "box of five numbers": ("retinanet", lambda c: first(c).update(bbox=[1, 2, 5, 5, 1]), "s"),
    "box of true": ("retinanet", lambda c: first(c).update(bbox=[True, 2, 5, 5]), "s"),
    "box without width": ("retinanet", lambda c: first(c).update(bbox=[1, 2, 0, 5]), "s"),
    "box 4e-6 wide at the left": ("retinanet", lambda c: first(c).update(bbox=[0, 2, 4e-6, 5]), "s"),
    "box 4e-6 wide in the middle": ("retinanet", lambda c: first(c).update(bbox=[5, 2, 4e-6, 5]), "s"),
    "box far to the right": ("retinanet", lambda c: first(c).update(bbox=[1e12, 2, 5, 5]), "s"),
    "box far too wide": ("retinanet", lambda c: first(c).update(bbox=[1, 2, 1e12, 5]), "s"),
    "box outside": ("retinanet", lambda c: first(c).update(bbox=[16, 2, 5, 5]), "s"),
    "box partly outside": ("retinanet", lambda c: first(c).update(bbox=[12, 2, 9, 5]), "x"),
    "iscrowd as text": ("retinanet", lambda c: first(c).update(iscrowd="0"), "s"),
    "iscrowd 2": ("retinanet", lambda c: first(c).update(iscrowd=2), "s"),
    "iscrowd 0.0": ("retinanet", lambda c: first(c).update(iscrowd=0.0), "k"),
    "iscrowd 1.0": ("mask_rcnn", lambda c: first(c).update(iscrowd=1.0), "c"),
    "flat polygon": ("mask_rcnn", lambda c: first(c).update(segmentation=[1, 1, 8, 1, 8, 8]), "s"),
    "polygon of pairs": ("mask_rcnn", lambda c: first(c).update(segmentation=[[[1, 1], [8, 1], [8, 8]]]), "s"),
    "polygon of an odd length": ("mask_rcnn", lambda c: first(c).update(segmentation=[[1, 1, 8, 1, 8, 8, 9]]), "s"),
    "polygon of two points": ("mask_rcnn", lambda c: first(c).update(segmentation=[BAD]), "s"),
    "polygon with 1e12": ("mask_rcnn", lambda c: first(c).update(segmentation=[FAR]), "s"),
    "polygon far beyond": ("mask_rcnn", lambda c: first(c).update(segmentation=[ENDLESS]), "s"),
    "polygon without end": ("fcn", lambda c: first(c).update(segmentation=[ZIGZAG]), "s"),
    "polygon outside": ("mask_rcnn", lambda c: first(c).update(segmentation=[[20, 1, 28, 1, 28, 8]]), "s"),
    "polygon of -inf and inf": (
        "fcn",
        lambda c: first(c).update(segmentation=[[-math.inf, 1, math.inf, 1, 8, 8]]),
        "s",
    ),
    "good polygon beside one of 4": ("mask_rcnn", lambda c: polygons(c, BAD), "p"),
    "good polygon behind one of 4": ("mask_rcnn", lambda c: first(c)["segmentation"].insert(0, BAD), "p"),
    "good polygon beside none": ("mask_rcnn", lambda c: polygons(c, []), "p"),
    "good polygon beside null": ("mask_rcnn", lambda c: polygons(c, None), "p"),
    "good polygon beside NaN": ("fcn", lambda c: polygons(c, [math.nan] * 6), "p"),
    "good polygon beside one far off": ("mask_rcnn", lambda c: polygons(c, FAR), "p"),
    "RLE a pixel short": ("mask_rcnn", lambda c: rle(c, counts=[40, 40, 111]), "s"),
    "RLE a pixel long": ("mask_rcnn", lambda c: rle(c, counts=[40, 40, 113]), "s"),
    "RLE of floats": ("mask_rcnn", lambda c: rle(c, counts=[40.0, 40.0, 112.0]), "s"),
    "RLE of texts": ("fcn", lambda c: rle(c, counts=["40", "40", "112"]), "s"),
    "RLE below zero": ("mask_rcnn", lambda c: rle(c, counts=[-40, 120, 112]), "s"),
    "RLE of 2^32 more": ("mask_rcnn", lambda c: rle(c, counts=[40, 40, 112 + 2**32]), "s"),
    "RLE without counts": ("mask_rcnn", lambda c: rle(c, counts=[]), "s"),
    "RLE of width x height": ("mask_rcnn", lambda c: rle(c, size=[16, 12]), "s"),
    "RLE of another image": ("fcn", lambda c: rle(c, size=[24, 8]), "s"),
    "RLE compressed": ("mask_rcnn", lambda c: rle(c, counts="X1X1`3"), "k"),
    "RLE compressed, cut": ("mask_rcnn", lambda c: rle(c, counts="X1X1`"), "s"),
    "RLE compressed, short": ("mask_rcnn", lambda c: rle(c, counts="X1X1"), "s"),
    "RLE compressed, long": ("mask_rcnn", lambda c: rle(c, counts="X1X1`31"), "s"),
    "RLE compressed, negative": ("mask_rcnn", lambda c: rle(c, counts="h0" + "O" * 9), "s"),
    "RLE compressed, foreign": ("mask_rcnn", lambda c: rle(c, counts="\u00e9~ \n"), "s"),
    "RLE compressed, endless": ("mask_rcnn", lambda c: rle(c, counts="o" * 50 + "0"), "s"),
    "RLE compressed, empty": ("mask_rcnn", lambda c: rle(c, counts=""), "s"),
    "keypoints of another number": ("keypoint_rcnn", lambda c: first(c).update(keypoints=[1, 1, 2] * 3), "s"),
    "keypoints of four numbers": ("keypoint_rcnn", lambda c: first(c).update(keypoints=[1, 1, 2, 1]), "s"),
    "keypoints as pairs": ("keypoint_rcnn", lambda c: first(c).update(keypoints=[[1, 1, 2], [2, 2, 2]]), "s"),
    "keypoint of visibility 3": ("keypoint_rcnn", lambda c: first(c).update(keypoints=[1, 1, 3, 2, 2, 2]), "s"),
    "keypoint far off": ("keypoint_rcnn", lambda c: first(c).update(keypoints=[1e12, 1, 2, 2, 2, 2]), "s"),
    "ids of annotations from 0": ("retinanet", lambda c: numbered_from(c, 0), "k"),
    "ids of annotations all alike": ("mask_rcnn", lambda c: [a.update(id=7) for a in c["annotations"]], "k"),
    "ids of annotations as texts": ("retinanet", lambda c: [a.update(id=f"a{a['id']}") for a in c["annotations"]], "k"),
    "all ids texts": ("mask_rcnn", lambda c: ids_to(c, "id-{}".format), "k"),
    "all ids floats": ("retinanet", lambda c: ids_to(c, float), "k"),
    "all ids beyond 64 bits": ("retinanet", lambda c: ids_to(c, lambda number: number + 2**70), "k"),
    "image_id as text": ("retinanet", lambda c: first(c).update(image_id="1"), "s"),
    "image_id of no image": ("retinanet", lambda c: first(c).update(image_id=99), "s"),
    "category_id as text": ("retinanet", lambda c: first(c).update(category_id="1"), "s"),
    "image twice": ("retinanet", lambda c: c["images"].append(dict(c["images"][1])), "d"),
    "two images of one id": (
        "retinanet",
        lambda c: c["images"].insert(1, {**c["images"][1], "file_name": "0.png"}),
        "i",
    ),
    "class twice": ("retinanet", lambda c: c["categories"].append(dict(c["categories"][1])), "d"),
    "two classes of one name": ("retinanet", lambda c: c["categories"][1].update(name="cat"), "k"),
    "class with a slash": ("mask_rcnn", lambda c: c["categories"][1].update(name="vehicle/AP/car"), "k"),
    "class as markup": ("retinanet", lambda c: c["categories"][1].update(name="dog[/old]"), "k"),
    "class of half a letter": ("retinanet", lambda c: c["categories"][1].update(name="\ud800"), "k"),
    "class of a million letters": ("retinanet", lambda c: c["categories"][1].update(name="x" * 10**6), "k"),
    "file with Windows separators": ("retinanet", lambda c: name_of(c, ".\\1.png"), "k"),
    "file with the split's name": ("retinanet", lambda c: name_of(c, "train/1.png"), "k"),
    "file with the split's name, Windows": ("retinanet", lambda c: name_of(c, "train\\1.png"), "k"),
    "file of an absolute path": ("retinanet", lambda c: name_of(c, "/data/of/somebody/1.png"), "i"),
    "file of an address": ("retinanet", lambda c: name_of(c, "https://example.org/1.png"), "i"),
    "file of a drive": ("retinanet", lambda c: name_of(c, "C:\\data\\1.png"), "i"),
    "file of a long name": ("retinanet", lambda c: name_of(c, "1" * 5000 + ".png"), "i"),
    "file with a zero byte": ("retinanet", lambda c: name_of(c, "1\0.png"), "i"),
    "file of half a letter": ("retinanet", lambda c: name_of(c, "\ud800.png"), "i"),
    "file that is a folder": ("retinanet", lambda c: name_of(c, "."), "i"),
    "file that is a pipe": ("retinanet", lambda c: name_of(c, "pipe.png"), "i"),
    "file that is no image": ("retinanet", lambda c: name_of(c, "text.png"), "i"),
    "file that is empty": ("retinanet", lambda c: name_of(c, "empty.png"), "i"),
    "image stated larger": ("retinanet", lambda c: c["images"][1].update(width=32, height=24), "i"),
    "image stated on its side": ("mask_rcnn", lambda c: c["images"][1].update(width=12, height=16), "i"),
    "unknown keys": ("retinanet", lambda c: [r.update(mine={"a": [1]}) for k in c for r in c[k]], "k"),
}


def base(detector: str) -> Content:
    """Return the valid file: three images of 16 x 12 pixels, two classes, five objects."""
    images = [{"id": n + 1, "file_name": f"{n}.png", "width": 16, "height": 12} for n in range(3)]
    boxes = {1: [(1, 2, 5, 5), (3, 4, 8, 6)], 2: [(0, 0, 16, 12)], 3: [(2, 1, 6, 9), (8, 3, 7, 4)]}
    annotations: list[Content] = []
    for image_id, each in boxes.items():
        for x, y, w, h in each:
            number = len(annotations)
            outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            segmentation: Any = {"size": [12, 16], "counts": [40, 40, 112]} if number % 3 == 1 else outline
            annotations.append(
                {"id": number + 1, "image_id": image_id, "category_id": 1 + number % 2, "bbox": [x, y, w, h],
                 "segmentation": segmentation, "keypoints": [x, y, 2, x + 1, y + 1, 1]}
            )  # fmt: skip
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }


def path_of(place: str) -> list[Any]:
    return [int(key) if key.isdecimal() else key for key in place.split()]


def changed(content: Content, place: str, value: Any) -> Content:
    """Return a copy with another value in a place such as ``annotations 0 bbox 2``."""
    content = copy.deepcopy(content)
    *path, last = path_of(place)
    target: Any = content
    for key in path:
        target = target[key]
    if value is MISSING:
        if isinstance(target, list) or last in target:
            del target[last]
    else:
        target[last] = value
    return content


def without(content: Content, **gone: Any) -> Content:
    """Return a copy without the annotations that have one of these values."""
    kept = [a for a in content["annotations"] if not any(a[key] == value for key, value in gone.items())]
    return {**content, "annotations": kept}


def expected(content: Content, letter: str, place: str) -> Content | None:
    """Return the valid file that the changed one must be read as; None where nothing can be compared."""
    number = 2 if "annotations 1" in place or place.startswith("RLE") else 1
    crowd, unseen = copy.deepcopy(content), copy.deepcopy(content)
    first(crowd)["iscrowd"], first(unseen)["keypoints"] = 1, [0] * 6
    return {
        "k": content, "p": content, "d": content, "c": crowd, "z": unseen,
        "s": without(content, id=number),
        "i": {**without(content, image_id=2), "images": [i for i in content["images"] if i["id"] != 2]},
        "b": without(content, image_id=2),
        "g": without(content, category_id=2),
    }.get(letter)  # fmt: skip


def cases() -> dict[str, tuple[str, str, Callable[[Content], Content], str]]:
    """Return detector, letter, change and place of each case, by its name."""
    made: dict[str, tuple[str, str, Callable[[Content], Content], str]] = {}
    for (detector, place), letters in ROWS.items():
        for (kind, value), letter in zip(VALUES.items(), letters, strict=True):
            if letter != ".":
                edit = functools.partial(changed, place=place, value=value)
                made[f"{detector}: {place} {kind}"] = detector, letter, edit, place
    for name, (detector, special, letter) in SPECIAL.items():
        made[name] = detector, letter, functools.partial(edited, edit=special), name
    return made


def edited(content: Content, edit: Callable[[Content], Any]) -> Content:
    """Return a copy that was edited in place."""
    content = copy.deepcopy(content)
    edit(content)
    return content


def write_images(data: Path) -> None:
    (data / "train").mkdir(parents=True)
    (data / "annotations").mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 255, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(data / "train" / f"{number}.png")
    (data / "train" / "text.png").write_text("no picture")
    (data / "train" / "empty.png").touch()
    os.mkfifo(data / "train" / "pipe.png")


def config_of(detector: str) -> DetectorConfig:
    keypoints = {"num_keypoints": 2} if detector == "keypoint_rcnn" else {}
    made = {"detector": detector, "backbone": {"name": "resnet18", "norm": "bn"}, "num_classes": 3, "min_size": 12,
            "train": {"horizontal_flip": 0}}  # fmt: skip
    return DetectorConfig.model_validate({**made, **keypoints, "max_size": 16})


def outcome(data: Path, content: object, detector: str) -> dict[str, Any]:
    """Read the file, every image of it, and measure perfect detections: what a run does before and in an epoch."""
    config = config_of(detector)
    (data / "annotations" / "train.json").write_text(json.dumps(content))
    try:
        annotations = read_annotations(data, "train", config)
    except ValueError as error:
        return {"refused": str(error)}
    images = CocoImages(annotations, config, train=True)
    items = {}
    metrics = CocoMetrics(images.coco, annotations.class_names, config.detector)
    for index, image_id in enumerate(images.ids):
        image, target = images[0, index]
        items[target["file_name"]] = [image, *(value for value in target.values() if isinstance(value, torch.Tensor))]
        if detector != "fcn":
            found = {name: value for name, value in target.items() if isinstance(value, torch.Tensor)}
            found["scores"] = torch.ones(len(target["labels"]))
            if "masks" in found:
                found["masks"] = found["masks"][:, None].float()
            metrics.add(image_id, found)
    ap = None if detector == "fcn" else metrics.compute()["AP"]
    return {"items": items, "skipped": list(annotations.skipped), "AP": ap, "summary": annotations.summary()}


def same(one: dict[str, list[torch.Tensor]], other: dict[str, list[torch.Tensor]]) -> bool:
    return one.keys() == other.keys() and all(
        len(a) == len(b) and all(map(torch.equal, a, b)) for a, b in ((one[name], other[name]) for name in one)
    )


def run(data: Path, log: Path) -> None:
    """Read every case, each under the limits, and write what came of it, a line each, before the next."""
    warnings.filterwarnings("ignore", "__array__ implementation doesn't accept a copy keyword")
    write_images(data)
    for detector in ("retinanet", "mask_rcnn", "keypoint_rcnn", "fcn"):  # imports and caches are not the cases' memory
        outcome(data, base(detector), detector)
    held = next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmData" in line)
    resource.setrlimit(resource.RLIMIT_DATA, ((held << 10) + (MEBIBYTES << 20),) * 2)
    faulthandler.enable()
    valid: dict[str, Any] = {}  # what each valid file is read as
    with log.open("w") as file:
        for name, (detector, letter, change, place) in cases().items():
            content = base(detector)
            wanted = expected(content, letter, place)
            signal.alarm(SECONDS)  # its default ends the process, wherever it hangs
            came = outcome(data, change(content), detector)
            signal.alarm(0)
            told: dict[str, Any] = {key: came.get(key) for key in ("refused", "skipped", "AP", "summary")}
            told["same"] = None
            if wanted is not None and "items" in came:
                key = detector + json.dumps(wanted)
                if key not in valid:
                    valid[key] = outcome(data, wanted, detector)["items"]
                told["same"] = same(came["items"], valid[key])
            file.write(json.dumps([name, told]) + "\n")
            file.flush()


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]))
