"""Average precision of our pipeline against pycocotools on the annotation file as it is, with the same detections."""

import contextlib
import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from malformed import base, config_of, write_images
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from runs import IGNORED_WARNINGS
from torch import Tensor

from backbone.training.coco.annotations import read_annotations
from backbone.training.coco.data import CocoImages
from backbone.training.coco.metrics import OTHER_SIGMA, CocoMetrics

pytestmark = [pytest.mark.filterwarnings(each) for each in IGNORED_WARNINGS]

Content = dict[str, Any]


def areas(content: Content) -> None:
    for annotation, area in zip(content["annotations"], (0, 3.5, 1e10, 900, 9300), strict=True):
        annotation["area"] = area


def crowds(content: Content) -> None:
    content["annotations"][0]["iscrowd"] = 1
    content["annotations"][2]["iscrowd"] = 1


def unseen(content: Content) -> None:
    content["annotations"][0] |= {"keypoints": [0] * 6, "num_keypoints": 0}
    content["annotations"][3] |= {"keypoints": [2, 2, 0, 4, 4, 2], "num_keypoints": 1}


def empty_image(content: Content) -> None:
    content["annotations"] = [each for each in content["annotations"] if each["image_id"] != 2]


def empty_class(content: Content) -> None:
    for annotation in content["annotations"]:
        annotation["category_id"] = 1


VALID: dict[str, Callable[[Content], Any]] = {
    "as it is": lambda content: None,
    "crowds": crowds,
    "areas": areas,
    "unseen keypoints": unseen,
    "an image without objects": empty_image,
    "a class without objects": empty_class,
    "boxes over the edge": lambda content: content["annotations"][2].update(bbox=[-3.5, 2, 30, 9.25]),
    "ids in any order": lambda content: content["annotations"].reverse(),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("precision") / "data"
    write_images(data)
    return data


def whole(content: Content) -> Content:
    """Give every annotation what COCO's own files have, which pycocotools needs."""
    for annotation in content["annotations"]:
        seen = sum(visibility > 0 for visibility in annotation["keypoints"][2::3])
        width, height = annotation["bbox"][2:]
        annotation["num_keypoints"] = seen
        annotation.setdefault("iscrowd", 0)
        annotation.setdefault("area", width * height)
    return content


def detections(content: Content, seed: int) -> dict[int, dict[str, Tensor]]:
    """Return the objects of each image moved, some of another class, and some that are nowhere."""
    chance = np.random.default_rng(seed)
    found = {}
    for image in content["images"]:
        boxes = [a["bbox"] for a in content["annotations"] if a["image_id"] == image["id"]] + [[4, 4, 5, 5]]
        moved = np.array(boxes, float) + chance.uniform(-1, 1, (len(boxes), 4))
        corners = np.concatenate((moved[:, :2], moved[:, :2] + moved[:, 2:]), 1)
        masks = np.zeros((len(boxes), 1, 12, 16))
        for mask, (x, y, to_x, to_y) in zip(masks, corners.round().astype(int), strict=True):
            mask[0, max(y, 0) : to_y, max(x, 0) : to_x] = 1
        points = np.concatenate((chance.uniform(0, 12, (len(boxes), 2, 2)), np.ones((len(boxes), 2, 1))), 2)
        found[image["id"]] = {
            "boxes": torch.tensor(corners, dtype=torch.float32),
            "labels": torch.tensor(chance.integers(1, 3, len(boxes))),
            "scores": torch.tensor(chance.uniform(0, 1, len(boxes)), dtype=torch.float32),
            "masks": torch.tensor(masks, dtype=torch.float32),
            "keypoints": torch.tensor(points, dtype=torch.float32),
        }
    return found


def of_pycocotools(content: Content, found: dict[int, dict[str, Tensor]], kind: str) -> list[float]:
    """Return AP, AP50 and AP75 as pycocotools' own summary has them."""
    results = []
    for image_id, each in found.items():
        for number, label in enumerate(each["labels"].tolist()):
            x, y, to_x, to_y = each["boxes"][number].tolist()
            mask = np.asfortranarray(each["masks"][number, 0].numpy(), dtype=np.uint8)
            geometry: dict[str, Any] = {
                "bbox": {"bbox": [x, y, to_x - x, to_y - y]},
                "segm": {"segmentation": rle.encode(mask)},
                "keypoints": {"keypoints": each["keypoints"][number].flatten().tolist()},
            }[kind]
            score = float(each["scores"][number])
            results.append({"image_id": image_id, "category_id": label, "score": score, **geometry})
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy({**content, "info": {}})
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        if kind == "keypoints":
            evaluation.params.kpt_oks_sigmas = np.full(2, OTHER_SIGMA)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats[:3]]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("detector", "kind"), [("faster_rcnn", "bbox"), ("mask_rcnn", "segm"), ("keypoint_rcnn", "keypoints")]
)
@pytest.mark.parametrize("case", VALID)
def test_precision_is_that_of_pycocotools(case: str, detector: str, kind: str, seed: int, folder: Path) -> None:
    content = base(detector)
    VALID[case](content)
    content = whole(content)
    (folder / "annotations" / "train.json").write_text(json.dumps(content))
    annotations = read_annotations(folder, "train", config_of(detector))
    assert not annotations.skipped
    images = CocoImages(annotations, config_of(detector), train=False)
    metrics = CocoMetrics(images.coco, annotations.class_names, config_of(detector).detector)
    found = detections(content, seed)
    for image_id, each in found.items():
        metrics.add(image_id, each)
    prefix = "" if kind == "bbox" else f"{kind}/"
    measured = metrics.compute()
    assert measured == pytest.approx(metrics.compute(), nan_ok=True)  # as often as one likes
    ours = [measured[f"{prefix}{name}"] for name in ("AP", "AP50", "AP75")]
    theirs = of_pycocotools(content, found, kind)
    # pycocotools' summary takes 20 detections of an image for keypoints and 100 else; there are fewer here
    assert ours == pytest.approx([value if value >= 0 else float("nan") for value in theirs], abs=1e-9, nan_ok=True)
