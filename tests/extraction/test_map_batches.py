"""The callable class of a Ray Data pipeline, without Ray."""

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import small_network

from backbone.extraction import FeatureExtractor, extract

IMAGES = [np.random.default_rng(n).integers(0, 256, (40 + 8 * (n % 2), 64, 3), dtype=np.uint8) for n in range(5)]


def column(*values: object) -> np.ndarray:
    """An array of objects, as Ray Data makes of images of several sizes."""
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def test_a_batch_gets_a_column_a_level_and_keeps_its_own() -> None:
    model = small_network()
    found = FeatureExtractor(model)({"image": column(*IMAGES), "id": np.arange(5)})
    assert found.keys() == {"image", "id", "c2", "c3", "note"}
    for result in extract(IMAGES, model, workers=0):
        assert result.features is not None
        assert torch.equal(torch.from_numpy(found["c3"][result.number]), result.features["c3"])


def test_a_row_that_fails_says_why_and_has_no_numbers() -> None:
    found = FeatureExtractor(small_network(), column="bytes")({"bytes": column(b"no photo", b"")})
    assert np.isnan(found["c3"]).all()
    assert list(found["note"]) == ["no kind of image is known to begin like this", "is empty"]


def test_maps_of_several_sizes_are_rows_of_their_own() -> None:
    found = FeatureExtractor("resnet18", pool="none", levels=["c5"])({"image": column(*IMAGES)})
    assert [row.shape for row in found["c5"]] == [(512, 2, 2)] * 5
    assert found["c5"].dtype == object


def test_vectors_of_bfloat16_are_refused() -> None:
    with pytest.raises(ValueError, match="numpy has no bfloat16"):
        FeatureExtractor(small_network(), store="bfloat16")  # type: ignore[arg-type]


def test_arrays_that_are_no_images_are_told() -> None:
    gray = np.asarray(Image.new("L", (8, 8)))
    found = FeatureExtractor(small_network())({"image": column(gray, IMAGES[0])})
    assert found["note"][0] == "an array must be (H, W, 3) of uint8, got uint8 (8, 8)"
