"""``backbone.extraction.extract``: features of images from Python."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import small_network, write_photos

from backbone.extraction import extract, list_images
from backbone.extraction.sources import Source


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [image.path for image in list_images([write_photos(tmp_path_factory.mktemp("data") / "photos", 12)])]


@pytest.mark.parametrize("workers", [0, 2])
def test_features_are_those_of_the_model(photos: list[str], workers: int) -> None:
    model = small_network()
    seen = set()
    for result in extract(photos, model, pool="none", workers=workers):
        seen.add(result.number)
        if result.number in (5,):
            assert (result.features, result.size) == (None, None)
            assert result.note == "no kind of image is known to begin like this"
            continue
        with Image.open(photos[result.number]) as photo, torch.no_grad():
            maps = model(model.transforms()(photo)[None])
            assert result.size == (photo.height, photo.width)
        assert result.features is not None
        for level, values in result.features.items():
            torch.testing.assert_close(values, maps[level][0], rtol=1e-4, atol=1e-5)
    assert seen == set(range(12))


def test_bgr_weights_get_their_order_and_range(photos: list[str]) -> None:
    from backbone import Preprocessing

    model = small_network()
    model.preprocessing = Preprocessing((103.5, 116.3, 123.7), (57.4, 57.1, 58.4), "bgr", (0.0, 255.0))
    (result,) = extract(photos[:1], model, pool="none", workers=0)
    with Image.open(photos[0]) as photo, torch.no_grad():
        expected = model(model.transforms()(photo)[None])["c3"][0]
    assert result.features is not None
    torch.testing.assert_close(result.features["c3"], expected, rtol=1e-4, atol=1e-5)


def test_images_and_arrays_in_memory_give_what_their_files_give(photos: list[str]) -> None:
    model = small_network()
    path = photos[0]
    with Image.open(path) as photo:
        photo.load()
    forms: list[Source] = [path, Path(path), photo, np.asarray(photo), Path(path).read_bytes()]
    results = sorted(extract(forms, model, batch=1, workers=0), key=lambda each: each.number)
    first = results[0].features
    assert first is not None
    assert all(each.features is not None and torch.equal(each.features["c3"], first["c3"]) for each in results)


def test_images_are_asked_for_little_ahead(photos: list[str]) -> None:
    asked = 0

    def endless() -> Iterator[str]:
        nonlocal asked
        while True:
            asked += 1
            yield photos[0]

    results = extract(endless(), small_network(), batch=2, workers=2)
    for _ in range(4):
        next(results)
    assert asked < 30


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"levels": ["c6"]}, "unknown level 'c6'"),
        ({"pool": "max"}, "pool must be none, avg or gem, got 'max'"),
        ({"batch": 0}, "batch must be a whole number of 1 or more, or auto, got 0"),
        ({"workers": -1}, "workers must be a whole number of 0 or more, or auto, got -1"),
    ],
)
def test_wrong_settings_are_refused_at_once(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        extract([], small_network(), **settings)  # type: ignore[arg-type]


def test_a_gray_network_is_refused() -> None:
    from backbone import build_backbone

    with pytest.raises(ValueError, match="in_channels must be 3, got 1"):
        extract([], build_backbone("resnet18", in_channels=1))
