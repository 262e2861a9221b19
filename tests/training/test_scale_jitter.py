"""Large-scale jitter: objects stay with their pixels, whatever the size and the crop."""

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from runs import recipe
from torch import Tensor
from torchvision import tv_tensors

from backbone.recipe import DetectorConfig
from backbone.training.scale_jitter import jitter_scale

SIDE = 64
SEEDS = range(25)


def scene() -> tuple[tv_tensors.Image, dict[str, Any]]:
    """Two bright rectangles of different color on a dark image of 60 x 90 pixels, with masks and their centres."""
    image, masks = torch.zeros(3, 60, 90, dtype=torch.uint8), torch.zeros(2, 60, 90, dtype=torch.uint8)
    boxes = torch.tensor([[6.0, 6, 36, 30], [50, 20, 86, 56]])
    for number, (left, top, right, bottom) in enumerate(boxes.int().tolist()):
        image[number, top:bottom, left:right] = 255
        masks[number, top:bottom, left:right] = 1
    centres = torch.cat(((boxes[:, :2] + boxes[:, 2:]) / 2, torch.full((2, 1), 2.0)), 1)[:, None]
    target = {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(60, 90)),
        "labels": torch.tensor([1, 2]),
        "masks": tv_tensors.Mask(masks),
        "keypoints": centres,
    }
    return tv_tensors.Image(image), target


def jittered(seed: int, scale: tuple[float, float] = (0.2, 3.0)) -> tuple[Tensor, dict[str, Any]]:
    return jitter_scale(*scene(), np.random.default_rng(seed), scale, SIDE)


def visible_rectangle(image: Tensor, label: int) -> list[float]:
    """Where the object's color is, by its pixels."""
    rows, columns = (((image[label - 1] > 127) & (image[2 - label] < 64)).any(axis).nonzero() for axis in (1, 0))
    return [float(columns.min()), float(rows.min()), float(columns.max()) + 1, float(rows.max()) + 1]


@pytest.mark.parametrize("seed", SEEDS)
def test_boxes_masks_and_keypoints_lie_on_their_objects(seed: int) -> None:
    image, target = jittered(seed)
    assert image.shape == (3, SIDE, SIDE)
    count = len(target["labels"])
    assert [len(target[name]) for name in ("boxes", "masks", "keypoints")] == [count] * 3
    for number, label in enumerate(target["labels"].tolist()):
        box, (x, y, seen) = target["boxes"][number], target["keypoints"][number, 0].tolist()
        if (box[2:] - box[:2]).min() < 4:
            continue  # too little is left to see a color in
        seen_at = torch.tensor(visible_rectangle(image, label))
        torch.testing.assert_close(box.as_subclass(Tensor), seen_at, atol=2.0, rtol=0)
        mask = target["masks"][number].bool()
        assert image[label - 1][mask].float().mean() > 150
        if seen:
            assert box[0] - 1 <= x <= box[2] + 1
            assert box[1] - 1 <= y <= box[3] + 1
        else:
            assert (x, y) == (0, 0)


def test_objects_outside_of_the_crop_are_left_out() -> None:
    counts = {len(jittered(seed, (3.0, 3.0))[1]["labels"]) for seed in SEEDS}
    assert min(counts) < 2
    assert all((jittered(seed, (3.0, 3.0))[1]["boxes"][:, 2:] <= SIDE).all() for seed in SEEDS)


def test_a_small_image_is_padded_with_the_mean_color() -> None:
    image, target = jittered(0, (0.5, 0.5))
    assert image[:, -1, -1].tolist() == [124, 116, 104]
    assert len(target["labels"]) == 2


def test_the_scale_is_drawn_between_the_two_factors() -> None:
    widths = [float(jittered(seed, (0.5, 1.0))[1]["boxes"][1, 2]) * 90 / 86 / SIDE for seed in SEEDS]
    assert 0.49 < min(widths) < 0.65
    assert 0.85 < max(widths) < 1.01


def test_an_image_without_objects_stays_one() -> None:
    image, target = scene()
    empty = {"boxes": tv_tensors.wrap(target["boxes"][:0], like=target["boxes"]), "labels": target["labels"][:0]}
    assert jitter_scale(image, empty, np.random.default_rng(0), (0.1, 2.0), SIDE)[1]["boxes"].shape == (0, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"detector": "fcn", "pyramid": None}, "scale_jitter is for detectors, got fcn"),
        ({"min_size": [32, 64]}, "squares of one min_size"),
        ({"train": {"scale_jitter": [2.0, 0.1]}}, "the smaller factor and the larger one"),
        ({"train": {"scale_jitter": [0.1]}}, "must be null or two factors above 0"),
        ({"train": {"ema_decay": 1.0}}, "must be null or 0 to below 1"),
    ],
)
def test_jitter_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    settings = {**recipe("faster_rcnn", train={"scale_jitter": [0.1, 2.0]}), **change}
    if settings["pyramid"] is None:
        del settings["pyramid"], settings["rois_per_image"]
    with pytest.raises(ValidationError, match=message):
        DetectorConfig.model_validate(settings)
