"""``backbone export`` on the command line: what it takes, and one line for what it cannot."""

from pathlib import Path

import pytest
import torch
from cells import detector
from typer.testing import CliRunner

from backbone.command.app import app
from backbone.command.export import load_model
from backbone.export import read_metadata

RECIPE = """
detector: retinanet
backbone: {name: resnet18, norm: bn}
num_classes: 4
min_size: 128
max_size: 200
"""
BAD = {
    "nothing to export": (["--out", "model.onnx"], "give what to export and --out"),
    "nowhere to write": (["resnet18"], "give what to export and --out"),
    "a size and any size": (["resnet18", "--out", "m.onnx", "--dynamic", "--image-size", "64", "64"], "opposite"),
    "a network that is none": (["resnet52", "--out", "m.pt2", "--to", "torch-export"], "did you mean 'resnet50'"),
    "a recipe that is not there": (["absent.yaml", "--out", "m.pt2", "--to", "torch-export"], "absent.yaml"),
    "a folder that is no run": ([".", "--out", "m.pt2", "--to", "torch-export"], "must hold recipe.yaml"),
    "a file to check that is not there": (["--check", "absent.onnx"], "must exist, got absent.onnx"),
    "a file of no runtime": (["--check", __file__], "an exported file ends in one of"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["export", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_name_becomes_a_checked_file(tmp_path: Path) -> None:
    file = tmp_path / "model.pt2"
    arguments = ["resnet18", "--to", "torch-export", "--out", str(file), "--image-size", "64", "64", "--batch", "1"]
    result = CliRunner().invoke(app, ["export", *arguments])
    assert result.exit_code == 0, result.output
    assert "largest difference to PyTorch" in result.stdout
    assert read_metadata(file)["image_size"] == "[64, 64]"
    assert CliRunner().invoke(app, ["export", "--check", str(file)]).exit_code == 0


def test_a_run_gives_its_trained_detector(tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="pip install 'backbone[train]'")
    trained = detector("retinanet")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    state = {f"detector.{key}": value for key, value in trained.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "last.ckpt")
    loaded, _ = load_model(str(tmp_path))
    assert all(torch.equal(value, trained.state_dict()[key]) for key, value in loaded.state_dict().items())
