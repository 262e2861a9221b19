"""An exported file is what the model is, in its own runtime, and nobody needs this package to run it."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cells import backbone, detector, pyramid
from conftest import relative_error
from numpy.typing import NDArray

from backbone.export import ExportMismatchError, check_file, export_model, read_metadata

onnx = pytest.importorskip("onnx", reason="pip install 'backbone[export]'")
pytest.importorskip("onnxscript", reason="pip install 'backbone[export]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'backbone[export]'")


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return pyramid("resnet18").eval()


@pytest.fixture(scope="module")
def file(network: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "pyramid.onnx"
    export_model(network, path, to="onnx", class_names=("cat", "dog"), triton=path.parent / "repository")
    return path


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A RetinaNet and its file."""
    torch.manual_seed(0)
    model = detector("retinanet")
    with torch.no_grad():  # what is seen in black, and nothing of it, counts as nothing
        black, noise = (model([image])[0]["scores"].max() for image in (torch.zeros(3, 64, 64), torch.rand(3, 90, 150)))
    model.score_thresh = float(black) + 1e-4  # type: ignore[assignment]
    assert noise > model.score_thresh
    path = tmp_path_factory.mktemp("export") / "retinanet.onnx"
    report = export_model(model, path, to="onnx", with_preprocessing=True)
    assert report.difference.num_detections > 0
    return model, path


def run(file: Path, images: NDArray[Any]) -> dict[str, NDArray[Any]]:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"images": images}), strict=True))


@pytest.mark.parametrize("shape", [(1, 3, 140, 201), (3, 3, 192, 160)])
def test_levels_agree_with_pytorch_at_sizes_that_the_export_never_saw(
    network: torch.nn.Module, file: Path, shape: tuple[int, ...]
) -> None:
    images = torch.rand(shape)
    with torch.no_grad():
        expected = network(images)
    actual = run(file, images.numpy())
    assert list(actual) == ["p2", "p3", "p4", "p5", "p6", "p7"]
    for name, level in expected.items():
        assert relative_error(torch.from_numpy(actual[name]), level) < 1e-5


@pytest.mark.parametrize("name", ["convnext_atto", "swin_tiny_patch4_window7_224", "tf_efficientnet_lite0"])
def test_a_network_that_pads_its_images_gives_maps_of_sizes_rounded_up(name: str, tmp_path: Path) -> None:
    pytest.importorskip("timm", reason="pip install 'backbone[timm]'")
    model = backbone(f"timm/{name}", norm="bn", out_features=("c2", "c3")).eval()
    export_model(model, tmp_path / "model.onnx")
    images = torch.rand(1, 3, 101, 64)
    with torch.no_grad():
        expected = model(images)
    for level, actual in run(tmp_path / "model.onnx", images.numpy()).items():
        assert relative_error(torch.from_numpy(actual), expected[level]) < 1e-4


def test_axes_have_names_and_norms_are_folded(file: Path) -> None:
    graph = onnx.load(file).graph
    dims = [dim.dim_param or dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim]
    assert (graph.input[0].name, dims) == ("images", ["batch", 3, "height", "width"])
    assert {node.op_type for node in graph.node}.isdisjoint({"BatchNormalization", "Mul", "Sqrt"})
    assert all(output.type.tensor_type.shape.dim[0].dim_param == "batch" for output in graph.output)


def test_the_file_tells_how_to_prepare_images_and_where_it_comes_from(network: torch.nn.Module, file: Path) -> None:
    facts = read_metadata(file)
    assert json.loads(facts["mean"]) == [0.485, 0.456, 0.406]
    assert facts["channel_order"] == "rgb"
    assert json.loads(facts["class_names"]) == ["cat", "dog"]
    assert json.loads(facts["levels"])["p7"] == {"channels": 64, "stride": 128}
    assert len(facts["weights_sha256"]) == 64


