"""tools/make_shapes_dataset.py: bytes that repeat, and annotations that COCO's own tools read as they were drawn."""

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from typer.testing import CliRunner

# pycocotools (2.0.11) wraps its own memory in an array class from before NumPy 2.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

TOOLS = Path(__file__).parents[2] / "tools"
SIZE = (64, 96)
NUM_TRAIN, NUM_VAL = 40, 6

INVALID = {
    "unknown shape": ({"shapes": ["circle", "sqare"]}, "unknown shape 'sqare'; did you mean 'square'"),
    "no shape": ({"shapes": []}, "shapes must be a list of one or more"),
    "a word for a list": ({"shapes": "circle"}, "shapes must be a list of one or more"),
    "shape twice": ({"shapes": ["star", "star"]}, "shapes must not repeat a name, got star, star"),
    "small": ({"image_size": (64, 31)}, "at least 32 pixels, got (64, 31)"),
    "one side": ({"image_size": (64,)}, "a height and a width"),
    "negative train": ({"num_train": -1}, "num_train must be 0 images or more, got -1"),
    "negative val": ({"num_val": -2}, "num_val must be 0 images or more, got -2"),
    "no objects": ({"max_objects": 0}, "max_objects must be at least 1, got 0"),
    "negative seed": ({"seed": -1}, "seed must be 0 or more, got -1"),
    "scales crossed": ({"min_scale": 0.5, "max_scale": 0.4}, "0 < min_scale <= max_scale <= 1"),
    "larger than the image": ({"max_scale": 1.5}, "0 < min_scale <= max_scale <= 1"),
    "specks": ({"image_size": (32, 32)}, "set min_scale to 0.188 or more"),
}


@pytest.fixture(scope="module")
def tool() -> Iterator[Any]:
    sys.path.insert(0, str(TOOLS))
    yield importlib.import_module("shapes.make_shapes_dataset")
    sys.path.remove(str(TOOLS))


def make(tool: Any, out: Path, **settings: Any) -> Path:
    tool.make_shapes_dataset(out, **{"num_train": 3, "num_val": 2, "image_size": SIZE, **settings})
    return out


@pytest.fixture(scope="module")
def drawing(tool: Any) -> Any:
    return importlib.import_module("shapes.drawing")


