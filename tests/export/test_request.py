"""What is refused before anything is traced: one line each, and nothing is written."""

import importlib.util
from pathlib import Path

import pytest
from conftest import build
from torch import nn

from backbone.export import MissingExtraError, export_model

BAD = {
    "an unknown target": ({"to": "onxn"}, "model.onnx", "did you mean 'onnx'"),
    "a suffix of another target": ({}, "model.pt", r"must end in \.onnx"),
    "a folder": ({}, "folder.onnx", "must be a file's"),
    "a folder that is not there": ({}, "absent/model.onnx", "must exist and be writable"),
    "a dtype nobody has": ({"dtype": "float8"}, "model.onnx", "dtype must be one of"),
    "a dtype the runtime has not": ({"dtype": "bfloat16"}, "model.onnx", "use float16"),
    "int8 without calibration": ({"dtype": "int8"}, "model.onnx", "calibration"),
    "no images at a time": ({"batch": 0}, "model.onnx", "batch must be at least 1"),
    "an image without pixels": ({"image_size": (0, 32)}, "model.onnx", "at least 1 pixel"),
    "an opset too old for RoiAlign": ({"opset": 11}, "model.onnx", "opset must be at least 18"),
    "a Triton repository that cannot be written": ({"triton": "/proc/models"}, "model.onnx", "writable, got /proc"),
    "Triton for a phone": ({"to": "torch-export", "triton": "repository"}, "model.pt2", "leave triton out"),
}


@pytest.mark.parametrize(("settings", "name", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_is_said_in_one_line_and_leaves_nothing(
    settings: dict[str, object], name: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(ValueError, match=message) as caught:
        export_model(build("resnet18"), tmp_path / name, **{"to": "onnx", **settings})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["folder.onnx"]


def test_a_missing_library_names_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"onnx needs onnx and .*pip install 'backbone\[export\]'"):
        export_model(build("resnet18"), tmp_path / "model.onnx")


def test_a_folder_that_cannot_be_written_is_refused_before_any_work() -> None:
    with pytest.raises(ValueError, match="must exist and be writable, got /proc"):
        export_model(build("resnet18"), "/proc/model.onnx")


@pytest.mark.parametrize("size", [(4, 40), None], ids=["one size", "any size"])
def test_a_size_that_the_network_cannot_take_is_said_with_its_reason(
    size: tuple[int, int] | None, tmp_path: Path
) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 7), nn.AvgPool2d(200 if size is None else 1))
    with pytest.raises(ValueError, match=r"cannot take images of \d+ x \d+ pixels \(.*give --image-size") as caught:
        export_model(network, tmp_path / "model.pt2", to="torch-export", image_size=size)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


CAUSES = {
    "a sentence": (AssertionError("only 4D queries\nand more"), "translating add: only 4D queries$"),
    "a kind alone": (AssertionError(), "translating add: AssertionError$"),
    "a key": (KeyError("val"), "translating add: KeyError 'val'$"),
    "a full disk": (
        OSError(28, "No space left on device"),
        r"model\.onnx: cannot be written \(No space left on device\)$",
    ),
}


@pytest.mark.parametrize(("cause", "told"), CAUSES.values(), ids=CAUSES)
def test_what_a_runtime_cannot_express_is_told_by_its_causes(
    cause: Exception, told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("onnxscript", reason="pip install 'backbone[export]'")

    def refuse(*_: object) -> None:
        try:
            raise NotImplementedError("translating add\nand what to do") from cause
        except NotImplementedError as error:
            raise RuntimeError("Failed to convert.\nPlease file an issue.") from error

    monkeypatch.setattr("backbone.export.onnx.build", refuse)
    with pytest.raises(OSError if isinstance(cause, OSError) else ValueError, match=told):
        export_model(build("resnet18", norm="bn").eval(), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
