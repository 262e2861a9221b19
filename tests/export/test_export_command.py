"""``backbone export`` on the command line: what it takes, and one line for what it cannot."""

from pathlib import Path
from typing import Any

import pytest
import torch
from cells import detector
from typer.testing import CliRunner

from backbone import Backbone
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
    "an unknown target": (["resnet18", "--out", "m.onnx", "--to", "onxn"], "did you mean 'onnx'"),
    "an unknown dtype": (["resnet18", "--out", "m.onnx", "--dtype", "float8"], "dtype must be one of"),
    "a folder that cannot be written": (["resnet18", "--out", "/proc/m.onnx"], "must exist and be writable, got /proc"),
    "a size and any size": (["resnet18", "--out", "m.onnx", "--dynamic", "--image-size", "64", "64"], "opposite"),
    "a network that is none": (["resnet52", "--out", "m.pt2", "--to", "torch-export"], "did you mean 'resnet50'"),
    "a recipe that is not there": (["absent.yaml", "--out", "m.pt2", "--to", "torch-export"], "absent.yaml"),
    "a folder that is no run": ([".", "--out", "m.pt2", "--to", "torch-export"], "must hold model.pth or last.ckpt"),
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


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, Any]:
    """A finished run's folder and its detector: model.pth, and a last.ckpt whose weights are others."""
    pytest.importorskip("lightning", reason="pip install 'backbone[train]'")
    from backbone.recipe import load_detector_config
    from backbone.training.facts import facts_of, metadata_of, with_facts

    (tmp_path / "recipe.yaml").write_text(RECIPE)
    config = load_detector_config(tmp_path / "recipe.yaml")
    trained, unfinished = detector("retinanet"), detector("retinanet")
    facts = facts_of(trained, config, {1: "cat", 3: "dog"}, {7: 1, 9: 3}, {})
    body = next(module for module in trained.modules() if isinstance(module, Backbone))
    torch.save(with_facts(trained.state_dict(), facts, metadata_of(body, config)), tmp_path / "model.pth")
    state = {f"detector.{key}": value for key, value in unfinished.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "last.ckpt")
    return tmp_path, (trained, unfinished)


def equal(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    states = (model.state_dict(), other.state_dict())
    return all(torch.equal(states[0][key], states[1][key]) for key in states[1])


def test_a_finished_run_gives_the_detector_and_the_names_of_its_model_file(
    run: tuple[Path, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, (trained, _) = run
    (folder / "recipe.yaml").unlink()  # the file stands alone
    loaded, names = load_model(str(folder))
    assert equal(loaded, trained)
    assert names == ("", "cat", "", "dog")
    assert capsys.readouterr().err == ""


def test_an_unfinished_run_gives_its_last_epoch_and_says_so(
    run: tuple[Path, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, (_, unfinished) = run
    (folder / "model.pth").unlink()
    loaded, _ = load_model(str(folder))
    assert equal(loaded, unfinished)
    assert "holds no model.pth" in capsys.readouterr().err


def test_a_checkpoint_without_any_recipe_is_one_line(run: tuple[Path, Any]) -> None:
    folder, _ = run
    for name in ("model.pth", "recipe.yaml"):
        (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"recipe\.yaml must be beside it"):
        load_model(str(folder))


def test_a_recipe_of_the_package_needs_no_path() -> None:
    model, _ = load_model("shapes_retinanet", weights=None)
    assert type(model).__name__ == "RetinaNet"
