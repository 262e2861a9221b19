"""Files of networks that are no ResNet: told as what they are, refused with a remedy, and renamed by the caller."""

import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from conftest import build
from typer.testing import CliRunner

from backbone import inspect_weights, load_weights, optimize_for_inference
from backbone.command.app import app
from backbone.features import Preprocessing
from backbone.weights.formats import timm_networks
from backbone.weights.metadata import HEADER_KEY, Metadata

CONVNEXT = "timm/convnext_atto"


def saved(content: Any, folder: Path) -> Path:
    torch.save(content, folder / "x.pth")
    return folder / "x.pth"


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], terminal_width=400)
    return result.exit_code, " ".join(result.output.split())


# --- inspect --------------------------------------------------------------------------------------------------------

TIMMS = {
    # timm's name, what must be told: all networks of these names and shapes, and the means of their own weights
    "efficientnet_b0": ("timm/tf_efficientnet_b0 or timm/efficientnet_b0", {"0.485, 0.456, 0.406"}),
    "tf_efficientnet_lite0": (
        "timm/tf_efficientnet_lite0 or timm/efficientnet_lite0",
        {"0.5, 0.5, 0.5", "0.485, 0.456, 0.406"},
    ),
    "legacy_xception": ("timm/legacy_xception", {"0.5, 0.5, 0.5"}),
    "densenet121": ("timm/densenet121", {"0.485, 0.456, 0.406"}),
}


@pytest.mark.parametrize("name", TIMMS)
def test_timms_network_is_told_from_its_tensors(tmp_path: Path, name: str) -> None:
    network, means = TIMMS[name]
    found = inspect_weights(saved(timm.create_model(name, num_classes=7).state_dict(), tmp_path))
    assert (found.format, found.network, found.unexplained) == ("timm", network, [])
    assert all(any(f"mean ({mean})" in line for line in found.training) for mean in means)
    assert not any("stride in" in line or "dilat" in line for line in found.training)


def test_mobilenet_is_told_from_the_module_it_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    list_models = timm.list_models
    monkeypatch.setattr(timm, "list_models", lambda module: list_models("*_small_100*", module=module))  # saves seconds
    found = inspect_weights(saved(timm.create_model("mobilenetv3_small_100").state_dict(), tmp_path))
    assert found.network == "timm/mobilenetv3_small_100 or timm/tf_mobilenetv3_small_100"
    assert "mean (0.5, 0.5, 0.5)" in found.training[1]


def test_architecture_that_the_file_names_is_not_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm_networks, "create", lambda name: pytest.fail("built"))
    state = timm.create_model("mobilenetv3_small_050").state_dict()
    content = {"arch": "mobilenetv3_small_050", "version": 2, "state_dict": state}
    found = inspect_weights(saved(content, tmp_path))
    assert (found.network, found.prefix) == ("timm/mobilenetv3_small_050", "state_dict.")


@pytest.mark.parametrize("prefix", ["", "backbone.body."], ids=["backbone.pth", "model.pth"])
def test_our_own_file_is_told_by_its_metadata(tmp_path: Path, prefix: str) -> None:
    name, pixels = "timm/tf_efficientnet_lite0", Preprocessing((0.5,) * 3, (0.5,) * 3)
    state = OrderedDict({prefix + k: v for k, v in build(name).state_dict().items()})
    state["roi_heads.box_predictor.cls_score.weight"] = torch.ones(2, 2)
    facts = Metadata("a run", known=True, preprocessing=pixels, stride_in_1x1=False, network=name)
    state._metadata = OrderedDict({HEADER_KEY: facts.to_json()})  # type: ignore[attr-defined]
    found = inspect_weights(saved(state, tmp_path))
    assert (found.network, found.prefix) == (name, f"{prefix}network.")
    (line,) = found.training
    assert "mean (0.5, 0.5, 0.5)" in line
    assert "known: a run" in line


@pytest.mark.parametrize("name", ["regnet_y_400mf", "mobilenet_v3_small", "convnext_tiny"])
def test_other_networks_of_torchvision_are_unknown_rather_than_resnets(tmp_path: Path, name: str) -> None:
    found = inspect_weights(saved(torchvision.models.get_model(name).state_dict(), tmp_path))
    assert (found.format, found.network, found.training) == ("unknown", "unknown", [])


def test_without_timm_it_is_unknown_and_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(timm.create_model("legacy_xception").state_dict(), tmp_path)
    monkeypatch.setitem(sys.modules, "timm", None)
    assert inspect_weights(path).network == "unknown"


def test_numbers_that_no_network_has_are_told(tmp_path: Path) -> None:
    state = build("resnet18").state_dict()
    state["layer3.0.conv1.weight"][0, 0] = torch.nan
    path = saved(state, tmp_path)
    assert inspect_weights(path).numbers == ["wrong: 1 not finite, or a negative variance (layer3.0.conv1.weight)"]
    assert "layer3.0.conv1.weight" in run("inspect", path)[1].split("tensor")[0]


