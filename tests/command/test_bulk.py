"""``backbone extract`` in bulk: which options choose it, what it says, what it refuses."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from backbone.command.app import app
from backbone.command.bulk import told_progress


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "damaged.png").write_bytes(b"no photo")
    return folder


def extract(photos: Path, out: Path, *arguments: object) -> Result:
    common = ["extract", "--name", "resnet18", "--images", photos, "--out", out]
    return CliRunner().invoke(app, [str(each) for each in [*common, *arguments]])


BULK = [
    ("--batch", "auto", "--workers", "auto", "--no-picture"),
    ("--pool", "avg"),
    ("--format", "shards"),
    ("--levels", "c2"),
    ("--images-per-shard", "100"),
]


@pytest.mark.parametrize("options", BULK)
def test_an_option_of_bulk_gives_shards_and_an_index(photos: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    result = extract(photos, tmp_path, "--workers", "0", *options)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [str(tmp_path / "index.csv")]
    assert "1 of 6 images failed" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".lock", "extraction.json", "failed.csv", "index.csv", "shard-000000.csv", "shard-000000.safetensors",
    ]  # fmt: skip


def test_levels_that_are_not_asked_for_are_not_built(photos: Path, tmp_path: Path) -> None:
    extract(photos, tmp_path, "--pool", "avg", "--levels", "c2,c3", "--workers", "0")
    shapes = {name: tuple(each.shape) for name, each in load_file(tmp_path / "shard-000000.safetensors").items()}
    assert shapes == {"c2": (5, 64), "c3": (5, 128)}
    with (tmp_path / "index.csv").open(newline="") as file:
        assert [row["key"] for row in csv.DictReader(file)] == ["0", "1", "2", "3", "4", ""]


def test_a_second_run_says_that_all_is_done(photos: Path, tmp_path: Path) -> None:
    extract(photos, tmp_path, "--pool", "avg", "--workers", "0")
    again = extract(photos, tmp_path, "--pool", "avg", "--workers", "0")
    assert (again.exit_code, "6 of 6 images are done already" in again.stderr) == (0, True)


REFUSED = [
    (("--format", "npz", "--pool", "avg"), "--format npz is a file for each photo, and --pool is for shards"),
    (("--format", "parquet"), "parquet holds vectors; pool maps by --pool avg or gem"),
    (("--format", "parquet", "--pool", "avg", "--store", "bfloat16"), "parquet has no bfloat16"),
    (("--pool", "avg", "--batch", "many"), "--batch must be auto or a whole number of 1 or more, got many"),
    (("--workers", "-1"), "--workers must be auto or a whole number of 0 or more, got -1"),
    (("--levels", "c7"), "out_features"),
    (("--pool", "avg", "--address", "auto"), "--address and --actors are Ray's; add --engine ray"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_cannot_be_honoured_is_one_line(
    photos: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    refused = extract(photos, tmp_path / "out", *options)
    assert refused.exit_code == 2, refused.output
    assert message in refused.stderr
    assert len(refused.stderr.splitlines()) == 1 + ("note:" in refused.stderr)


def test_other_settings_in_the_same_folder_need_overwrite(photos: Path, tmp_path: Path) -> None:
    extract(photos, tmp_path, "--pool", "avg", "--workers", "0")
    refused = extract(photos, tmp_path, "--pool", "gem", "--workers", "0")
    assert (refused.exit_code, 'pool "avg" there and "gem" here' in refused.stderr) == (2, True)
    assert extract(photos, tmp_path, "--pool", "gem", "--workers", "0", "--overwrite").exit_code == 0


def test_batch_auto_works_with_a_file_for_each_photo(photos: Path, tmp_path: Path) -> None:
    result = extract(photos / "0.png", tmp_path, "--batch", "auto", "--no-picture")
    assert (result.exit_code, [path.name for path in tmp_path.iterdir()]) == (0, ["0.safetensors"])


def test_a_log_gets_a_line_a_minute_with_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 30.0, 70.0])
    monkeypatch.setattr("backbone.command.bulk.time.monotonic", lambda: next(clock))
    with told_progress(1000) as told:
        for count in (100, 35, 35):  # the first are those of an earlier run
            told(count)
    said = capsys.readouterr().err
    assert "100 of 1,000 images are done already" in said
    assert "170 of 1,000 images, 1.0 images/s, 14 min left" in said
