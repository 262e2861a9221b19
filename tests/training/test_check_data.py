"""What is said of a data set before training: summary, list, command; and that all parts read the same pixels."""

import csv
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from malformed import base, config_of, outcome, same
from PIL import ExifTags, Image
from runs import IGNORED_WARNINGS, recipe
from typer.testing import CliRunner, Result

from backbone.command import extraction
from backbone.command.app import app
from backbone.recipe import DetectorConfig
from backbone.training.coco.annotations import Annotations, read_annotations
from backbone.training.coco.chart import anchor_sizes
from backbone.training.coco.data import IGNORED, CocoImages
from backbone.training.coco.metrics import CocoMetrics
from backbone.training.coco.summary import save_skipped

pytestmark = [pytest.mark.filterwarnings(each) for each in IGNORED_WARNINGS]

Content = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images of 16 x 12 pixels for training and for validation, with valid annotations."""
    for split in ("train", "val"):
        (tmp_path / "data" / split).mkdir(parents=True)
        for number in range(3):
            pixels = np.random.default_rng(number).integers(0, 255, (12, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / split / f"{number}.png")
        write(tmp_path / "data", base("retinanet"), split)
    return tmp_path / "data"


def write(data: Path, content: Any, split: str = "train") -> None:
    (data / "annotations").mkdir(exist_ok=True)
    (data / "annotations" / f"{split}.json").write_text(json.dumps(content))


def read(data: Path, content: Any = None, detector: str = "retinanet", **options: Any) -> Annotations:
    if content is not None:
        write(data, content)
    return read_annotations(data, "train", config_of(detector), **options)


def edited(edit: Callable[[Content], Any], detector: str = "retinanet") -> Content:
    content = base(detector)
    edit(content)
    return content


def check(data: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["check-data", str(data), *arguments], catch_exceptions=False)


def spoilt(content: Content) -> None:
    """Give five boxes no area, one kind of record no category and one image no file."""
    content["annotations"] += [{**content["annotations"][0], "id": 10 + n, "bbox": [1, 1, 0, n + 1]} for n in range(5)]
    content["annotations"].append({**content["annotations"][0], "id": 20, "category_id": 7})
    content["images"].append({"id": 9, "file_name": "[gone].png"})


def test_the_summary_shows_three_of_each_reason_with_a_remedy_and_counts_all(folder: Path) -> None:
    said = read(folder, edited(spoilt)).summary().splitlines()
    assert said[0].endswith("train.json: 3 images, 5 annotations, 7 skipped")
    assert sum("has no area" in line and "skipped annotation" in line for line in said) == 3
    assert "  ... and 2 more: bbox has no area" in said
    assert "  bbox has no area: write a width and height above 0" in said
    assert "  objects by class: cat 3, dog 2" in said
    assert any("category_id must be one of [1, 2], got 7" in line for line in said)
    assert any("[gone].png: does not exist" in line for line in said)


def test_strict_refuses_what_would_be_skipped_and_nothing_else(folder: Path) -> None:
    assert not read(folder, strict=True).skipped
    with pytest.raises(
        ValueError, match=r"--strict refuses 7 records that would be skipped\n(.*\n)*.*annotation 10 of 0\.png"
    ):
        read(folder, edited(spoilt), strict=True)


def test_the_command_lists_draws_and_exits_by_strictness(folder: Path, tmp_path: Path) -> None:
    write(folder, edited(spoilt))
    result = check(folder, "--out", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    rows = list(csv.DictReader((tmp_path / "out" / "skipped.csv").read_text().splitlines()))
    assert len(rows) == 7
    assert rows[-1]["record"] == "annotation 20 of 0.png"
    assert {row["file"] for row in rows} == {str(folder / "annotations" / "train.json")}
    for split in ("train", "val"):
        with Image.open(tmp_path / "out" / f"{split}.png") as picture:
            assert picture.width > 1000
    strict = check(folder, "--strict")
    assert strict.exit_code == 2
    assert "error: --strict refuses 7 records" in strict.stderr
    assert "[gone].png" in strict.stdout


def test_a_clean_data_set_passes_strictly_and_leaves_no_list(folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump({**recipe("retinanet"), "num_classes": 3}))
    result = check(folder, "--strict", "--config", str(config))
    assert result.exit_code == 0, result.output
    (tmp_path / "skipped.csv").write_text("of an earlier look")
    assert not save_skipped({folder: []}, tmp_path / "skipped.csv")
    assert not (tmp_path / "skipped.csv").exists()


def test_the_command_holds_data_against_the_recipe(folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump({**recipe("retinanet"), "num_classes": 2}))
    result = check(folder, "--config", str(config))
    assert result.exit_code == 2
    assert "num_classes must be 3, for the 2 categories" in result.stderr


def test_without_a_recipe_masks_and_keypoints_are_checked_where_there_are_some(folder: Path) -> None:
    def edit(content: Content) -> None:
        content["annotations"][0]["segmentation"] = [[1, 1, 8]]
        content["annotations"][2]["keypoints"] = [1, 1, 2, 5]
        del content["annotations"][3]["segmentation"], content["annotations"][4]["keypoints"]

    write(folder, edited(edit))
    found = read_annotations(folder, "train", None)
    assert [line.record for line in found.skipped] == ["annotation 1 of 0.png", "annotation 3 of 1.png"]


def test_anchors_are_those_of_the_detector() -> None:
    sizes = {"faster_rcnn": [32, 64, 128, 256, 512], "fcos": [8, 16, 32, 64, 128], "fcn": []}
    for detector, expected in sizes.items():
        assert anchor_sizes(config_of(detector)) == expected


OTHERS: dict[str, tuple[dict[str, str], str]] = {
    "VOC": ({"Annotations/1.xml": "<annotation><object/></annotation>"}, "from_pascal_voc"),
    "LabelMe": ({"photos/1.json": '{"shapes": [], "imagePath": "1.png"}'}, "labelme2coco"),
    "YOLO": ({"data.yaml": "names: [cat]"}, "from_yolo"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_another_format_gets_a_line_on_how_to_convert_it(kind: str, tmp_path: Path) -> None:
    files, converter = OTHERS[kind]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(FileNotFoundError, match=rf"does not exist; this looks like .*{converter}"):
        read(tmp_path)


FILES: dict[str, tuple[bytes, str]] = {
    "Latin-1": ('{"images": [], "info": "caf\u00e9"}'.encode("latin-1"), "must be UTF-8 .*looks like Latin-1"),
    "cut": (b'{"images": [', "not valid JSON, it may be truncated"),
    "empty": (b"", "not valid JSON"),
    "deep": (b"[" * 100_000, "nested too deep"),
    "list": (b"[]", "must have the lists images, annotations and categories, and is a list"),
    "LabelMe": (b'{"shapes": [], "imagePath": "1.png"}', "absent: images, annotations, categories; .*labelme2coco"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_no_annotation_file_is_refused_with_what_it_looks_like(case: str, folder: Path) -> None:
    text, message = FILES[case]
    (folder / "annotations" / "train.json").write_bytes(text)
    with pytest.raises(ValueError, match=re.compile(rf"train\.json: .*{message}", re.DOTALL)):
        read(folder)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_encodings_that_json_allows_are_read(encoding: str, folder: Path) -> None:
    (folder / "annotations" / "train.json").write_bytes(json.dumps(base("retinanet")).encode(encoding))
    assert len(read(folder).content["annotations"]) == 5


NOTES: dict[str, tuple[Callable[[Content], Any], str]] = {
    "corners": (
        lambda c: [a.update(bbox=[x, y, x + w, y + h]) for a in c["annotations"] for x, y, w, h in [a["bbox"]]],
        "boxes reach beyond their image; they look like x1, y1, x2, y2",
    ),
    "a name twice": (lambda c: c["categories"][1].update(name="cat"), "categories 1, 2 have one name, 'cat'"),
    "area": (lambda c: c["annotations"][0].update(area="large"), "area of 1 objects is no area"),
    "sizes": (lambda c: c["images"][0].update(width="16"), "1 images: each has a width or height .* that is no size"),
    "no ids": (lambda c: [a.pop("id") for a in c["annotations"]], "5 annotations have no id"),
    "ids twice": (lambda c: c["annotations"][1].update(id=1), "1 annotations have an id that was there before"),
}


@pytest.mark.parametrize("case", NOTES)
def test_what_is_odd_and_can_be_read_is_counted_in_a_note(case: str, folder: Path) -> None:
    edit, message = NOTES[case]
    found = read(folder, edited(edit))
    assert re.search(f"note: .*{message}", found.summary())
    assert not read(folder, base("retinanet")).notes


def test_two_classes_of_one_name_stay_two_in_names_and_metrics(folder: Path) -> None:
    found = read(folder, edited(lambda c: c["categories"][1].update(name="cat")))
    assert found.class_names == {1: "cat (id 1)", 2: "cat (id 2)"}
    images = CocoImages(found, config_of("retinanet"), train=False)
    assert {"AP/cat (id 1)", "AP/cat (id 2)"} <= CocoMetrics(
        images.coco, found.class_names, "retinanet"
    ).compute().keys()


def test_a_file_name_that_is_nowhere_says_what_was_tried(folder: Path) -> None:
    found = read(folder, edited(lambda c: c["images"][1].update(file_name="train\\sub\\1.png")))
    assert f"{folder}/train/train\\sub\\1.png".replace("\\", "\\\\") in found.skipped[0] or "nor" in found.skipped[0]
    assert str(folder / "train" / "sub" / "1.png") in found.skipped[0]
    found = read(folder, edited(lambda c: c["images"][1].update(file_name="http://a.org/1.png")))
    assert "an address is not fetched" in found.skipped[0]


def rotated(folder: Path, orientation: int = 6) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    pixels = np.random.default_rng(7).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "train" / "1.png", exif=exif)


def gray(folder: Path) -> None:
    ramp = np.linspace(0, 65535, 192).round().astype(np.uint16).reshape(12, 16)
    Image.fromarray(ramp).save(folder / "train" / "1.png")


def floats(folder: Path) -> None:
    Image.fromarray(np.linspace(0, 1, 192, dtype=np.float32).reshape(12, 16)).save(folder / "train" / "1.png", "tiff")


@pytest.mark.parametrize("make", [rotated, gray, floats])
def test_training_evaluation_and_extract_see_the_same_pixels(make: Callable[[Path], None], folder: Path) -> None:
    make(folder)
    found = read(folder, edited(lambda c: (c["images"][1].pop("width"), c["annotations"][2].update(bbox=[1, 1, 9, 9]))))
    expected = torch.from_numpy(np.array(extraction.read_image(folder / "train" / "1.png"))).permute(2, 0, 1)
    for train in (True, False):
        image, target = CocoImages(found, config_of("retinanet"), train=train)[0, 1]
        assert target["file_name"] == "1.png"
        assert torch.equal((image * 255).round().to(torch.uint8), expected)


def test_an_image_drawn_on_its_side_is_skipped_and_one_that_may_be_upright_is_told_of(folder: Path) -> None:
    rotated(folder)
    lying = read(folder, base("retinanet"))  # a box as wide as the file that lies
    assert [line.reason for line in lying.skipped] == ["annotated before it was turned upright"]
    upright = read(folder, edited(lambda c: c["annotations"][2].update(bbox=[0, 0, 9, 9])))
    assert not upright.skipped
    assert any("make sure that its boxes and masks are those of the upright image" in note for note in upright.notes)


def test_twelve_bits_are_told_of_in_the_summary_and_no_more_while_training(folder: Path) -> None:
    for number in range(2):
        pixels = np.linspace(0, 4095, 192).round().astype(np.uint16).reshape(12, 16)
        Image.fromarray(pixels).save(folder / "train" / f"{number}.png")
    found = read(folder)
    assert "note: 2 images: each has no gray above 4095 in 16 bits, read as 12 bits" in found.summary()
    CocoImages(found, config_of("retinanet"), train=True)[0, 0]  # warnings are errors here


def test_a_segmenters_crowds_are_ignored_where_no_object_lies(folder: Path) -> None:
    content = base("fcn")
    content["annotations"][0] |= {"iscrowd": 1}
    _, target = CocoImages(read(folder, content, "fcn"), config_of("fcn"), train=False)[0, 0]
    assert (target["classes"][2:7, 1:3] == IGNORED).all()  # of the crowd alone
    assert (target["classes"][4:, 3:] != IGNORED).any()
    assert (target["classes"][0, 8:] == 0).all()


def test_a_crowd_is_mirrored_and_resized_with_its_image(folder: Path) -> None:
    content = base("fcn")
    content["annotations"][0] |= {"iscrowd": 1}
    made = {**config_of("fcn").model_dump(), "min_size": 24, "max_size": 32, "train": {"horizontal_flip": 1.0}}
    found = read(folder, content, "fcn")
    _, target = CocoImages(found, DetectorConfig.model_validate(made), train=True)[0, 0]
    assert (target["classes"][4:14, 32 - 6 : 32 - 2] == IGNORED).all()


@pytest.mark.parametrize("x", [0.0, 5.0, 12.0])
def test_the_narrowest_box_that_is_kept_has_width_mirrored_and_unmirrored(x: float, folder: Path) -> None:
    kept = [w for w in np.geomspace(1e-7, 1e-2, 60) if outcome_keeps(folder, [x, 2, float(w), 5])]
    assert kept
    content = edited(lambda c: c["annotations"][0].update(bbox=[x, 2, kept[0], 5]))
    for flip in (0.0, 1.0):
        made = {**config_of("retinanet").model_dump(), "train": {"horizontal_flip": flip}}
        boxes = CocoImages(read(folder, content), DetectorConfig.model_validate(made), train=True)[0, 0][1]["boxes"]
        resized = boxes * torch.tensor(800 / 12)  # as torchvision's detectors do next
        assert (boxes[:, 2] > boxes[:, 0]).all()
        assert (resized[:, 2] > resized[:, 0]).all()


def outcome_keeps(folder: Path, box: list[float]) -> bool:
    return not read(folder, edited(lambda c: c["annotations"][0].update(bbox=box))).skipped


def test_labels_follow_names_where_evaluation_lists_them_in_another_order(folder: Path) -> None:
    def swap(content: Content) -> None:
        content["categories"] = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]
        for annotation in content["annotations"]:
            annotation["category_id"] = 3 - annotation["category_id"]

    valid = outcome(folder, base("retinanet"), "retinanet")["items"]
    found = read(folder, edited(swap), class_names={1: "cat", 2: "dog"})
    images = CocoImages(found, config_of("retinanet"), train=False)
    items = {}
    metrics = CocoMetrics(images.coco, found.class_names, "retinanet")
    for index, image_id in enumerate(images.ids):
        image, target = images[0, index]
        items[target["file_name"]] = [image, target["boxes"], target["labels"]]
        plain = {"boxes": target["boxes"], "labels": target["labels"], "scores": torch.ones(len(target["labels"]))}
        metrics.add(image_id, plain)
    assert same(items, valid)
    assert metrics.compute()["AP/cat"] == metrics.compute()["AP/dog"] == pytest.approx(1.0)


def test_classes_that_weights_do_not_know_are_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"must be among those that the weights were trained on, cat, cow; it has dog"):
        read(folder, class_names={1: "cat", 2: "cow"})


def test_a_tenth_of_a_large_data_set_is_read_in_a_tenth_of_20_seconds(folder: Path) -> None:
    """5,000 images and 100,000 annotations are to take less than 20 s; the time is the processor's."""
    images = [{"id": number, "file_name": f"{number}.png", "width": 16, "height": 12} for number in range(500)]
    for number in range(3, 500):
        os.link(folder / "train" / "0.png", folder / "train" / f"{number}.png")
    angles = np.linspace(0, 2 * np.pi, 25)
    outline = [float(value) for angle in angles for value in (8 + 6 * np.cos(angle), 6 + 5 * np.sin(angle))]
    one = {"category_id": 1, "bbox": [2, 1, 12, 10], "segmentation": [outline], "area": 90.5, "iscrowd": 0}
    annotations = [{**one, "id": number, "image_id": number % 500} for number in range(10_000)]
    write(folder, {**base("mask_rcnn"), "images": images, "annotations": annotations})
    start = time.process_time()
    found = read(folder, detector="mask_rcnn")
    assert time.process_time() - start < 2
    assert (len(found.content["images"]), len(found.content["annotations"]), found.skipped) == (500, 10_000, [])


def test_progress_is_shown_through_images_and_annotations(folder: Path) -> None:
    shown = []

    def track(items: Sequence[Any], title: str) -> Sequence[Any]:
        shown.append((title, len(items)))
        return items

    read(folder, track=track)
    assert shown == [("images of train", 3), ("annotations of train", 5)]
