"""Detectors of torchvision prepare images as the backbone's weights expect them, or say that they do not."""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import build
from torch import Tensor
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet

from backbone import Backbone, FeaturePyramid, Preprocessing, load_weights, optimize_for_inference
from backbone.hosts.torchvision import as_torchvision, build_detector, detector_kwargs, torchvision_transform

HALF = Preprocessing((0.5,) * 3, (0.5,) * 3)
BGR = Preprocessing((103.53, 116.28, 123.675), (1.0, 1.0, 1.0), "bgr", (0.0, 255.0))
SIZE: dict[str, Any] = {"min_size": 64, "max_size": 64}
IMAGES = [torch.rand(3, 64, 64)]


def pyramid(expected: Preprocessing | None = None) -> FeaturePyramid:
    body = build("resnet18")
    if expected is not None:
        body.preprocessing = expected
    return FeaturePyramid(body, out_channels=16, extra_levels="maxpool")


def faster(model: Backbone, **settings: Any) -> Any:
    return FasterRCNN(as_torchvision(model), num_classes=2, **SIZE, **settings).eval()


def seen_by(detector: Any) -> Tensor:
    """Return the images as the backbone gets them."""
    taken: list[Tensor] = []
    detector.backbone.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
    detector(IMAGES)
    return taken[0]


def wanted(expected: Preprocessing) -> Tensor:
    mean, std = (torch.tensor(v)[:, None, None] for v in (expected.mean, expected.std))
    image = IMAGES[0].flip(0) if expected.channel_order == "bgr" else IMAGES[0]
    return ((image * expected.value_range[1] - mean) / std)[None]


CONTRADICTIONS: dict[str, tuple[Callable[[], Any], str]] = {
    "other statistics": (lambda: faster(pyramid(HALF)), r"expect RGB, mean \(0.5, 0.5, 0.5\)"),
    "BGR": (lambda: faster(pyramid(BGR)), "expect BGR"),
    "a bare pyramid": (lambda: RetinaNet(pyramid(HALF), 2, **SIZE).eval(), "RetinaNet prepares images as RGB"),
    "a mask model": (lambda: MaskRCNN(as_torchvision(pyramid(HALF)), 2, **SIZE).eval(), "MaskRCNN prepares"),
}
AGREEMENTS: dict[str, Callable[[], Any]] = {
    "nothing known": lambda: faster(pyramid(), image_mean=[0.0] * 3, image_std=[1.0] * 3),
    "torchvision's own": lambda: faster(pyramid(Preprocessing())),
    "detector_kwargs": lambda: faster(pyramid(HALF), **detector_kwargs(pyramid(HALF))),
    "build_detector": lambda: build_detector("faster_rcnn", pyramid(BGR), num_classes=2, **SIZE).eval(),
    "the recipe's own": lambda: build_detector(
        "faster_rcnn", pyramid(HALF), num_classes=2, image_mean=[0, 0, 0], image_std=[1, 1, 1], **SIZE
    ).eval(),
}


@pytest.mark.parametrize(("make", "message"), CONTRADICTIONS.values(), ids=list(CONTRADICTIONS))
def test_contradiction_is_said_once_with_the_remedy(make: Callable[[], Any], message: str) -> None:
    detector = make()
    with pytest.warns(UserWarning, match=rf"{message}.*set detector.transform = torchvision_transform\(model\)"):
        detector(IMAGES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detector(IMAGES)
    assert not detector.backbone._forward_pre_hooks


@pytest.mark.parametrize("make", AGREEMENTS.values(), ids=list(AGREEMENTS))
def test_agreement_is_silent(make: Callable[[], Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make()(IMAGES)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copy_says_it_too(copied: Callable[[Any], Any]) -> None:
    with pytest.warns(UserWarning, match="prepares images"):
        copied(faster(pyramid(HALF)))(IMAGES)


def test_calls_by_anybody_else_leave_the_question_open() -> None:
    detector = faster(pyramid(HALF))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detector.backbone(torch.stack(IMAGES))
    with pytest.warns(UserWarning, match="prepares images"):
        detector(IMAGES)


@pytest.mark.parametrize("expected", [HALF, BGR, Preprocessing()], ids=["half", "bgr", "imagenet"])
def test_transform_gives_what_the_weights_expect(expected: Preprocessing) -> None:
    model = pyramid(expected)
    detector = faster(model)
    detector.transform = torchvision_transform(model, **SIZE)
    assert torch.allclose(seen_by(detector), wanted(expected), atol=1e-3)


def test_weights_loaded_later_count() -> None:
    detector: Any = build_detector("faster_rcnn", "resnet18", num_classes=2, **SIZE).eval()
    detector.backbone.body.preprocessing = BGR
    assert torch.allclose(seen_by(detector), wanted(BGR), atol=1e-3)
    load_weights(detector, build("resnet18").state_dict())
    assert torch.allclose(seen_by(detector), wanted(Preprocessing()), atol=1e-5)


def test_copies_of_a_detector_follow_their_own_backbone() -> None:
    detector: Any = build_detector("faster_rcnn", "resnet18", num_classes=2, **SIZE).eval()
    other = copy.deepcopy(detector)
    other.backbone.body.preprocessing = HALF
    assert (detector.transform.image_mean[0], other.transform.image_mean[0]) == (0.485, 0.5)
    fast: Any = optimize_for_inference(other)
    assert fast.transform.image_mean[0] == 0.5
    assert len(detector.state_dict()) == len({key for key in detector.state_dict() if not key.startswith("transform")})


def test_keywords_cannot_say_bgr() -> None:
    with pytest.raises(
        ValueError, match=r"got weights that expect BGR; set detector.transform = torchvision_transform"
    ):
        detector_kwargs(pyramid(BGR))


def test_pyramid_in_place_of_the_wrapper_is_refused_each_time() -> None:
    detector = FasterRCNN(pyramid(), num_classes=2, **SIZE).eval()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"got p2, p3, p4, p5, p6; build it as FasterRCNN\(as_torchvision"):
            detector(IMAGES)


def test_pyramid_that_a_detector_reads_by_its_own_names_works() -> None:
    from torchvision.ops import MultiScaleRoIAlign

    pool = MultiScaleRoIAlign(["p2", "p3", "p4", "p5"], output_size=7, sampling_ratio=2)
    assert FasterRCNN(pyramid(), num_classes=2, box_roi_pool=pool, **SIZE).eval()(IMAGES)
    assert FCOS(FeaturePyramid(build("resnet18"), out_channels=32, extra_levels="maxpool"), 2, **SIZE).eval()
