"""The data behind `backbone train`: what is refused, what is skipped by name, and what a target holds."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import IGNORED_WARNINGS, TOOLS, copy_of, data, recipe

sys.path.append(str(TOOLS))
from backbone.recipe import DetectorConfig
from backbone.training.coco.annotations import read_annotations
from backbone.training.coco.data import CocoImages, EpochSampler, class_map, make_loader, mirrored, padded, resized

pytestmark = [pytest.mark.filterwarnings(each) for each in IGNORED_WARNINGS]
__all__ = ["data"]

Content = dict[str, Any]


def config_of(detector: str = "retinanet", **settings: Any) -> DetectorConfig:
    return DetectorConfig.model_validate({**recipe(detector), **settings})


def edited(data: Path, folder: Path, edit: Callable[[Content], Any]) -> Path:
    """Return a copy of the data with other training annotations."""
    file = copy_of(data, folder / "copy") / "annotations" / "train.json"
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))
    return folder / "copy"


def drop(content: Content, key: str) -> None:
    for annotation in content["annotations"]:
        annotation.pop(key)


REFUSED: dict[str, tuple[Callable[[Content], Any], dict[str, Any], str]] = {
    "number of classes": (
        lambda _: None,
        {"num_classes": 4},
        r"num_classes must be 5, for the 4 categories .* or above 4, .*; got 4",
    ),
    "no masks": (
        lambda content: drop(content, "segmentation"),
        {"detector": "mask_rcnn"},
        "mask_rcnn learns from masks",
    ),
    "no keypoints": (
        lambda content: drop(content, "keypoints"),
        {"detector": "keypoint_rcnn", "num_keypoints": 4},
        "keypoint_rcnn learns from keypoints",
    ),
    "number of keypoints": (
        lambda _: None,
        {"detector": "keypoint_rcnn", "num_keypoints": 17},
        "num_keypoints must be the number of keypoints .* 4; got 17",
    ),
    "no annotation list": (
        lambda content: content.pop("annotations"),
        {},
        "must have the lists .* absent: annotations",
    ),
    "no category that the file knows": (
        lambda content: [each.update(category_id=9) for each in content["annotations"]],
        {},
        r"learns from boxes, and none is left\n.*category_id must be one of \[1, 2, 3, 4\], got 9",
    ),
    "nothing usable": (
        lambda content: [image.update(file_name="gone.png") for image in content["images"]],
        {},
        r"nothing is left to read\n.*8 skipped\n  skipped image 1: .*gone.png: does not exist",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_data_that_does_not_fit_is_refused(case: str, data: Path, tmp_path: Path) -> None:
    edit, settings, message = REFUSED[case]
    config = DetectorConfig.model_validate({**recipe(settings.get("detector", "retinanet")), **settings})
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        read_annotations(edited(data, tmp_path, edit), "train", config)


@pytest.mark.parametrize("gone", ["", "train", "annotations/train.json"])
def test_a_path_that_does_not_exist_is_named(gone: str, data: Path, tmp_path: Path) -> None:
    copy = copy_of(data, tmp_path / "copy")
    (copy / gone).rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=re.escape(f"{copy / gone}")):
        read_annotations(copy, "train", config_of())


def test_a_truncated_annotation_file_is_named(data: Path, tmp_path: Path) -> None:
    file = copy_of(data, tmp_path / "copy") / "annotations" / "train.json"
    file.write_text(file.read_text()[:500])
    with pytest.raises(ValueError, match=r"train\.json: not valid JSON, it may be truncated"):
        read_annotations(tmp_path / "copy", "train", config_of())


BAD_BOXES = {
    "no area": ([5, 5, 0, 10], r"bbox \[5, 5, 0, 10\] has no area"),
    "negative": ([5, 5, -3, 10], "has no area"),
    "not finite": ([5, float("nan"), 5, 10], "is not finite"),
    "no extent in 32 bits": ([63.9, 5, 1e-7, 10], "has no extent in it"),
    "no extent in the image": ([-10, 5, 10, 10], "lies outside of its image"),
    "outside": ([64, 5, 5, 10], "lies outside of its image of 64 x 64"),
    "three numbers": ([5, 5, 5], r"bbox must be \[x, y, width, height\]"),
    "none": (None, "bbox must be"),
}


@pytest.mark.parametrize("case", BAD_BOXES)
def test_an_annotation_with_a_bad_box_is_named_and_skipped(case: str, data: Path, tmp_path: Path) -> None:
    box, message = BAD_BOXES[case]
    copy = edited(data, tmp_path, lambda content: content["annotations"][0].update(bbox=box))
    found = read_annotations(copy, "train", config_of())
    assert found.content["annotations"][0]["id"] == 2
    assert re.search(f"  skipped annotation 1 of 000000.png: .*{message}", found.summary())


def damage(kind: str) -> Callable[[Path], Any]:
    return {
        "does not exist": Path.unlink,
        "is empty": lambda path: path.write_bytes(b""),
        "cannot identify image file": lambda path: path.write_text("no picture"),
    }[kind]


@pytest.mark.parametrize("kind", ["does not exist", "is empty", "cannot identify image file"])
def test_an_image_that_cannot_be_read_is_named_and_skipped(kind: str, data: Path, tmp_path: Path) -> None:
    copy = copy_of(data, tmp_path / "copy")
    damage(kind)(copy / "train" / "000002.png")
    found = read_annotations(copy, "train", config_of())
    assert f"skipped image 3: {copy / 'train' / '000002.png'}: {kind}" in found.summary()
    assert {image["id"] for image in found.content["images"]} == {1, 2, 4, 5, 6, 7, 8}
    assert 3 not in {annotation["image_id"] for annotation in found.content["annotations"]}


# torchvision's data set leaves the file of a picture that it cannot decode to the garbage collector
@pytest.mark.filterwarnings("ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning")
def test_an_image_cut_short_is_named_when_it_is_read(data: Path, tmp_path: Path) -> None:
    file = copy_of(data, tmp_path / "copy") / "train" / "000000.png"
    file.write_bytes(file.read_bytes()[:2000])
    images = CocoImages(read_annotations(tmp_path / "copy", "train", config_of()), config_of(), train=True)
    with pytest.raises(ValueError, match=r"000000\.png cannot be read"):
        images[0, 0]


@pytest.mark.parametrize("detector", ["retinanet", "mask_rcnn", "fcn"])
def test_an_image_without_annotations_is_background(detector: str, data: Path, tmp_path: Path) -> None:
    def edit(content: Content) -> None:
        content["annotations"] = [each for each in content["annotations"] if each["image_id"] != 1]

    images = dataset(edited(data, tmp_path, edit), detector)
    target = images[0, 0][1]
    if detector == "fcn":
        assert target["classes"].eq(0).all()
    else:
        assert target["boxes"].shape == (0, 4)
        assert len(target["labels"]) == 0
    if detector == "mask_rcnn":
        assert target["masks"].shape == (0, 64, 64)


def dataset(data: Path, detector: str = "retinanet", *, train: bool = True, **settings: Any) -> CocoImages:
    config = config_of(detector, **settings)
    return CocoImages(read_annotations(data, "train", config), config, train=train)


def test_category_ids_with_gaps_become_labels_from_one(data: Path, tmp_path: Path) -> None:
    ids = {1: 40, 2: 7, 3: 90, 4: 8}

    def edit(content: Content) -> None:
        for category in content["categories"]:
            category["id"] = ids[category["id"]]
        for annotation in content["annotations"]:
            annotation["category_id"] = ids[annotation["category_id"]]

    before, after = dataset(data), dataset(edited(data, tmp_path, edit))
    label = {1: 3, 2: 1, 3: 4, 4: 2}
    for index in range(8):
        assert after[0, index][1]["labels"].tolist() == [label[each] for each in before[0, index][1]["labels"].tolist()]


def test_a_detector_with_room_for_the_ids_of_coco_keeps_them(data: Path, tmp_path: Path) -> None:
    def edit(content: Content) -> None:
        content["categories"] = [{"id": each["id"] * 22, "name": each["name"]} for each in content["categories"]]
        for annotation in content["annotations"]:
            annotation["category_id"] *= 22

    before = dataset(data)
    after = dataset(edited(data, tmp_path, edit), num_classes=91)
    assert torch.equal(after[0, 0][1]["labels"], 22 * before[0, 0][1]["labels"])


def test_crowds_are_not_learned_from_but_evaluated(data: Path, tmp_path: Path) -> None:
    images = dataset(edited(data, tmp_path, lambda content: content["annotations"][0].update(iscrowd=1)))
    assert len(images[0, 0][1]["labels"]) == len(images.coco.imgToAnns[1]) - 1


def test_a_mirrored_image_has_mirrored_boxes_masks_and_keypoints(data: Path) -> None:
    config = config_of("keypoint_rcnn", num_keypoints=4, train={"horizontal_flip": 1.0})
    annotations = read_annotations(data, "train", config)
    (image, target), (mirror, other) = (CocoImages(annotations, config, train=flip)[0, 0] for flip in (False, True))
    assert torch.equal(image.flip(-1), mirror)
    assert torch.equal(other["boxes"][:, [2, 0]], 64 - target["boxes"][:, [0, 2]])
    top, right, bottom, left = target["keypoints"].unbind(1)
    x, seen = torch.stack((top, left, bottom, right), 1)[..., 0], other["keypoints"][..., 2] > 0
    assert torch.equal(other["keypoints"][..., 0][seen], (63 - x)[seen])


def test_keypoints_change_sides() -> None:
    assert mirrored(["nose", "left_eye", "right_eye", "left_ear"]) == [0, 2, 1, 3]
    assert mirrored(["", ""]) == [0, 1]


def test_a_smaller_object_lies_over_a_larger_one() -> None:
    masks = torch.zeros(2, 2, 4, dtype=torch.uint8)
    masks[0, 0, :2], masks[1, :, :3] = 1, 1
    assert class_map(masks, torch.tensor([3, 1])).tolist() == [[3, 3, 1, 0], [1, 1, 1, 0]]


def test_padding_is_at_the_lower_right() -> None:
    stacked = padded([torch.ones(1, 2, 1), torch.ones(1, 1, 3)], 7)
    assert stacked[:, 0].tolist() == [[[1, 7, 7], [1, 7, 7]], [[1, 1, 1], [7, 7, 7]]]


@pytest.mark.parametrize(("size", "expected"), [((100, 200), [50, 100]), ((100, 400), [30, 120]), ((64, 64), [50, 50])])
def test_the_longer_side_limits_the_shorter(size: tuple[int, int], expected: list[int]) -> None:
    assert resized(size, 50, 120) == expected


def test_order_and_augmentation_follow_from_seed_and_epoch(data: Path) -> None:
    def orders(seed: int) -> list[list[tuple[int, int]]]:
        sampler, found = EpochSampler(images, rank=0, world_size=1, seed=seed), []
        for epoch in range(2):
            sampler.set_epoch(epoch)
            found.append(list(sampler))
        return found

    images = dataset(data)
    assert orders(0) == orders(0)
    first, second = ([index for _, index in order] for order in orders(0))
    assert sorted(first) == sorted(second) == list(range(8))
    assert first != second
    assert orders(0) != orders(1)
    assert all(torch.equal(images[3, index][0], images[3, index][0]) for index in range(8))
    assert any(not torch.equal(images[0, index][0], images[1, index][0]) for index in range(8))


def test_ranks_share_a_step_of_the_doubled_batch(data: Path) -> None:
    images = dataset(data)
    one = list(EpochSampler(images, rank=0, world_size=1, seed=0))
    two = [list(EpochSampler(images, rank=rank, world_size=2, seed=0)) for rank in range(2)]
    assert [{*two[0][i : i + 2], *two[1][i : i + 2]} for i in (0, 2)] == [{*one[:4]}, {*one[4:]}]


def test_evaluation_sees_every_image_once_on_any_number_of_ranks(data: Path) -> None:
    images = dataset(data, train=False)
    seen = [index for rank in range(3) for _, index in EpochSampler(images, rank=rank, world_size=3, seed=None)]
    assert sorted(seen) == list(range(8))


def test_fewer_images_than_a_step_takes_are_refused(data: Path) -> None:
    with pytest.raises(ValueError, match="batch_size must be at most 1, for 8 training images on 5 processes; got 2"):
        make_loader(dataset(data), world_size=5)


def test_fewer_images_to_evaluate_than_processes_are_refused(data: Path) -> None:
    with pytest.raises(ValueError, match="every process must have an image to evaluate, got 8 images for 9 processes"):
        make_loader(dataset(data, train=False), world_size=9)


def test_keypoints_without_sides_are_told_of(data: Path, tmp_path: Path) -> None:
    def edit(content: Content) -> None:
        for category in content["categories"]:
            category.pop("keypoints", None)

    config = config_of("keypoint_rcnn", num_keypoints=4)
    found = read_annotations(edited(data, tmp_path, edit), "train", config)
    assert "names no left and right keypoints; a mirrored image keeps their order" in found.summary()
    assert "keypoints" not in read_annotations(data, "train", config).summary()
