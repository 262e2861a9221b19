"""The installed command: describe's numbers, extract's files, and what a user reads when something is wrong."""

import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from backbone import Backbone, BackboneConfig, Features, Preprocessing, build_backbone, list_backbones
from backbone.command.app import app
from backbone.command.description import describe
from backbone.command.extraction import extract_features, read_image
from backbone.command.photos import find_images

ROOT = Path(__file__).parents[2]

# Deep Residual Learning, table 1 (v1 strides in the 1x1, v1.5 in the 3x3), and torchvision's parameters.
# The paper cuts its decimals off and leaves out the classifier and shortcuts: up to 0.07 is explained by that.
PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
}
GIGAFLOPS: list[tuple[str, bool, float]] = [
    ("resnet18", False, 1.8),
    ("resnet34", False, 3.6),
    ("resnet50", True, 3.8),
    ("resnet50", False, 4.1),
    ("resnet101", True, 7.6),
    ("resnet152", True, 11.3),
]
GIGAFLOPS_TOLERANCE = 0.07

# Mode of a photo -> how it is saved.
PHOTO_MODES = {"L": "png", "LA": "png", "RGBA": "png", "P": "png", "1": "png", "RGB": "jpg", "CMYK": "jpg"}

# Command line after `extract --images PHOTO --out OUT`, with {} for the test's folder -> what the error must say.
BAD_SETTINGS: dict[str, tuple[list[str], list[str]]] = {
    "no backbone": ([], ["exactly one of --config FILE and --name NAME"]),
    "two backbones": (["--name", "resnet18", "--config", "{}/good.yaml"], ["exactly one of --config"]),
    "unknown name": (["--name", "resnet19"], ["unknown backbone 'resnet19'", "did you mean 'resnet18'"]),
    "empty name": (["--name", ""], ["name", "resnet50"]),
    "missing config": (["--config", "{}/nowhere.yaml"], ["nowhere.yaml", "existing YAML file"]),
    "misspelt key": (["--config", "{}/misspelt.yaml"], ["misspelt.yaml", "'freez_at'", "did you mean 'freeze_at'"]),
    "freeze_at 6": (["--config", "{}/freeze.yaml"], ["freeze.yaml", "freeze_at must be 0 to 5", "got 6"]),
    "output_stride 12": (
        ["--config", "{}/stride.yaml"],
        ["stride.yaml", "output_stride must be 32, 16 or 8", "got 12"],
    ),
    "stride_in_1x1 on resnet18": (["--config", "{}/caffe.yaml"], ["stride_in_1x1 must be false", "resnet18"]),
    "grey network": (["--config", "{}/grey.yaml"], ["in_channels must be 3", "got 1"]),
    "missing weights": (["--name", "resnet18", "--weights", "{}/nowhere.pth"], ["nowhere.pth", "existing file"]),
    "weights by a wrong name": (["--name", "resnet18", "--weights", "IMAGENET"], ["IMAGENET1K_V1", "got 'IMAGENET'"]),
    "truncated .pth": (["--name", "resnet18", "--weights", "{}/cut.pth"], ["cut.pth", "truncated"]),
    "truncated .safetensors": (
        ["--name", "resnet18", "--weights", "{}/cut.safetensors"],
        ["cut.safetensors", "truncat"],
    ),
    "another depth": (["--name", "resnet18", "--weights", "{}/deeper.pth"], ["deeper.pth", "missing", "unexpected"]),
    "pickle with code": (["--name", "resnet18", "--weights", "{}/code.pth"], ["code.pth", "refused"]),
}
RECIPES = {
    "good": "name: resnet18\nnorm: bn",
    "misspelt": "name: resnet18\nfreez_at: 2",
    "freeze": "name: resnet18\nfreeze_at: 6",
    "stride": "name: resnet18\noutput_stride: 12",
    "caffe": "name: resnet18\nstride_in_1x1: true",
    "grey": "name: resnet18\nin_channels: 1",
}


class Payload:
    """A pickle that makes a folder when it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def command(*arguments: object) -> Result:
    """Run the command in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def words(text: str) -> str:
    return " ".join(text.split())


def photo(path: Path, mode: str = "RGB", size: tuple[int, int] = (64, 48), **options: Any) -> Path:
    """Write a photo of noise, width x height."""
    width, height = size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    if mode in ("LA", "RGBA"):
        image.putalpha(128)
    image.convert(mode).save(path, **options)
    return path


