"""Every format out: the real library loads what was written and gives our features; in, out and in is the same."""

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import foreign
import pytest
import timm
import torch
import torchvision
from conftest import build, relative_error
from foreign import Features, State
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from backbone import convert_weights, inspect_weights, load_weights
from backbone.weights.convert import TARGETS

PARITY = 1e-5
NETWORKS = ["resnet18", "resnet50"]
DEPTHS: dict[str, dict[str, Any]] = {
    "resnet18": {"depths": [2, 2, 2, 2], "layer_type": "basic"},
    "resnet50": {"depths": [3, 4, 6, 3], "layer_type": "bottleneck"},
}
SUFFIXES = [(to, suffix) for to in TARGETS for suffix in (".pth", ".safetensors")] + [("detectron2", ".pkl")]


def assert_same(ours: Features, theirs: Features) -> None:
    assert [relative_error(a, b) <= PARITY for a, b in zip(ours, theirs, strict=True)] == [True] * 4


def read(path: Path) -> Any:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


@pytest.fixture(scope="module", params=NETWORKS)
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Features]:
    """Return a network's name, its file and its C2 to C5."""
    torch.manual_seed(0)
    model = foreign.torchvision_network(request.param, num_classes=7)
    path = tmp_path_factory.mktemp("original") / f"{request.param}.pth"
    torch.save(model.state_dict(), path)
    return request.param, path, foreign.torchvision_features(model)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_torchvision_loads_it_strictly(original: tuple[str, Path, Features], tmp_path: Path, suffix: str) -> None:
    name, path, expected = original
    convert_weights(path, tmp_path / f"x{suffix}", "torchvision")
    theirs = torchvision.models.get_model(name, num_classes=7).eval()
    theirs.load_state_dict(read(tmp_path / f"x{suffix}"), strict=True)
    assert_same(foreign.torchvision_features(theirs), expected)


def test_timm_loads_it_strictly(original: tuple[str, Path, Features], tmp_path: Path) -> None:
    name, path, expected = original
    convert_weights(path, tmp_path / "x.safetensors", "timm")
    theirs = timm.create_model(name, num_classes=7, checkpoint_path=str(tmp_path / "x.safetensors")).eval()
    assert_same(foreign.timm_features(theirs), expected)


def test_transformers_loads_it_with_nothing_missing(original: tuple[str, Path, Features], tmp_path: Path) -> None:
    from transformers import ResNetForImageClassification

    name, path, expected = original
    foreign.transformers_network(**DEPTHS[name]).config.save_pretrained(tmp_path)
    convert_weights(path, tmp_path / "model.safetensors", "transformers")
    loaded: Any = ResNetForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    theirs, told = loaded
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert_same(foreign.transformers_features(theirs.eval()), expected)


def test_transformers_loads_it_without_a_classifier(tmp_path: Path) -> None:
    from transformers import ResNetModel

    state = foreign.without_classifier(foreign.torchvision_network().state_dict())
    torch.save(state, tmp_path / "x.pth")
    config = foreign.transformers_network(**DEPTHS["resnet18"]).config
    convert_weights(tmp_path / "x.pth", tmp_path / "model.safetensors", "transformers")
    ResNetModel(config).load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_detectron2s_checkpointer_finds_every_parameter(
    original: tuple[str, Path, Features], tmp_path: Path, suffix: str
) -> None:
    pytest.importorskip("detectron2.modeling.backbone.resnet", reason="installed from its own repository")
    pytest.importorskip("detectron2.checkpoint")
    from detectron2.checkpoint import DetectionCheckpointer

    name, path, expected = original
    convert_weights(path, tmp_path / f"x{suffix}", "detectron2")
    theirs = foreign.detectron2_network({"resnet18": 18, "resnet50": 50}[name])
    told = DetectionCheckpointer(theirs).load(str(tmp_path / f"x{suffix}"))
    assert told is not None
    assert_same(foreign.detectron2_features(theirs), expected)


@pytest.mark.parametrize(("to", "suffix"), SUFFIXES)
def test_in_out_and_in_again_is_byte_identical(
    original: tuple[str, Path, Features], tmp_path: Path, to: str, suffix: str
) -> None:
    name, path, _ = original
    out = tmp_path / f"x{suffix}"
    convert_weights(path, out, to)
    first, second = build(name, num_classes=7), build(name, num_classes=7)
    load_weights(first, path, name=name)
    load_weights(second, out, name=name)
    assert differing(first.state_dict(), second.state_dict()) == []


