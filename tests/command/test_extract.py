"""``backbone extract`` on real folders: nested, with photos of one stem, in batches, in other formats and dtypes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from backbone.command.app import app
from backbone.command.feature_picture import pca_colours, principal_components
from backbone.command.photos import find_images, name_results
from backbone.extraction.pixels import MAX_ENLARGED_PIXELS, resize_image


def photo(path: Path, size: tuple[int, int] = (64, 48)) -> Path:
    """Write a photo of noise, width x height."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = sum(map(ord, path.name))
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest network: one map, C2."""
    file = tmp_path_factory.mktemp("recipe") / "small.yaml"
    file.write_text("name: resnet18\nnorm: bn\nout_features: [c2]")
    return file


def extract(recipe: Path, images: Path, out: Path, *arguments: object) -> Result:
    common = ["extract", "--config", recipe, "--images", images, "--out", out, "--no-picture"]
    return CliRunner().invoke(app, [str(each) for each in [*common, *arguments]])


def names_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_photos_of_one_stem_keep_their_suffix_and_the_others_do_not(recipe: Path, tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "b.png"):
        photo(tmp_path / "in" / name)
    result = extract(recipe, tmp_path / "in", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert names_in(tmp_path / "out") == ["a.jpg.safetensors", "a.png.safetensors", "b.safetensors"]


def test_nested_folders_are_kept(recipe: Path, tmp_path: Path) -> None:
    for name in ("a.png", "deep/a.png", "deep/er/b.png"):
        photo(tmp_path / "in" / name)
    extract(recipe, tmp_path / "in", tmp_path / "out", "--recursive")
    assert names_in(tmp_path / "out") == ["a.safetensors", "deep/a.safetensors", "deep/er/b.safetensors"]
    assert [path.name for path in find_images([tmp_path / "in"])] == ["a.png"]


def test_a_folder_of_folders_points_to_recursive(tmp_path: Path) -> None:
    photo(tmp_path / "in" / "deep" / "a.png")
    with pytest.raises(ValueError, match=r"holds no image .* or add --recursive"):
        find_images([tmp_path / "in"])


def test_photos_of_two_folders_that_would_be_one_file_are_refused_with_both_names(tmp_path: Path) -> None:
    first, second = photo(tmp_path / "x" / "a.png"), photo(tmp_path / "y" / "a.png")
    with pytest.raises(ValueError, match="would both be written as a") as error:
        name_results([first, second])
    assert str(first) in str(error.value)
    assert str(second) in str(error.value)


@pytest.mark.parametrize("batch", [2, 16])
def test_a_batch_gives_what_single_photos_give(recipe: Path, tmp_path: Path, batch: int) -> None:
    sizes = [(64, 48), (48, 64), (64, 48), (64, 48), (48, 64)]
    for number, size in enumerate(sizes):
        photo(tmp_path / "in" / f"{number}.png", size)
    (tmp_path / "in" / "5.png").write_text("no photo")
    assert extract(recipe, tmp_path / "in", tmp_path / "one").exit_code == 1
    assert extract(recipe, tmp_path / "in", tmp_path / "many", "--batch", batch).exit_code == 1
    for number in range(len(sizes)):
        one, many = (load_file(tmp_path / out / f"{number}.safetensors")["c2"] for out in ("one", "many"))
        torch.testing.assert_close(one, many, rtol=1e-5, atol=1e-5)


def test_every_format_holds_the_same_features_and_metadata(recipe: Path, tmp_path: Path) -> None:
    photo(tmp_path / "a.png")
    for kind in ("safetensors", "npz", "pt"):
        assert extract(recipe, tmp_path / "a.png", tmp_path, "--format", kind).exit_code == 0
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        expected, metadata = file.get_tensor("c2"), file.metadata()
    with np.load(tmp_path / "a.npz") as archive:
        features, told = archive["c2"], json.loads(str(archive["metadata"]))
    loaded = torch.load(tmp_path / "a.pt")
    assert np.array_equal(features, expected.numpy())
    assert torch.equal(loaded["features"]["c2"], expected)
    assert told == loaded["metadata"] == metadata


def test_metadata_say_what_the_features_are(recipe: Path, tmp_path: Path) -> None:
    photo(tmp_path / "a.png", (64, 48))
    extract(recipe, tmp_path / "a.png", tmp_path, "--shorter-side", 32)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        told = file.metadata()
    assert (told["network"], told["weights"], told["image"]) == ("resnet18", "random (seed 0)", "a.png")
    assert told["image_size"] == "32 43"
    assert json.loads(told["preprocessing"])["mean"] == [0.485, 0.456, 0.406]
    assert json.loads(told["strides"]) == {"c2": 4}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_stored_and_near_float32(recipe: Path, tmp_path: Path, dtype: str) -> None:
    photo(tmp_path / "a.png")
    extract(recipe, tmp_path / "a.png", tmp_path / "full")
    result = extract(recipe, tmp_path / "a.png", tmp_path / "half", "--dtype", dtype)
    assert result.exit_code == 0, result.output
    full, half = (load_file(tmp_path / out / "a.safetensors")["c2"] for out in ("full", "half"))
    assert half.dtype == getattr(torch, dtype)
    assert float((half.float() - full).norm() / full.norm()) < 0.03


def test_npz_of_bfloat16_is_refused(recipe: Path, tmp_path: Path) -> None:
    photo(tmp_path / "a.png")
    refused = extract(recipe, tmp_path / "a.png", tmp_path / "out", "--format", "npz", "--dtype", "bfloat16")
    assert (refused.exit_code, "npz has no bfloat16; use" in refused.stderr) == (2, True)


def test_without_a_picture_there_is_none(recipe: Path, tmp_path: Path) -> None:
    extract(recipe, photo(tmp_path / "a.png"), tmp_path / "out")
    assert names_in(tmp_path / "out") == ["a.safetensors"]


@pytest.mark.parametrize(
    ("size", "shorter", "longest", "expected"),
    [((1000, 2), 800, 1333, (1333, 3)), ((100, 50), 200, 300, (300, 150)), ((100, 50), 100, 300, (200, 100))],
)
def test_the_longer_side_has_a_limit(
    size: tuple[int, int], shorter: int, longest: int, expected: tuple[int, int]
) -> None:
    assert resize_image(Image.new("RGB", size), shorter, longest).size == expected


def test_an_absurd_enlargement_names_both_sizes(recipe: Path, tmp_path: Path) -> None:
    photo(tmp_path / "a.png", (1000, 2))
    refused = extract(recipe, tmp_path / "a.png", tmp_path / "out", "--shorter-side", 800)
    assert refused.exit_code == 1
    assert "a.png: resizing 1000 x 2 pixels (W x H) to a shorter side of 800 would make 400000 x 800" in refused.stderr
    assert "--max-size" in refused.stderr


def test_a_large_photo_may_shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backbone.extraction.pixels.MAX_ENLARGED_PIXELS", 100)
    assert MAX_ENLARGED_PIXELS > 100
    assert resize_image(Image.new("RGB", (400, 200)), 100).size == (200, 100)


@pytest.mark.parametrize("shape", [(2048, 5, 7), (8, 40, 50), (2, 3, 4), (700, 20, 20), (3, 1, 1)])
def test_components_are_those_of_a_singular_value_decomposition(shape: tuple[int, int, int]) -> None:
    """Also where a random projection finds them, in a map whose variance decays as those of trained networks do."""
    torch.manual_seed(0)
    channels, count = shape[0], shape[1] * shape[2]
    decay = torch.arange(1, min(channels, count) + 1) ** -1.0
    rows = (
        torch.linalg.qr(torch.randn(count, len(decay)))[0]
        * decay
        @ torch.linalg.qr(torch.randn(channels, len(decay)))[0].T
    )
    rows = rows - rows.mean(0)
    left, values, _ = torch.linalg.svd(rows.double(), full_matrices=False)
    found = principal_components(rows, 3)
    for number in range(min(3, (values > 1e-6).sum())):
        expected = left[:, number] * values[number]
        cosine = torch.nn.functional.cosine_similarity(found[:, number], expected, dim=0).abs()
        assert cosine > 0.999
        torch.testing.assert_close(found[:, number].norm(), expected.norm(), rtol=1e-3, atol=0)


def test_one_map_gives_one_picture() -> None:
    feature = torch.randn(400, 20, 25)
    first = pca_colours(feature)
    assert np.array_equal(first, pca_colours(feature))
    assert first.shape == (20, 25, 3)
    assert 0 <= first.min() < 0.05
    assert 0.95 < first.max() <= 1