def rotated_photo(path: Path) -> Path:
    """Write a photo of 64 x 48 pixels that a camera marked as lying on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return photo(path, exif=exif)


# list


def test_list_prints_every_name_on_a_line_of_its_own() -> None:
    assert command("list").stdout.split("\n") == [*list_backbones(), ""]


def test_list_keeps_to_the_pattern() -> None:
    assert command("list", "resnext50*").stdout == "resnext50_32x4d\n"


def test_list_without_a_match_fails_and_says_so() -> None:
    result = command("list", "vgg*")
    assert (result.exit_code, "no backbone matches 'vgg*'" in result.stderr) == (2, True)


# describe


@pytest.mark.parametrize(("name", "parameters"), PARAMETERS.items())
def test_parameters_with_the_classifier_are_the_published_ones(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = build_backbone(BackboneConfig(name=name, norm="bn", num_classes=1000))
    assert describe(model, (64, 64)).parameters == parameters


@pytest.mark.parametrize(("name", "stride_in_1x1", "expected"), GIGAFLOPS)
def test_gigaflops_agree_with_the_papers_table(name: str, stride_in_1x1: bool, expected: float) -> None:
    with torch.device("meta"):
        model = build_backbone(BackboneConfig(name=name, norm="bn", num_classes=1000, stride_in_1x1=stride_in_1x1))
    assert describe(model, (224, 224)).multiply_adds / 1e9 == pytest.approx(expected, abs=GIGAFLOPS_TOLERANCE)


def test_multiply_adds_are_those_counted_by_hand() -> None:
    with torch.device("meta"):
        model = build_backbone(BackboneConfig(name="resnet18", norm="bn", out_features=("c2",)))
    stem, c2 = describe(model, (64, 64)).stages
    by_hand = (32 * 32 * 64 * 3 * 7 * 7, 4 * 16 * 16 * 64 * 64 * 3 * 3)
    assert (stem.multiply_adds, c2.multiply_adds) == by_hand


def test_megabytes_count_parameters_and_buffers() -> None:
    with torch.device("meta"):
        model = build_backbone(BackboneConfig(name="resnet18", norm="bn", num_classes=1000))
    statistics = 2 * 4 * 4800 + 20 * 8  # mean and variance of 4800 channels in float32, 20 counters in int64
    assert describe(model, (64, 64)).megabytes == pytest.approx((11_689_512 * 4 + statistics) / 1e6)


@pytest.mark.parametrize("size", [(224, 224), (33, 33), (1, 1), (32, 32), (257, 333), (40, 1000)])
def test_strides_are_the_networks_whatever_the_image(size: tuple[int, int]) -> None:
    with torch.device("meta"):
        model = build_backbone(BackboneConfig(name="resnet18", norm="bn", output_stride=16))
    model.eval()
    assert [stage.stride for stage in describe(model, size).stages] == [4, 4, 8, 16, 16]


def test_stages_that_are_no_outputs_have_their_strides_too() -> None:
    with torch.device("meta"):
        model = build_backbone(BackboneConfig(name="resnet18", norm="bn", out_features=("c5",), output_stride=16))
    assert [stage.stride for stage in describe(model, (1, 1)).stages] == [4, 4, 8, 16, 16]


def test_sizes_round_up() -> None:
    with torch.device("meta"):
        model = build_backbone(BackboneConfig(name="resnet18", norm="bn"))
    assert [stage.size for stage in describe(model, (257, 333)).stages[1:]] == [(65, 84), (33, 42), (17, 21), (9, 11)]


def test_smallest_image_is_described_with_trained_norms() -> None:
    with torch.device("meta"):
        model = build_backbone(BackboneConfig(name="resnet18", norm="bn"))
    assert describe(model, (1, 1)).stages[-1].size == (1, 1)


def test_describing_moves_no_statistics() -> None:
    model = build_backbone(BackboneConfig(name="resnet18", norm="bn", out_features=("c2",)))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    describe(model, (64, 64))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("training", [True, False])
def test_describing_leaves_the_mode_as_it_was(training: bool) -> None:
    with torch.device("meta"):
        model = build_backbone(BackboneConfig(name="resnet18", norm="bn", out_features=("c2",)))
    model.train(training)
    describe(model, (64, 64))
    assert {module.training for module in model.modules()} == {training}


def test_describe_shows_a_row_per_stage() -> None:
    rows = re.findall(r"^ *(stem|c\d) .*", command("describe", "resnet18").stdout, flags=re.MULTILINE)
    assert rows == ["stem", "c2", "c3", "c4", "c5"]


def test_describe_shows_blocks_channels_stride_dilation_size_parameters_flops_and_frozen(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("name: resnet18\nnorm: bn\noutput_stride: 16\nfreeze_at: 1")
    rows = [line.split() for line in command("describe", tmp_path / "r.yaml").stdout.splitlines()]
    c5 = 14 * 14 * (512 * 256 * 9 + 3 * 512 * 512 * 9 + 512 * 256) / 1e9
    assert ["c5", "2", "512", "16", "1,", "2", "14x14", "8,393,728", f"{c5:.2f}", "no"] in rows


def test_describe_says_which_stages_are_frozen(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("name: resnet18\nnorm: bn\nfreeze_at: 2")
    stdout = command("describe", tmp_path / "r.yaml").stdout
    assert re.findall(r"^ *(?:stem|c\d) .*(yes|no) *$", stdout, flags=re.MULTILINE) == ["yes", "yes", "no", "no", "no"]


def test_describe_totals_add_up_with_the_classifier(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("name: resnet18\nnum_classes: 1000")
    total = next(line for line in command("describe", tmp_path / "r.yaml").stdout.splitlines() if "total" in line)
    assert total.split() == ["total", "11,689,512", "1.81"]


def test_describe_gives_the_models_size() -> None:
    assert "44.7 MB" in command("describe", "resnet18").stdout


def test_describe_takes_height_before_width() -> None:
    assert "16x32" in command("describe", "resnet18", "--image-size", 64, 128).stdout


def test_describe_takes_a_recipe_with_trained_norms_and_a_small_image() -> None:
    result = command("describe", ROOT / "configs" / "demo.yaml", "--image-size", 32, 32)
    assert result.exit_code == 0, result.output


def test_describe_needs_no_weights(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"name: resnet18\nweights: {tmp_path}/nowhere.pth")
    assert command("describe", tmp_path / "r.yaml").exit_code == 0


def test_describe_is_not_cut_off_at_eighty_columns() -> None:
    stdout = command("describe", "wide_resnet101_2", "--image-size", 2160, 3840).stdout
    assert ("…" not in stdout, "124,837,696" in stdout) == (True, True)


@pytest.mark.parametrize(
    ("arguments", "piece"),
    [
        (["resnet52"], "unknown backbone 'resnet52'; did you mean"),
        (["nowhere.yaml"], "must be an existing YAML file"),
        (["resnet18", "--image-size", "0", "5"], "--image-size"),
        (["resnet18", "--image-size", "5"], "--image-size"),
    ],
)
def test_describe_refuses_bad_arguments_with_one_message(arguments: list[str], piece: str) -> None:
    result = command("describe", *arguments)
    assert (result.exit_code, piece in result.stderr, result.stdout) == (2, True, ""), result.output


# extract: one run over good photos with a text file among them


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    state = build_backbone(BackboneConfig(name="resnet18", norm="bn")).state_dict()
    generator = torch.Generator().manual_seed(0)
    for key, value in state.items():
        if key.endswith("running_mean"):
            value.copy_(0.2 * torch.rand(value.shape, generator=generator) - 0.1)
        if key.endswith("running_var"):
            value.copy_(0.5 + torch.rand(value.shape, generator=generator))
    return state


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, weights: dict[str, Tensor]) -> Path:
    """Photos, recipes and checkpoints, good and bad; to be read only."""
    folder = tmp_path_factory.mktemp("inputs")
    for name, text in RECIPES.items():
        (folder / f"{name}.yaml").write_text(text)
    (folder / "small.yaml").write_text("name: resnet18\nnorm: bn\nout_features: [c3]")
    photo(folder / "photo.png")
    save_file(weights, folder / "weights.safetensors")
    save_file(weights, folder / "cut.safetensors")
    torch.save(weights, folder / "cut.pth")
    for cut in (folder / "cut.safetensors", folder / "cut.pth"):
        os.truncate(cut, cut.stat().st_size // 2)
    deeper = build_backbone(BackboneConfig(name="resnet34", norm="bn", out_features=("c2",)))
    torch.save(deeper.state_dict(), folder / "deeper.pth")
    torch.save({"conv1.weight": Payload(folder / "ran")}, folder / "code.pth")
    return folder


@pytest.fixture(scope="module")
def extracted(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    photos = tmp_path_factory.mktemp("photos")
    photo(photos / "a_colour.jpg")
    (photos / "b_text.jpg").write_text("this is no photo")
    rotated_photo(photos / "c_rotated.jpg")
    out = photos / "deep" / "out"
    arguments = ["--name", "resnet18", "--weights", inputs / "weights.safetensors"]
    return command("extract", *arguments, "--images", photos, "--out", out), out


def test_text_among_photos_makes_the_exit_code_one(extracted: tuple[Result, Path]) -> None:
    assert extracted[0].exit_code == 1, extracted[0].output


def test_text_among_photos_is_named(extracted: tuple[Result, Path]) -> None:
    assert re.search(r"error: \S*/b_text\.jpg: cannot be read as an image", extracted[0].stderr)


def test_the_number_of_failures_is_told(extracted: tuple[Result, Path]) -> None:
    assert "1 of 3 images failed" in extracted[0].stderr


def test_other_photos_finish_and_nothing_else_is_written(extracted: tuple[Result, Path]) -> None:
    files = {path.name for path in extracted[1].iterdir()}
    assert files == {f"{stem}.{kind}" for stem in ("a_colour", "c_rotated") for kind in ("safetensors", "png")}


def test_stdout_is_the_paths_that_were_written(extracted: tuple[Result, Path]) -> None:
    result, out = extracted
    assert sorted(result.stdout.splitlines()) == sorted(str(path) for path in out.iterdir())


def test_features_have_the_shapes_of_the_specs(extracted: tuple[Result, Path]) -> None:
    shapes = {name: tuple(value.shape) for name, value in load_file(extracted[1] / "a_colour.safetensors").items()}
    expected = {"c2": (1, 64, 12, 16), "c3": (1, 128, 6, 8), "c4": (1, 256, 3, 4), "c5": (1, 512, 2, 2)}
    assert shapes == expected


def test_features_of_a_photo_on_its_side_are_upright(extracted: tuple[Result, Path]) -> None:
    assert load_file(extracted[1] / "c_rotated.safetensors")["c2"].shape[2:] == (16, 12)


def test_features_are_float32(extracted: tuple[Result, Path]) -> None:
    assert {value.dtype for value in load_file(extracted[1] / "a_colour.safetensors").values()} == {torch.float32}


def test_features_equal_a_forward_by_hand(extracted: tuple[Result, Path], weights: dict[str, Tensor]) -> None:
    _, out = extracted
    model = build_backbone(BackboneConfig(name="resnet18", norm="bn"))
    model.load_state_dict(weights)
    pixels = np.asarray(Image.open(out.parent.parent / "a_colour.jpg")).astype(np.float32) / 255
    normalised = (pixels - np.array([0.485, 0.456, 0.406], np.float32)) / np.array([0.229, 0.224, 0.225], np.float32)
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(normalised).permute(2, 0, 1)[None])
    features = load_file(out / "a_colour.safetensors")
    errors = [float((features[name] - expected[name]).norm() / expected[name].norm()) for name in expected]
    assert max(errors) <= 1e-5


def test_picture_opens_with_a_size_for_a_screen(extracted: tuple[Result, Path]) -> None:
    with Image.open(extracted[1] / "a_colour.png") as picture:
        picture.load()
        width, height = picture.size
    assert (1000 <= width <= 5000, 200 <= height <= 2000) == (True, True), (width, height)


def test_picture_shows_more_than_its_background(extracted: tuple[Result, Path]) -> None:
    with Image.open(extracted[1] / "a_colour.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 1000


def test_results_can_be_read_by_whoever_reads_the_folder(extracted: tuple[Result, Path]) -> None:
    modes = {path.suffix: path.stat().st_mode & 0o777 for path in extracted[1].glob("a_colour.*")}
    assert modes[".safetensors"] == modes[".png"]


# extract: its options


def extract(inputs: Path, out: Path, *arguments: object) -> Result:
    """Run extract with the smallest network: one map, C3."""
    return command("extract", "--config", inputs / "small.yaml", "--out", out, *arguments)


def test_only_the_features_asked_for_are_written(inputs: Path, tmp_path: Path) -> None:
    extract(inputs, tmp_path, "--images", inputs / "photo.png")
    assert list(load_file(tmp_path / "photo.safetensors")) == ["c3"]


@pytest.mark.parametrize(("size", "expected"), [((64, 48), (4, 6)), ((48, 64), (6, 4))])
def test_shorter_side_sets_the_shorter_side(
    inputs: Path, tmp_path: Path, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    photo(tmp_path / "a.png", size=size)
    extract(inputs, tmp_path / "out", "--images", tmp_path / "a.png", "--shorter-side", 32)
    assert load_file(tmp_path / "out" / "a.safetensors")["c3"].shape[2:] == expected


def test_same_seed_gives_the_same_random_network(inputs: Path, tmp_path: Path) -> None:
    for out in ("first", "second"):
        extract(inputs, tmp_path / out, "--images", inputs / "photo.png")
    first, second = (load_file(tmp_path / out / "photo.safetensors")["c3"] for out in ("first", "second"))
    assert torch.equal(first, second)


def test_random_weights_are_pointed_out(inputs: Path, tmp_path: Path) -> None:
    said = extract(inputs, tmp_path, "--images", inputs / "photo.png").stderr
    assert "random weights (seed 0); for meaning, add --weights IMAGENET1K_V1\n" in said  # resnet18 has no V2


def test_several_photos_may_follow_images(inputs: Path, tmp_path: Path) -> None:
    photos = [photo(tmp_path / name) for name in ("a.png", "b.png", "c.png")]
    extract(inputs, tmp_path / "out", "--images", *photos)
    assert sorted(path.stem for path in (tmp_path / "out").glob("*.safetensors")) == ["a", "b", "c"]


@pytest.mark.parametrize("name", ["a[final].png", "a :smile: b.png", "ä.b.png"])
def test_written_path_is_printed_letter_by_letter(inputs: Path, tmp_path: Path, name: str) -> None:
    result = extract(inputs, tmp_path / "out", "--images", photo(tmp_path / name))
    assert result.stdout.splitlines()[-1] == str(tmp_path / "out" / name), result.output


@pytest.mark.parametrize("name", ["a[final].png", "a :smile: b.png"])
def test_unreadable_photo_is_named_letter_by_letter(inputs: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("no photo")
    assert f"{path}: cannot be read" in extract(inputs, tmp_path / "out", "--images", path).stderr


def test_folder_with_a_closing_tag_in_its_name_breaks_nothing(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "a[").mkdir()
    broken = tmp_path / "a[" / "b].png"  # together: the markup [/b]
    broken.write_text("no photo")
    result = extract(inputs, tmp_path / "out", "--images", broken)
    assert isinstance(result.exception, SystemExit), result.exception


def test_very_tall_photo_gives_a_picture_for_a_screen(inputs: Path, tmp_path: Path) -> None:
    photo(tmp_path / "tall.png", size=(4, 120))
    extract(inputs, tmp_path / "out", "--images", tmp_path / "tall.png")
    with Image.open(tmp_path / "out" / "tall.png") as picture:
        assert max(picture.size) <= 10_000


def test_photos_own_file_is_never_overwritten(inputs: Path, tmp_path: Path) -> None:
    original = photo(tmp_path / "photo.png").read_bytes()
    extract(inputs, tmp_path, "--images", tmp_path / "photo.png")  # the picture of photo.png is OUT/photo.png
    assert (tmp_path / "photo.png").read_bytes() == original


@pytest.fixture
def almost_full_disk() -> Iterator[None]:
    """Let no file grow beyond 20,000 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("almost_full_disk")