def test_the_file_holds_no_path_of_this_machine(file: Path) -> None:
    content = file.read_bytes()
    for path in (str(Path(torch.__file__).parent), str(Path.cwd()), "/home/", "site-packages", ".py"):
        assert path.encode() not in content, path


def test_a_file_is_checked_where_the_model_is_not_at_hand(file: Path, tmp_path: Path) -> None:
    assert "p2, p3" in check_file(file)
    model = onnx.load(file)
    weight = next(each for each in model.graph.initializer if len(each.dims) == 4)
    values = onnx.numpy_helper.to_array(weight).copy()
    values[0] += 1
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(model, tmp_path / "changed.onnx")
    with pytest.raises(ExportMismatchError, match="differs from what PyTorch gave"):
        check_file(tmp_path / "changed.onnx")


def test_triton_gets_the_file_and_a_configuration_that_names_its_tensors(file: Path) -> None:
    entry = file.parent / "repository" / "pyramid"
    assert (entry / "1" / "model.onnx").read_bytes() == file.read_bytes()
    text = (entry / "config.pbtxt").read_text()
    assert 'backend: "onnxruntime"' in text
    assert 'name: "images" data_type: TYPE_FP32 dims: [ 3, -1, -1 ]' in text
    assert text.count("output [") == 6
    assert text.count("{") == text.count("}")
    assert text.count("[") == text.count("]")


def test_a_detector_takes_bytes_of_any_size_and_finds_the_same(found: tuple[Any, Path]) -> None:
    model, file = found
    images = torch.randint(0, 256, (1, 3, 90, 150), dtype=torch.uint8)
    with torch.no_grad():
        (expected,) = model(list(images.float() / 255))
    actual = run(file, images.numpy())
    count = int(actual["count"][0])
    assert count == len(expected["boxes"]) > 0
    assert np.abs(np.sort(actual["scores"][0, :count]) - expected["scores"].sort().values.numpy()).max() < 1e-3
    assert sorted(actual["labels"][0, :count]) == sorted(expected["labels"].tolist())
    assert np.abs(np.sort(actual["boxes"][0, :count], 0) - np.sort(expected["boxes"].numpy(), 0)).max() < 0.1


def test_an_image_with_nothing_in_it_works(found: tuple[Any, Path]) -> None:
    actual = run(found[1], np.zeros((2, 3, 64, 64), np.uint8))
    assert actual["count"].tolist() == [0, 0]
    assert not any(actual[name].any() for name in ("boxes", "scores", "labels"))


def test_preprocessing_inside_equals_the_backbones_own_transforms(tmp_path: Path) -> None:
    model = backbone("resnet18", out_features=("c3",)).eval()
    export_model(model, tmp_path / "model.onnx", with_preprocessing=True, image_size=(96, 128))
    photo = torch.randint(0, 256, (1, 3, 150, 170), dtype=torch.uint8)
    resized = torch.nn.functional.interpolate(photo.float(), (96, 128), mode="bilinear", antialias=True) / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = model((resized - mean) / std)["c3"]
    actual = run(tmp_path / "model.onnx", photo.numpy())["c3"]
    assert relative_error(torch.from_numpy(actual), expected) < 1e-4


def test_a_file_that_disagrees_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import backbone.export.onnx as target

    def spoiled(runner: target.Runner, images: NDArray[Any]) -> dict[str, NDArray[Any]]:
        return {name: value * 1.001 for name, value in original(runner, images).items()}

    original = target.Runner.__call__
    monkeypatch.setattr(target.Runner, "__call__", spoiled)
    (tmp_path / "model.onnx").write_text("an older file")
    with pytest.raises(ExportMismatchError, match="no file was kept"):
        export_model(backbone("resnet18", out_features=("c2",)), tmp_path / "model.onnx", image_size=(64, 64), batch=1)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_text() == "an older file"