@pytest.mark.parametrize("to", TARGETS)
def test_files_of_every_library_become_torchvisions_bytes_again(tmp_path: Path, to: str) -> None:
    state = foreign.torchvision_network().state_dict()
    save_file(state, tmp_path / "a.safetensors")
    convert_weights(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to)
    convert_weights(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "torchvision")
    lost = {key for key in state if to == "detectron2" and key.endswith("num_batches_tracked")}
    assert differing({k: v for k, v in state.items() if k not in lost}, load_file(tmp_path / "c.safetensors")) == []


def differing(first: State, second: State) -> list[str]:
    return [
        key
        for key in first.keys() | second.keys()
        if key not in first or key not in second or first[key].numpy().tobytes() != second[key].numpy().tobytes()
    ]


@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".safetensors"])
def test_what_is_known_of_the_weights_travels_along(tmp_path: Path, suffix: str) -> None:
    theirs = foreign.folded(foreign.torchvision_network("resnet18"))
    foreign.write_pickle(foreign.caffe2_names(theirs.state_dict()), tmp_path / "R-18.pkl")
    before = inspect_weights(tmp_path / "R-18.pkl").training
    convert_weights(tmp_path / "R-18.pkl", tmp_path / f"x{suffix}", "detectron2")
    assert inspect_weights(tmp_path / f"x{suffix}").training == before
    assert "BGR" in before[0]


def test_our_header_is_json_beside_the_format_others_look_for(tmp_path: Path) -> None:
    torch.save(foreign.torchvision_network().state_dict(), tmp_path / "x.pth")
    convert_weights(tmp_path / "x.pth", tmp_path / "x.safetensors", "timm")
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        header = file.metadata()
    assert header["format"] == "pt"
    assert json.loads(header["backbone_metadata"])["stride_in_1x1"] is False


def test_report_of_a_conversion_names_what_the_target_cannot_hold(tmp_path: Path) -> None:
    torch.save({"model": foreign.torchvision_network().state_dict(), "epoch": 3}, tmp_path / "x.pth")
    report = convert_weights(tmp_path / "x.pth", tmp_path / "x.pkl", "detectron2")
    assert "dropped, not tensors: epoch: 1" in report
    assert "dropped, detectron2 counts no batches: 20" in report


def unexplained(state: State) -> State:
    return {**state, "gate.weight": torch.ones(1)}


def incomplete(state: State) -> State:
    return {key: value for key, value in state.items() if key != "layer4.1.bn2.bias"}


def deep_stem(state: State) -> State:
    return {
        key.replace("conv1.weight", "conv1.0.weight") if key == "conv1.weight" else key: v for key, v in state.items()
    }


def not_finite(state: State) -> State:
    return {**state, "bn1.weight": torch.full((64,), torch.nan)}


@pytest.mark.parametrize(
    ("spoil", "rule"),
    [
        (unexplained, "gate.weight"),
        (incomplete, "layer4.1.bn2.bias"),
        (deep_stem, "convert needs a whole network"),
        (not_finite, "bn1.weight"),
    ],
)
def test_network_that_is_not_whole_is_refused_and_nothing_written(tmp_path: Path, spoil: Any, rule: str) -> None:
    torch.save(spoil(foreign.torchvision_network().state_dict()), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=rule):
        convert_weights(tmp_path / "x.pth", tmp_path / "out.pth", "timm")
    assert [path.name for path in tmp_path.iterdir()] == ["x.pth"]


@pytest.mark.parametrize(
    ("out", "to", "rule"),
    [
        ("x.pkl", "timm", "must end in .pth, .pt, .safetensors, got"),
        ("x.onnx", "detectron2", "must end in .pth, .pt, .safetensors, .pkl, got"),
        ("x.pth", "mxnet", "torchvision, timm, detectron2, transformers, got 'mxnet'"),
        ("nowhere/x.pth", "timm", "the folder of .* must exist"),
    ],
)
def test_impossible_target_is_refused(tmp_path: Path, out: str, to: str, rule: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=rule):
        convert_weights(tmp_path / "x.pth", tmp_path / out, to)


def test_converting_a_file_onto_itself_works(tmp_path: Path) -> None:
    state = foreign.torchvision_network().state_dict()
    torch.save({"state_dict": state}, tmp_path / "x.pth")
    convert_weights(tmp_path / "x.pth", tmp_path / "x.pth", "torchvision")
    assert differing(state, read(tmp_path / "x.pth")) == []
    assert isinstance(read(tmp_path / "x.pth"), OrderedDict)