def test_photo_whose_features_do_not_fit_on_the_disk_is_named(inputs: Path, tmp_path: Path) -> None:
    result = extract(inputs, tmp_path, "--images", inputs / "photo.png")
    assert (result.exit_code, "photo.png" in result.stderr) == (1, True), repr(result.exception)


@pytest.mark.usefixtures("almost_full_disk")
def test_full_disk_leaves_nothing_half_written(inputs: Path, tmp_path: Path) -> None:
    extract(inputs, tmp_path, "--images", inputs / "photo.png")
    assert list(tmp_path.iterdir()) == []


def test_photo_without_its_picture_leaves_no_features_either(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "photo.png").mkdir()  # the picture cannot be written
    extract(inputs, tmp_path, "--images", inputs / "photo.png")
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]


OUT_OF_MEMORY = "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory"


@pytest.mark.parametrize(
    ("error", "piece"),
    [
        (RuntimeError(OUT_OF_MEMORY), "can't allocate memory"),
        (MemoryError(), "MemoryError"),
        (torch.linalg.LinAlgError("the algorithm failed to converge"), "failed to converge"),  # type: ignore[attr-defined]
    ],
    ids=["torch out of memory", "Python out of memory", "no eigenvectors"],
)
def test_photo_that_cannot_be_computed_is_named_and_the_others_finish(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, piece: str
) -> None:
    def extract_small_ones(
        backbone: nn.Module, images: Sequence[Image.Image], preprocessing: Preprocessing
    ) -> list[Features]:
        if images[0].width > 64:
            raise error
        return extract_features(backbone, images, preprocessing)

    monkeypatch.setattr("backbone.command.extract.extract_features", extract_small_ones)
    photos = [photo(tmp_path / "a.png"), photo(tmp_path / "b.png", size=(65, 48)), photo(tmp_path / "c.png")]
    result = extract(inputs, tmp_path / "out", "--images", *photos)
    said = re.search(rf"error: {re.escape(str(photos[1]))}: .*{piece}", result.stderr)
    written = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert (result.exit_code, bool(said), written) == (1, True, ["a.png", "c.png"]), result.output