@pytest.fixture(scope="module")
def dataset(tool: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shapes") / "set"
    return make(tool, out, num_train=NUM_TRAIN, num_val=NUM_VAL, shapes=list(tool.SHAPES))


@pytest.fixture(scope="module")
def coco(dataset: Path) -> COCO:
    return COCO(dataset / "annotations" / "train.json")


@pytest.fixture(scope="module")
def annotations(coco: COCO) -> list[dict[str, Any]]:
    return list(coco.anns.values())


def files_of(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def split_of(out: Path, split: str = "train") -> Any:
    return json.loads((out / "annotations" / f"{split}.json").read_text())


def test_the_same_seed_gives_the_same_bytes(tool: Any, tmp_path: Path) -> None:
    first = files_of(make(tool, tmp_path / "a", seed=3))
    assert len(first) == 3 + 2 + 2
    assert files_of(make(tool, tmp_path / "b", seed=3)) == first
    other = files_of(make(tool, tmp_path / "c", seed=4))
    assert not set(other.values()) & set(first.values())


def test_more_images_leave_the_others_as_they_are(tool: Any, tmp_path: Path) -> None:
    few = make(tool, tmp_path / "few", num_train=5, num_val=1)
    many = make(tool, tmp_path / "many", num_train=10, num_val=4)
    few_files, many_files = files_of(few), files_of(many)
    assert all(many_files[name] == content for name, content in few_files.items() if name.endswith(".png"))
    for split in ("train", "val"):
        before, after = split_of(few, split), split_of(many, split)
        for key in ("images", "annotations"):
            assert after[key][: len(before[key])] == before[key]


def test_no_image_is_there_twice(dataset: Path) -> None:
    pictures = [content for name, content in files_of(dataset).items() if name.endswith(".png")]
    assert len(set(pictures)) == len(pictures) == NUM_TRAIN + NUM_VAL


def test_images_have_the_size_they_are_said_to_have(dataset: Path) -> None:
    for entry in split_of(dataset)["images"]:
        with Image.open(dataset / "train" / entry["file_name"]) as image:
            assert (image.mode, image.height, image.width) == ("RGB", *SIZE) == ("RGB", entry["height"], entry["width"])


def test_categories_count_from_one_in_the_order_given(tool: Any, tmp_path: Path) -> None:
    out = make(tool, tmp_path / "set", shapes=("ring", "circle", "heart"), num_train=8)
    categories = split_of(out)["categories"]
    assert [(category["id"], category["name"]) for category in categories] == [(1, "ring"), (2, "circle"), (3, "heart")]
    assert {annotation["category_id"] for annotation in split_of(out)["annotations"]} == {1, 2, 3}
    assert split_of(out, "val")["categories"] == categories


def test_a_ring_is_labelled_ring(tool: Any, tmp_path: Path) -> None:
    settings = {"shapes": ["circle", "ring"], "max_objects": 1, "min_scale": 0.4, "num_train": 12}
    coco = COCO(make(tool, tmp_path / "set", **settings) / "annotations" / "train.json")
    solid: dict[int, list[float]] = {1: [], 2: []}
    for annotation in coco.anns.values():
        solid[annotation["category_id"]].append(annotation["area"] / (annotation["bbox"][2] * annotation["bbox"][3]))
    assert np.median(solid[1]) == pytest.approx(np.pi / 4, rel=0.1)
    assert np.median(solid[2]) == pytest.approx(np.pi / 4 * (1 - 0.5**2), rel=0.1)


def test_boxes_and_areas_are_those_of_the_masks(coco: COCO, annotations: list[dict[str, Any]]) -> None:
    for annotation in annotations:
        encoded = coco.annToRLE(annotation)
        assert annotation["bbox"] == coco_mask.toBbox(encoded).tolist()
        assert annotation["area"] == coco_mask.area(encoded)


def test_masks_of_an_image_are_disjoint(coco: COCO) -> None:
    for image_id in coco.getImgIds():
        masks = [coco.annToMask(annotation) for annotation in coco.imgToAnns[image_id]]
        assert np.sum(masks, axis=0).max() == 1


def test_both_polygons_and_masks_with_holes_are_met(annotations: list[dict[str, Any]]) -> None:
    assert {type(annotation["segmentation"]) for annotation in annotations} == {list, dict}


@pytest.mark.parametrize("filled", [0.1, 0.5, 0.9])
def test_polygons_are_filled_to_exactly_the_mask(tool: Any, filled: float) -> None:
    """On noise, where pixels touch at corners and holes hold islands."""
    rng = np.random.default_rng(0)
    for _ in range(150):
        height, width = rng.integers(2, 12, 2).tolist()
        mask = rng.random((height, width)) < filled
        mask[0, 0] = True
        encoded = coco_mask.frPyObjects(tool.segmentation_of(mask), height, width)
        encoded = coco_mask.merge(encoded) if isinstance(encoded, list) else encoded
        np.testing.assert_array_equal(coco_mask.decode(encoded), mask)


def test_pixels_that_touch_at_a_corner_are_two_polygons(tool: Any) -> None:
    upper, lower = [1.0, 0, 1, 1, 0, 1, 0, 0], [2.0, 1, 2, 2, 1, 2, 1, 1]
    assert tool.segmentation_of(np.eye(2, dtype=bool)) == [upper, lower]


def test_no_box_is_beyond_the_image(annotations: list[dict[str, Any]]) -> None:
    x, y, width, height = np.array([annotation["bbox"] for annotation in annotations]).T
    assert min(x.min(), y.min()) >= 0
    assert max((x + width).max() - SIZE[1], (y + height).max() - SIZE[0]) <= 0


def test_no_box_is_degenerate(tool: Any, drawing: Any) -> None:
    """In the smallest images, with the smallest objects."""
    for seed in range(100):
        _, objects = drawing.draw_scene(np.random.default_rng(seed), (32, 32), list(tool.SHAPES), 6, (0.19, 0.3))
        assert min(min(tool.describe(each)["bbox"][2:]) for each in objects) >= 3


def test_every_image_has_an_object(coco: COCO) -> None:
    assert all(coco.imgToAnns[image_id] for image_id in coco.getImgIds())


def test_sizes_vary_over_most_of_eight_to_one(annotations: list[dict[str, Any]]) -> None:
    sides = [max(annotation["bbox"][2:]) for annotation in annotations]
    assert max(sides) / min(sides) > 6
    assert np.percentile(sides, 90) / np.percentile(sides, 10) > 3


def test_objects_hide_one_another(annotations: list[dict[str, Any]]) -> None:
    visibilities = np.array([annotation["keypoints"][2::3] for annotation in annotations])
    assert (visibilities == 1).any(axis=1).mean() > 0.15


def test_boxes_overlap(coco: COCO) -> None:
    crossing = 0
    for image_id in coco.getImgIds():
        boxes = np.array([annotation["bbox"] for annotation in coco.imgToAnns[image_id]])
        overlaps = coco_mask.iou(boxes, boxes, [0] * len(boxes))
        crossing += bool((overlaps - np.eye(len(boxes)) > 0.05).any())
    assert crossing > 0.35 * NUM_TRAIN


def test_visible_keypoints_are_on_the_mask_and_hidden_ones_are_not(
    coco: COCO, annotations: list[dict[str, Any]]
) -> None:
    for annotation in annotations:
        mask = coco.annToMask(annotation)
        for x, y, visibility in np.reshape(annotation["keypoints"], (-1, 3)):
            if visibility:
                assert mask[y, x] == visibility - 1  # an IndexError here is a keypoint outside the image
            else:
                assert (x, y) == (0, 0)


def test_keypoints_are_the_extremes_of_an_object_that_nothing_hides(annotations: list[dict[str, Any]]) -> None:
    whole = [each for each in annotations if set(each["keypoints"][2::3]) == {2}]
    assert len(whole) > NUM_TRAIN / 2
    for annotation in whole:
        (top, right, bottom, left) = np.reshape(annotation["keypoints"], (4, 3))[:, :2]
        x, y, width, height = annotation["bbox"]
        assert (left[0], top[1], right[0], bottom[1]) == (x, y, x + width - 1, y + height - 1)


def test_categories_name_the_keypoints_they_have(dataset: Path) -> None:
    train = split_of(dataset)
    for category in train["categories"]:
        assert category["keypoints"] == ["top", "right", "bottom", "left"]
        assert sorted({end for limb in category["skeleton"] for end in limb}) == [1, 2, 3, 4]
    for annotation in train["annotations"]:
        assert len(annotation["keypoints"]) == 4 * 3
        assert annotation["num_keypoints"] == np.count_nonzero(annotation["keypoints"][2::3])


def test_torchvision_reads_boxes_masks_and_labels(dataset: Path, coco: COCO) -> None:
    detections = CocoDetection(dataset / "train", dataset / "annotations" / "train.json")
    images = wrap_dataset_for_transforms_v2(detections, target_keys=("boxes", "masks", "labels"))
    assert len(images) == NUM_TRAIN
    for index in range(NUM_TRAIN):
        _, target = images[index]
        count = len(coco.imgToAnns[index + 1])
        assert target["masks"].shape == (count, *SIZE)
        assert len(target["boxes"]) == len(target["labels"]) == count
        areas = [annotation["area"] for annotation in coco.imgToAnns[index + 1]]
        assert target["masks"].sum((1, 2)).tolist() == areas


def test_paint_changes_the_pixels_of_the_mask_and_their_seam(drawing: Any) -> None:
    rng = np.random.default_rng(0)
    for name, outline in drawing.SHAPES.items():
        before = drawing.texture(rng, SIZE, np.full(3, 128.0), contrast=20)
        stamp = drawing.rasterise(outline, drawing.HOLES.get(name, drawing.NO_HOLE), np.array([20.0, 60.0]), 25.0, 0.4)
        painted = before.copy()
        drawing.paint(rng, painted, stamp)
        mask = stamp.mask_in(SIZE)
        changed = (painted != before).any(axis=2)
        assert changed[mask].all(), name
        assert not (changed & ~grown(mask)).any(), name


def grown(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask and the eight neighbours of each of its pixels."""
    padded = np.pad(mask, 1)
    height, width = mask.shape
    result = mask.copy()
    for y, x in np.ndindex(3, 3):
        result |= padded[y : y + height, x : x + width]
    return result


def test_masks_and_picture_agree_on_who_is_in_front(tool: Any, drawing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no texture an object has one colour, but for its seam and the faint tips of what covers it."""
    monkeypatch.setattr(drawing, "texture", flat)
    pixels: list[bool] = []
    for seed in range(20):
        picture, objects = drawing.draw_scene(np.random.default_rng(seed), SIZE, list(tool.SHAPES), 6, (0.1, 0.8))
        for each in objects:
            inner = picture[~grown(~each.mask)]
            pixels.extend((inner == np.median(inner, axis=0)).all(axis=1) if len(inner) else [])
    assert len(pixels) > 10_000
    assert np.mean(pixels) > 0.999


def flat(_: Any, size: tuple[int, int], colour: NDArray[np.float64], contrast: float) -> NDArray[np.float32]:
    return np.full((*size, 3), colour, np.float32)


def test_objects_that_are_mostly_hidden_are_left_out(tool: Any, drawing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = []

    def record(stamp: Any, visible: NDArray[np.bool_]) -> list[Any]:
        shares.append(visible.sum() / stamp.mask.sum())
        return []

    monkeypatch.setattr(drawing, "find_keypoints", record)
    for seed in range(30):
        drawing.draw_scene(np.random.default_rng(seed), SIZE, list(tool.SHAPES), 6, (0.1, 0.8))
    assert 0.35 <= min(shares) < 0.5


def test_colours_stand_out_from_what_they_cover(drawing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "texture", flat)
    rng = np.random.default_rng(0)
    stamp = drawing.rasterise(drawing.SHAPES["circle"], drawing.NO_HOLE, np.array([20.0, 60.0]), 10.0, 0.0)
    for _ in range(50):
        picture = drawing.texture(rng, SIZE, np.full(3, 128.0), contrast=0)
        drawing.paint(rng, picture, stamp)
        assert np.linalg.norm(picture[20, 60] - 128.0) >= 90


def test_every_shape_fills_the_unit_circle_and_no_more(tool: Any) -> None:
    extents = {name: float(np.linalg.norm(outline, axis=1).max()) for name, outline in tool.SHAPES.items()}
    assert extents == pytest.approx(dict.fromkeys(extents, 1), abs=0.01)


@pytest.mark.parametrize(("settings", "message"), INVALID.values(), ids=INVALID.keys())
def test_invalid_settings_are_refused_before_a_file_is_written(
    tool: Any, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make(tool, tmp_path / "set", **settings)
    assert not (tmp_path / "set").exists()


def test_a_data_set_is_replaced_only_when_told_to(tool: Any, tmp_path: Path) -> None:
    out = make(tool, tmp_path / "set", num_train=3)
    before = files_of(out)
    with pytest.raises(FileExistsError, match=r"already holds a data set \(annotations/, train/, val/\).*--overwrite"):
        make(tool, out, seed=1)
    assert files_of(out) == before
    make(tool, out, seed=1, num_train=2, overwrite=True)
    assert files_of(out) == files_of(make(tool, tmp_path / "fresh", seed=1, num_train=2))


def test_overwrite_spares_files_that_are_not_its_own(tool: Any, tmp_path: Path) -> None:
    photo = tmp_path / "train" / "000000000009.jpg"
    photo.parent.mkdir()
    photo.write_bytes(b"photo")
    make(tool, tmp_path, overwrite=True)
    assert photo.read_bytes() == b"photo"


def test_an_interrupted_run_leaves_no_annotations(tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = make(tool, tmp_path / "set")
    draw, calls = tool.draw_scene, []

    def stop(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return draw(*arguments)

    monkeypatch.setattr(tool, "draw_scene", stop)
    with pytest.raises(KeyboardInterrupt):
        make(tool, out, overwrite=True)
    assert sorted(files_of(out)) == ["train/000000.png", "train/000001.png", "train/000002.png"]


def test_the_command_makes_what_the_function_makes(tool: Any, tmp_path: Path) -> None:
    arguments = ["--images-train", "2", "--images-val", "1", "--image-size", "64", "80", "--shapes", "star, bar"]
    result = CliRunner().invoke(tool.app, ["--out", str(tmp_path / "a"), "--seed", "5", *arguments])
    assert result.exit_code == 0, result.output
    settings = {"num_train": 2, "num_val": 1, "image_size": (64, 80), "shapes": ["star", "bar"], "seed": 5}
    assert files_of(tmp_path / "a") == files_of(make(tool, tmp_path / "b", **settings))


def test_the_command_explains_what_it_refuses(tool: Any, tmp_path: Path) -> None:
    result = CliRunner().invoke(tool.app, ["--out", str(tmp_path / "a"), "--shapes", "hart"])
    assert result.exit_code == 2
    assert "did you mean 'heart'?" in result.output
