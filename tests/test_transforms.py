"""Images as the weights expect them, from whatever a user has."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.models import ResNet18_Weights
from torchvision.transforms import v2

from backbone import Backbone, Preprocessing

ARRAY = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
TENSOR = torch.from_numpy(ARRAY).movedim(-1, 0)
KINDS: dict[str, Any] = {
    "PIL": Image.fromarray(ARRAY),
    "array": ARRAY,
    "uint8": TENSOR,
    "float": TENSOR / 255,
    "batch": torch.stack([TENSOR]),
}
REFUSED: list[tuple[Any, str]] = [
    (TENSOR * 1.0, "a float image must be of 0 to 1, got values up to 25[0-9]; divide by"),
    (TENSOR.movedim(0, -1), r"got \(48, 48, 3\); put its channels first: image.movedim\(-1, -3\)"),
    (TENSOR[:2], r"must be a tensor \(3, H, W\) or \(N, 3, H, W\), got \(2, 48, 48\)"),
    ("photo.jpg", "must be a PIL image, an array .* got str; give several as a list"),
    ([], "a list must hold one or more images"),
]


@pytest.fixture(scope="module")
def model() -> Backbone:
    return build("resnet18", out_features=["c2", "c5"])


@pytest.fixture(scope="module")
def expected() -> Tensor:
    prepare: Callable[[Any], Tensor] = ResNet18_Weights.IMAGENET1K_V1.transforms(crop_size=48, resize_size=48)
    return prepare(KINDS["PIL"])


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_becomes_torchvisions_numbers(model: Backbone, expected: Tensor, kind: str) -> None:
    actual = model.transforms()(KINDS[kind])
    assert type(actual) is Tensor
    assert torch.allclose(actual.reshape(expected.shape), expected, atol=1e-5)


def test_it_is_a_v2_transform_with_resizing(model: Backbone) -> None:
    prepare: Callable[[Any], Tensor] = ResNet18_Weights.IMAGENET1K_V1.transforms(crop_size=24, resize_size=24)
    transform = model.transforms(24)
    assert isinstance(transform, v2.Transform)
    assert torch.allclose(transform(KINDS["PIL"]), prepare(KINDS["PIL"]), atol=1e-5)
    assert model.transforms((10, 20))(KINDS["uint8"]).shape == (3, 10, 20)


def test_boxes_beside_the_image_are_resized_along(model: Backbone) -> None:
    boxes = tv_tensors.BoundingBoxes([[0, 0, 20, 40]], format="XYXY", canvas_size=(48, 48))
    _, resized = model.transforms(24)(KINDS["PIL"], boxes)
    assert resized.tolist() == [[0, 0, 10, 20]]


def test_list_of_different_sizes_is_padded_and_tells_the_sizes(model: Backbone) -> None:
    batch = model.transforms()([KINDS["PIL"], TENSOR[:, :20, :33]])
    assert batch.images.shape == (2, 3, 64, 64)
    assert batch.sizes == [(48, 48), (20, 33)]
    assert torch.equal(batch.images[1, :, :20, :33], model.transforms()(TENSOR[:, :20, :33]))
    assert not batch.images[1, :, 20:].any()
    assert set(model(batch.images)) == {"c2", "c5"}


def test_bgr_weights_of_0_to_255_get_what_caffe_gave_them() -> None:
    model = build("resnet18", out_features=["c2"])
    model.preprocessing = Preprocessing((103.53, 116.28, 123.675), (1.0, 1.0, 1.0), "bgr", (0.0, 255.0))
    wanted = TENSOR.flip(0).float() - torch.tensor(model.preprocessing.mean)[:, None, None]
    assert torch.allclose(model.transforms()(TENSOR), wanted, atol=1e-3)


@pytest.mark.parametrize(("channels", "mode"), [(1, "RGB"), (3, "L"), (3, "RGBA")])
def test_photo_gets_the_channels_of_the_network(channels: int, mode: str) -> None:
    transform = build("resnet18", in_channels=channels, out_features=["c2"]).transforms()
    assert transform(KINDS["PIL"].convert(mode)).shape == (channels, 48, 48)


def test_bands_beyond_rgb_are_normalised_in_turn() -> None:
    transform = build("resnet18", in_channels=5, out_features=["c2"]).transforms()
    assert torch.allclose(
        transform(torch.zeros(5, 4, 4))[:, 0, 0], torch.tensor([-2.1179, -2.0357, -1.8044, -2.1179, -2.0357]), atol=1e-3
    )
    with pytest.raises(ValueError, match="a PIL image has 1 or 3 channels, got one for a backbone of 5; give a tensor"):
        transform(KINDS["PIL"])


@pytest.mark.parametrize(("image", "message"), REFUSED)
def test_what_is_no_image_is_refused(model: Backbone, image: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.transforms()(image)


@pytest.mark.parametrize("resize", [0, (), (1, 2, 3), -5, "24"])
def test_resize_that_is_no_size_is_refused(model: Backbone, resize: Any) -> None:
    with pytest.raises(ValueError, match="resize must be a shorter side or"):
        model.transforms(resize)


def test_transform_is_small_and_follows_a_pyramids_backbone(model: Backbone) -> None:
    import pickle

    assert len(pickle.dumps(model.transforms())) < 10_000