def test_chatter_while_building_stays_out_of_stdout(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build_like_torch_hub(config: BackboneConfig) -> Backbone:
        sys.stdout.write("Downloading: weights")
        return build_backbone(config)

    monkeypatch.setattr("backbone.command.terminal.build_backbone", build_like_torch_hub)
    result = extract(inputs, tmp_path, "--images", inputs / "photo.png")
    said = "Downloading: weights" in result.stderr
    written = [str(tmp_path / f"photo.{kind}") for kind in ("safetensors", "png")]
    assert (result.stdout.splitlines(), said) == (written, True)


# extract: bad input


@pytest.mark.parametrize(("arguments", "pieces"), BAD_SETTINGS.values(), ids=list(BAD_SETTINGS))
def test_bad_setting_is_one_message_and_no_file(
    inputs: Path, tmp_path: Path, arguments: list[str], pieces: list[str]
) -> None:
    filled = [argument.format(inputs) for argument in arguments]
    result = command("extract", "--images", inputs / "photo.png", "--out", tmp_path / "out", *filled)
    said = [piece for piece in pieces if piece in words(result.stderr)]
    assert (result.exit_code, said, list(tmp_path.glob("out/*"))) == (2, pieces, []), result.output


def test_code_in_a_checkpoint_is_not_run(inputs: Path, tmp_path: Path) -> None:
    arguments = ["--name", "resnet18", "--weights", inputs / "code.pth"]
    command("extract", *arguments, "--images", inputs / "photo.png", "--out", tmp_path / "out")
    assert not (inputs / "ran").exists()


def test_photo_in_the_way_of_its_picture_is_named_before_anything_is_written(inputs: Path, tmp_path: Path) -> None:
    photos = [photo(tmp_path / "a.jpg"), photo(tmp_path / "b.png")]
    result = extract(inputs, tmp_path, "--images", *photos)
    said = f"{photos[1]} is a photo, and its picture would replace it" in result.stderr
    assert (result.exit_code, said, sorted(tmp_path.iterdir())) == (2, True, photos), result.output


def test_failed_start_leaves_no_folder_behind(inputs: Path, tmp_path: Path) -> None:
    arguments = ["--name", "resnet18", "--weights", inputs / "cut.pth"]
    command("extract", *arguments, "--images", inputs / "photo.png", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_cuda_that_is_not_there_is_refused(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = extract(inputs, tmp_path / "out", "--images", inputs / "photo.png", "--device", "cuda")
    said = "--device cuda needs a CUDA device" in result.stderr
    assert (result.exit_code, said, (tmp_path / "out").exists()) == (2, True, False)


def test_auto_falls_back_to_the_cpu(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert extract(inputs, tmp_path, "--images", inputs / "photo.png", "--device", "auto").exit_code == 0


@pytest.mark.parametrize("below", ["", "out", "deep/out"])
def test_out_that_cannot_be_written_is_refused(inputs: Path, tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("in the way")
    result = extract(inputs, tmp_path / "file" / below, "--images", inputs / "photo.png")
    said = "--out must be a folder that can be written" in result.stderr
    assert (result.exit_code, said, (tmp_path / "file").read_text()) == (2, True, "in the way")


def test_missing_photo_is_named_before_anything_is_written(inputs: Path, tmp_path: Path) -> None:
    result = extract(inputs, tmp_path / "out", "--images", inputs / "photo.png", tmp_path / "nowhere.png")
    assert (result.exit_code, "nowhere.png" in result.stderr, (tmp_path / "out").exists()) == (2, True, False)


def test_error_is_text_on_stderr_in_a_real_process(tmp_path: Path) -> None:
    program = [sys.executable, "-c", "from backbone.command.app import main; main()"]
    arguments = ["extract", "--name", "resnet19", "--images", str(photo(tmp_path / "a.png")), "--out", "out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*program, *arguments], env=environment, cwd=tmp_path, capture_output=True, check=False)
    start = b"error: unknown backbone 'resnet19'"
    assert (done.returncode, done.stdout, done.stderr.startswith(start), done.stderr.count(b"\n")) == (2, b"", True, 1)


# photos


@pytest.mark.parametrize(("mode", "kind"), PHOTO_MODES.items())
def test_photo_of_every_mode_becomes_rgb(tmp_path: Path, mode: str, kind: str) -> None:
    image = read_image(photo(tmp_path / f"a.{kind}", mode))
    assert (image.mode, image.size) == ("RGB", (64, 48))


def test_photo_on_its_side_is_turned_upright(tmp_path: Path) -> None:
    assert read_image(rotated_photo(tmp_path / "a.jpg")).size == (48, 64)


def test_sixteen_bit_photo_keeps_its_greys(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64 * 48).astype(np.uint16).reshape(48, 64)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    grey = np.asarray(read_image(tmp_path / "ramp.png"))[..., 0].astype(int)
    assert np.abs(grey - ramp / 257).max() <= 1


def test_palette_with_transparency_is_read_without_a_warning(tmp_path: Path) -> None:
    image = Image.new("P", (8, 8))
    image.putpalette([value for level in range(256) for value in (level, level, level)])
    image.save(tmp_path / "a.png", transparency=bytes(range(256)))
    assert read_image(tmp_path / "a.png").mode == "RGB"  # warnings are errors here


@pytest.mark.parametrize(("shorter_side", "size"), [(24, (32, 24)), (48, (64, 48)), (96, (128, 96)), (1, (1, 1))])
def test_shorter_side_keeps_the_aspect(tmp_path: Path, shorter_side: int, size: tuple[int, int]) -> None:
    assert read_image(photo(tmp_path / "a.png"), shorter_side=shorter_side).size == size


def test_shorter_side_of_a_strip_keeps_a_pixel(tmp_path: Path) -> None:
    assert read_image(photo(tmp_path / "a.png", size=(200, 1)), shorter_side=2).size == (400, 2)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_truncated_photo_is_refused_by_name(tmp_path: Path, kind: str, share: float) -> None:
    path = photo(tmp_path / f"cut.{kind}")
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(ValueError, match=rf"cut\.{kind}: cannot be read as an image"):
        read_image(path)


def test_folder_stands_for_the_photos_in_it(tmp_path: Path) -> None:
    photo(tmp_path / "b.png")
    photo(tmp_path / "a.JPG", format="jpeg")
    (tmp_path / "notes.txt").write_text("no photo")
    assert [path.name for path in find_images([tmp_path])] == ["a.JPG", "b.png"]


def test_folder_within_a_folder_is_no_photo(tmp_path: Path) -> None:
    photo(tmp_path / "a.png")
    (tmp_path / "thumbnails.png").mkdir()
    assert [path.name for path in find_images([tmp_path])] == ["a.png"]


def test_folder_without_photos_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}: holds no image"):
        find_images([tmp_path])


def test_photo_named_twice_is_extracted_once(tmp_path: Path) -> None:
    photo(tmp_path / "a.png")
    assert find_images([tmp_path, tmp_path / "a.png"]) == [tmp_path / "a.png"]


def test_a_setting_that_the_network_cannot_honour_names_the_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: resnet18\nstride_in_1x1: true\nnorm: bn\n")
    result = CliRunner().invoke(app, ["describe", str(recipe)])
    assert result.exit_code == 2
    assert f"{recipe}: stride_in_1x1 must be false" in result.stderr
