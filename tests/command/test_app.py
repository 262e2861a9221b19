"""The command as a whole: its version, recipes by name, absent libraries, and files that are not replaced."""

import importlib.util
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from backbone import BackboneConfig, build_backbone
from backbone.command.app import app
from backbone.config import BackboneConfig as Config
from backbone.recipe import DetectorConfig
from backbone.shipped import find_recipe, load_recipe, shipped_recipes


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments])


def words(text: str) -> str:
    return " ".join(text.split())


def test_version_is_the_packages() -> None:
    assert re.fullmatch(
        rf"backbone {re.escape(version('backbone'))} \(torch .+, Python .+\)\n", command("--version").stdout
    )


def test_every_recipe_of_the_package_has_a_name_of_its_own_and_can_be_read() -> None:
    recipes = shipped_recipes()
    folder = Path(sys.modules["backbone"].__path__[0]) / "configs"
    assert len(recipes) == len(list(folder.rglob("*.yaml")))
    assert isinstance(load_recipe("faster_rcnn_resnet50"), DetectorConfig)
    assert isinstance(load_recipe("resnet50_dc5"), Config)


def test_a_recipe_without_a_name_that_is_known_suggests_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="did you mean 'faster_rcnn_resnet50'"):
        find_recipe("faster_rcnn_resnet51")
    with pytest.raises(FileNotFoundError, match="must be an existing YAML file"):
        find_recipe(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("library", ["lightning", "torchmetrics", "pycocotools", "tensorboard"])
@pytest.mark.parametrize("name", ["train", "evaluate", "predict"])
def test_training_without_its_extra_is_one_sentence(
    name: str, library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr("backbone.command.terminal.find_spec", lambda asked: None if asked == library else found(asked))
    (tmp_path / "a.png").write_text("")
    arguments: dict[str, list[object]] = {
        "train": ["--config", "fcos_resnet50", "--data", "d", "--out", "o"],
        "evaluate": ["--config", "fcos_resnet50", "--data", "d", "--weights", "w"],
        "predict": ["--weights", "w", "--images", tmp_path / "a.png", "--out", "o"],
    }
    result = command(name, *arguments[name])
    said = f"error: training needs {library}, which is not installed: pip install 'backbone[train]'\n"
    assert (result.exit_code, result.stderr) == (2, said)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    file = tmp_path / "in.pth"
    torch.save(build_backbone(BackboneConfig(name="resnet18", norm="bn")).state_dict(), file)
    return file


def test_convert_replaces_no_file_unless_told(checkpoint: Path, tmp_path: Path) -> None:
    before = checkpoint.read_bytes()
    (tmp_path / "out.pth").write_text("mine")
    for out in (checkpoint, tmp_path / "out.pth"):
        refused = command("convert", checkpoint, out, "--to", "timm")
        assert (refused.exit_code, "add --overwrite" in words(refused.stderr)) == (2, True)
    assert (checkpoint.read_bytes(), (tmp_path / "out.pth").read_text()) == (before, "mine")
    assert command("convert", checkpoint, tmp_path / "out.pth", "--to", "timm", "--overwrite").exit_code == 0
    assert len(torch.load(tmp_path / "out.pth")) > 100


def test_a_detectors_recipe_gives_extract_its_backbone(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "detector: fcos\nbackbone: {name: resnet18, norm: bn, out_features: [c3]}\npyramid: {out_channels: 32}"
    )
    import numpy as np
    from PIL import Image

    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "a.png")
    result = command(
        "extract", "--config", tmp_path / "r.yaml", "--images", tmp_path / "a.png", "--out", tmp_path, "--no-picture"
    )
    assert result.exit_code == 0, result.output
    assert (tmp_path / "a.safetensors").exists()


def test_a_note_is_printed_letter_by_letter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(settings: Any) -> Any:
        raise ValueError("[dog] :smile: [/b]")

    (tmp_path / "a.png").write_text("")
    monkeypatch.setattr("backbone.command.extract.build_by_recipe", build)
    result = command("extract", "--name", "resnet18", "--images", tmp_path / "a.png", "--out", tmp_path / "o")
    assert result.stderr == "error: [dog] :smile: [/b]\n"