@pytest.mark.parametrize("name", ["resnet18", "timm/tf_efficientnet_lite0"])
def test_state_dict_of_an_inference_copy_is_told_and_refused(tmp_path: Path, name: str) -> None:
    copy = optimize_for_inference(build(name, norm="frozen_bn"))
    path = saved(copy.state_dict(), tmp_path)
    assert any("inference copy" in line for line in inspect_weights(path).norms)
    with pytest.raises(ValueError, match=r"got an inference copy's.*before optimize_for_inference"):
        load_weights(build(name), path, name=name)


# --- load -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: torchvision.models.convnext_tiny().state_dict(),
        lambda: torchvision.models.resnet18().state_dict(),
        lambda: {"model": {"encoder.a": torch.ones(1)}},
    ],
    ids=["torchvision's ConvNeXt", "a ResNet", "nothing of the kind"],
)
def test_file_that_timm_does_not_take_gets_counts_and_a_remedy(tmp_path: Path, make: Callable[[], Any]) -> None:
    words = r"does not fit timm/convnext_atto: it is of .*\d+ missing \(stem.*rename="
    with pytest.raises(ValueError, match=words) as caught:
        load_weights(build(CONVNEXT), saved(make(), tmp_path), name=CONVNEXT)
    assert len(str(caught.value)) < 900


def test_names_are_turned_into_the_networks_own(tmp_path: Path) -> None:
    theirs = timm.create_model("convnext_atto").state_dict()
    foreign = {f"trunk.{key.replace('stages', 'phases')}": value for key, value in theirs.items()}
    path = saved({**foreign, "teacher.weight": torch.ones(1)}, tmp_path)

    def rename(key: str) -> str | None:
        return None if key.startswith("teacher") else key.removeprefix("trunk.").replace("phases", "stages")

    model = build(CONVNEXT)
    load_weights(model, path, name=CONVNEXT, rename=rename)
    assert torch.equal(model.state_dict()["network.stem.0.weight"], theirs["stem.0.weight"])


def test_renamed_resnet_is_recognised_like_any(tmp_path: Path) -> None:
    state = {f"net_{key}": value for key, value in torchvision.models.resnet18().state_dict().items()}
    report = load_weights(
        build("resnet18"), saved(state, tmp_path), name="resnet18", rename=lambda key: key.removeprefix("net_")
    )
    assert report.format == "torchvision"


@pytest.mark.parametrize(
    ("rename", "error", "words"),
    [
        (lambda key: "same", ValueError, "a name of its own, got 'same' for 'conv1.weight' and"),
        (lambda key: 3, TypeError, "must return a string, or None to drop a key, got 3 for 'conv1.weight'"),
        (lambda key: None, ValueError, "dropped all 122"),
    ],
)
def test_renaming_that_cannot_be_meant_is_refused(tmp_path: Path, rename: Any, error: Any, words: str) -> None:
    path = saved(torchvision.models.resnet18().state_dict(), tmp_path)
    with pytest.raises(error, match=words):
        load_weights(build("resnet18"), path, name="resnet18", rename=rename)


@pytest.mark.parametrize("name", ["resnet18", "timm/tf_efficientnet_lite0"])
def test_lightnings_checkpoint_loads_as_weights(tmp_path: Path, name: str) -> None:
    before = build(name, out_features=["c2", "c3"]).state_dict()
    state = {f"detector.backbone.body.{k}": v for k, v in before.items()}
    head = {"detector.rpn.head.conv.weight": torch.ones(2), "detector.backbone.fpn.a.weight": torch.ones(2)}
    training: dict[str, Any] = {
        "epoch": 1,
        "global_step": 9,
        "pytorch-lightning_version": "2.6.6",
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 2}}}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}],
        "lr_schedulers": [{"base_lrs": [0.1]}],
        "callbacks": {"History": {"epochs": [{"loss": 1.0}]}},
        "recipe": {"backbone": {"name": name}},
    }
    torch.save({**training, "state_dict": {**state, **head}}, tmp_path / "last.ckpt")
    model = build(name, out_features=["c2", "c3"])
    report = load_weights(model, tmp_path / "last.ckpt", name=name)
    assert report.prefix == "state_dict.detector.backbone.body."
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert inspect_weights(tmp_path / "last.ckpt").network == name


# --- convert --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["x.pth", "other.pth"])
def test_file_is_replaced_only_when_asked(tmp_path: Path, out: str) -> None:
    source = saved(torchvision.models.resnet18().state_dict(), tmp_path)
    if out != source.name:
        (tmp_path / out).write_bytes(b"precious")
    before = (tmp_path / out).read_bytes()
    code, output = run("convert", source, tmp_path / out, "--to", "timm")
    assert code == 2
    assert "--overwrite" in output
    assert (tmp_path / out).read_bytes() == before
    assert run("convert", source, tmp_path / out, "--to", "timm", "--overwrite")[0] == 0
    assert inspect_weights(tmp_path / out).network == "resnet18"
