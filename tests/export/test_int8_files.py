"""int8 files: held to the cosine of each level with the model's, on scales of the photos that are given."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from cells import backbone, detector
from conftest import build
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from backbone.command.app import app
from backbone.export import ExportMismatchError, MissingExtraError, check_file, export_model, read_metadata
from backbone.export.checking import LEAST_COSINE

onnx = pytest.importorskip("onnx", reason="pip install 'backbone[export]'")
pytest.importorskip("onnxscript", reason="pip install 'backbone[export]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'backbone[export]'")

NETWORKS = {
    "a ResNet": ("resnet18", {"out_features": ("c2", "c3")}),
    "depthwise convolutions": ("timm/mobilenetv3_small_100", {"out_features": ("c2", "c3")}),
}


def photos(count: int = 4) -> list[Tensor]:
    """Blots of colour and noise, as images of 0 to 1 are."""
    random = np.random.RandomState(5)
    blots = random.random_sample((count, 3, 10, 14)).repeat(16, 2).repeat(16, 3)
    return [torch.from_numpy(each[None]).float() for each in 0.8 * blots + 0.2 * random.random_sample(blots.shape)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Photos in files of several sizes."""
    made = tmp_path / "photos"
    made.mkdir()
    for index, photo in enumerate(photos()):
        pixels = (photo[0].permute(1, 2, 0) * 255).byte().numpy()
        Image.fromarray(pixels[: 120 + 10 * index]).save(made / f"{index}.png")
    return made


@pytest.mark.parametrize(("name", "settings"), NETWORKS.values(), ids=NETWORKS)
def test_a_file_of_int8_weights_points_where_the_model_does(
    name: str, settings: dict[str, object], tmp_path: Path
) -> None:
    model = backbone(name, **settings).eval()
    file = tmp_path / "model.onnx"
    report = export_model(model, file, dtype="int8", calibration=photos())
    assert set(report.difference.cosines) == {"c2", "c3"}
    assert min(report.difference.cosines.values()) > LEAST_COSINE
    assert "in cosine c2 " in str(report)
    weights = [each for each in onnx.load(file).graph.initializer if len(each.dims) == 4]
    assert {each.data_type for each in weights} == {onnx.TensorProto.INT8}
    images = photos(1)[0][..., :97, :130]
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = model(images)["c3"]
    (actual,) = session.run(["c3"], {"images": images.numpy()})
    assert torch.cosine_similarity(torch.from_numpy(actual).flatten(), expected.flatten(), dim=0) > LEAST_COSINE
    assert read_metadata(file)["dtype"] == "int8"
    assert "c2, c3" in check_file(file)


def test_scales_of_images_unlike_those_that_are_seen_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    model = build("resnet18", out_features=("c2",)).eval()  # without biases black stays black
    black = [torch.zeros(1, 3, 64, 64)]
    with pytest.raises(ExportMismatchError, match=r"cosine of .* less than 0\.\d+: .*calibration images") as caught:
        export_model(model, tmp_path / "model.onnx", dtype="int8", calibration=black)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fixed", [[], ["--image-size", "96", "128", "--batch", "2"]], ids=["any size", "one size"])
def test_the_command_takes_a_folder_of_photos(folder: Path, tmp_path: Path, fixed: list[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: resnet18\nnorm: bn\nout_features: [c2]\n")
    file = tmp_path / "model.onnx"
    arguments = ["export", str(recipe), "--out", str(file), "--dtype", "int8", "--calibration", str(folder), *fixed]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "in cosine c2" in result.stdout
    assert file.is_file()


BAD = {
    "no folder": ([], "--dtype int8 needs photos"),
    "a folder that is not there": (["--calibration", "absent"], "images must exist, got absent"),
    "a folder without photos": (["--calibration", "empty"], "empty: holds no image"),
    "a folder for float32": (["--calibration", "empty", "--dtype", "float32"], "give both or neither"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_photos_that_are_not_there_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    result = CliRunner().invoke(app, ["export", "resnet18", "--out", "m.onnx", "--dtype", "int8", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert [each.name for each in tmp_path.iterdir()] == ["empty"]


def test_a_detector_stays_in_float32(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="in float32, got int8"):
        export_model(detector("retinanet"), tmp_path / "model.onnx", dtype="int8", calibration=photos(1))
    assert list(tmp_path.iterdir()) == []


def test_openvino_is_quantised_by_nncf(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="pip install 'backbone[export]'")
    pytest.importorskip("nncf", reason="pip install nncf")
    model = backbone("resnet18", out_features=("c2", "c3")).eval()
    report = export_model(model, tmp_path / "model.xml", to="openvino", dtype="int8", calibration=photos())
    assert min(report.difference.cosines.values()) > LEAST_COSINE
    assert "FakeQuantize" in (tmp_path / "model.xml").read_text()


def test_openvino_without_nncf_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "nncf" else find(name))
    with pytest.raises(MissingExtraError, match="pip install nncf"):
        export_model(backbone("resnet18"), tmp_path / "model.xml", to="openvino", dtype="int8", calibration=photos(1))