FULL = {
    "onnx": ("onnx", "model.onnx", "float32", 100_000),
    "onnx in int8": ("onnx", "model.onnx", "int8", 100_000),
    "openvino": ("openvino", "model.xml", "float32", 100_000),
    "torch-export": ("torch-export", "model.pt2", "float32", 100_000),
    "aoti": ("aoti", "model.pt2", "float32", 100_000),
    "executorch": ("executorch", "model.pte", "float32", 100_000),
}
NEEDS = {"openvino": "pip install 'backbone[export]'", "executorch": "pip install executorch"}


@pytest.mark.parametrize(("to", "name", "dtype", "room"), FULL.values(), ids=FULL)
def test_a_full_disk_is_one_line_and_leaves_nothing(
    to: str, name: str, dtype: str, room: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if to in NEEDS:
        pytest.importorskip(to, reason=NEEDS[to])
    if to == "aoti" and shutil.which("g++") is None:
        pytest.skip("AOTInductor needs g++")
    code = f"""
import resource, signal, torch
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from backbone.export import export_model
from cells import backbone
model = backbone("resnet18", out_features=("c2",))
photos = [torch.rand(1, 3, 64, 64)] if {dtype!r} == "int8" else ()
settings = dict(to={to!r}, dtype={dtype!r}, image_size=(64, 64), batch=1, calibration=photos)
resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))
try:
    export_model(model, {str(tmp_path / name)!r}, **settings)
except OSError as error:
    assert "cannot be written" in str(error) and "\\n" not in str(error), error
else:
    raise SystemExit("it fitted")
"""
    here = Path(__file__).parent
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (here, here.parent, *sys.path))),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),  # what is half written must not be found
    }
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, env=environment)
    assert list(tmp_path.iterdir()) == []


def test_the_models_modules_and_mode_stay_as_they_are(network: torch.nn.Module, file: Path) -> None:
    assert not network.training
    assert all(type(module).__name__ != "BatchNorm2d" for module in network.modules())


def test_openvino_reads_its_own_file_with_its_weights_beside_it(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="pip install 'backbone[export]'")
    model = backbone("resnet18", out_features=("c3",)).eval()
    export_model(model, tmp_path / "model.xml", to="openvino", image_size=(64, 96), dtype="float32")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.bin", "model.xml"]
    assert str(tmp_path).encode() not in (tmp_path / "model.xml").read_bytes()
    images = torch.rand(3, 3, 64, 96)
    compiled = openvino.Core().compile_model(tmp_path / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    with torch.no_grad():
        expected = model(images)["c3"]
    assert relative_error(torch.from_numpy(compiled({"images": images.numpy()})["c3"]), expected) < 1e-5
    assert json.loads(read_metadata(tmp_path / "model.xml")["image_size"]) == [64, 96]


def test_a_torch_export_file_runs_in_a_process_without_this_package(tmp_path: Path) -> None:
    model = backbone("resnet18", out_features=("c2",)).eval()
    file = tmp_path / "model.pt2"
    export_model(model, file, to="torch-export")
    images = torch.rand(1, 3, 70, 90)
    with torch.no_grad():
        torch.save({"images": images, "c2": model(images)["c2"]}, tmp_path / "expected.pt")
    code = f"""
import sys, torch
expected = torch.load({str(tmp_path / "expected.pt")!r})
c2 = torch.export.load({str(file)!r}).module()(expected["images"])["c2"]
assert (c2 - expected["c2"]).abs().max() < 1e-4 * expected["c2"].abs().max()
assert "backbone" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=tmp_path)
    with zipfile.ZipFile(file) as archive:
        content = b"".join(map(archive.read, archive.namelist()))
    for path in (str(Path(torch.__file__).parent), str(Path.cwd()), str(tmp_path)):
        assert path.encode() not in content


def test_a_detector_for_a_runtime_without_its_operators_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use onnx or openvino, or export the backbone"):
        export_model(detector("retinanet"), tmp_path / "model.pt2", to="torch-export")
    assert list(tmp_path.iterdir()) == []
