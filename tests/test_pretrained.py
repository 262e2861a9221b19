"""A model in a folder, and the same model out of it, in another process too."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomise_norms
from torch import Tensor, nn

from backbone import (
    Backbone,
    FeaturePyramid,
    Preprocessing,
    build_backbone,
    find_backbone,
    freeze_report,
    from_pretrained,
    load_weights,
    optimize_for_inference,
    save_pretrained,
    thaw_norms,
)
from backbone.hosts.torchvision import as_torchvision, build_detector

ROOT = Path(__file__).parent.parent
IMAGES = torch.rand(1, 3, 64, 64)
BGR = Preprocessing((1.0, 2.0, 3.0), (4.0, 5.0, 6.0), "bgr", (0.0, 255.0), "bicubic")


def resnet(**settings: Any) -> Backbone:
    return build_backbone("resnet18", **{"out_features": ["c2", "c3"], **settings})


def with_odd_state() -> Backbone:
    """A backbone whose state no single key of a config says."""
    model = resnet(freeze_at=1)
    thaw_norms(model.get_submodule("layer2"))
    model.get_submodule("layer1.0.bn1").eps = 0.0  # type: ignore[assignment]
    model.get_parameter("layer2.0.conv1.weight").requires_grad_(False)
    return model


MODELS: dict[str, Any] = {
    "backbone": lambda: resnet(norm="bn", freeze_at=2),
    "frozen norms": resnet,
    "odd state": with_odd_state,
    "bfloat16": lambda: resnet(norm="bn").to(torch.bfloat16),
    "one channel, dilated": lambda: resnet(in_channels=1, norm="gn", output_stride=16, out_features=["c5"]),
    "pyramid": lambda: FeaturePyramid(
        resnet(freeze_at=2), out_channels=8, extra_levels="p6p7", norm="bn", average=True
    ),
    "timm": lambda: build_backbone("timm/test_convnext", freeze_at=2),
    "timm pyramid": lambda: FeaturePyramid(build_backbone("timm/test_efficientnet", norm="bn"), out_channels=8),
    "detector": lambda: build_detector("fcos", resnet(freeze_at=2), num_classes=3, pyramid={"out_channels": 32}),
    "C4 detector": lambda: build_detector(
        "faster_rcnn",
        build_backbone("resnet18", out_features=["c4", "c5"], norm="bn"),
        pyramid=None,
        box_head="c5",
        num_classes=3,
        train={"freeze_schedule": {0: 2, 5: 0}},
    ),
}


def facts(model: nn.Module) -> dict[str, Any]:
    """Return all that must be equal."""
    norms = {path: module for path, module in model.named_modules() if hasattr(module, "running_var")}
    backbone = find_backbone(model)
    return {
        "types": {path: type(module).__name__ for path, module in norms.items()},
        "eps": {path: norm.eps for path, norm in norms.items()},
        "trainable": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "preprocessing": (backbone.preprocessing, backbone.known_preprocessing),
        "specs": backbone.feature_specs,
        "report": freeze_report(backbone),
        "config": getattr(model, "config", None),
    }


def same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return actual.keys() == expected.keys() and all(
        actual[key].dtype == expected[key].dtype and torch.equal(actual[key], expected[key]) for key in expected
    )


@pytest.mark.parametrize("kind", MODELS)
def test_everything_is_as_it_was(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]()
    randomise_norms(model)
    find_backbone(model).preprocessing = BGR
    loaded = from_pretrained(save_pretrained(model, tmp_path / "saved"))
    assert same(loaded.state_dict(), model.state_dict())
    assert facts(loaded) == facts(model)
    assert not loaded.training


@pytest.mark.parametrize("kind", ["odd state", "pyramid", "timm"])
def test_training_goes_on_as_it_would_have(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]()
    loaded = from_pretrained(save_pretrained(model, tmp_path))
    gradients = []
    for each in (model, loaded):
        torch.manual_seed(0)
        sum(feature.square().mean() for feature in each.train()(IMAGES).values()).backward()
        gradients.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None})
    assert same(*gradients)


def test_another_process_gives_the_same_features(tmp_path: Path) -> None:
    models = {"pyramid": MODELS["pyramid"](), "timm": MODELS["timm"]()}
    for name, model in models.items():
        randomise_norms(model)
        model.save_pretrained(tmp_path / name)
    torch.save(IMAGES, tmp_path / "images.pt")
    code = (
        "import sys, torch, backbone\n"
        "assert not {'huggingface_hub', 'torchvision'} & set(sys.modules)\n"
        "images = torch.load('images.pt')\n"
        "for name in ('pyramid', 'timm'):\n"
        "    torch.save(backbone.Backbone.from_pretrained(name)(images), f'{name}.pt')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, env=environment, check=True)
    for name, model in models.items():
        with torch.no_grad():
            expected = model.eval()(IMAGES)
        actual = torch.load(tmp_path / f"{name}.pt")
        assert all(torch.allclose(actual[key], expected[key], atol=1e-6) for key in expected)


def test_files_have_the_hubs_names_and_load_as_weights(tmp_path: Path) -> None:
    model = resnet(norm="bn")
    model.preprocessing = BGR
    folder = model.save_pretrained(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    other = resnet(norm="bn")
    other.preprocessing = BGR
    load_weights(other, folder / "model.safetensors")
    assert same(other.state_dict(), model.state_dict())
    assert other.preprocessing == BGR


def test_weights_named_in_the_config_are_not_fetched_again(tmp_path: Path) -> None:
    model = resnet(norm="bn")
    torch.save(model.state_dict(), tmp_path / "gone.pth")
    built = resnet(weights=tmp_path / "gone.pth", norm="bn")
    folder = built.save_pretrained(tmp_path / "saved")
    (tmp_path / "gone.pth").unlink()
    assert from_pretrained(folder).config == built.config


def test_id_is_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    folder = resnet(norm="bn").save_pretrained(tmp_path)
    asked = []

    def download(repo_id: str, filename: str, **options: Any) -> str:
        asked.append((repo_id, filename, options))
        return str(folder / filename)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.setenv("HF_ENDPOINT", "http://localhost")  # a name that is known without a network
    assert isinstance(from_pretrained("org/net", revision="v1"), Backbone)
    assert asked == [("org/net", name, {"revision": "v1"}) for name in ("config.json", "model.safetensors")]


def test_missing_hub_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs huggingface_hub: pip install 'backbone\[hub\]'"):
        from_pretrained("org/net")


UNSAVABLE: dict[str, tuple[Any, str]] = {
    "a module of others": (lambda: nn.Linear(1, 1), "takes a backbone, a FeaturePyramid or a detector .* got Linear"),
    "an optimised copy": (lambda: optimize_for_inference(resnet()), "an optimised copy cannot be saved"),
    "a wrapper": (lambda: as_torchvision(FeaturePyramid(resnet(), out_channels=8)), "got a TorchvisionBackbone around"),
    "a norm without a name": (
        lambda: FeaturePyramid(resnet(), out_channels=8, norm=nn.InstanceNorm2d),
        "a pyramid's norm must be a name to be saved",
    ),
}


@pytest.mark.parametrize(("make", "message"), UNSAVABLE.values(), ids=list(UNSAVABLE))
def test_what_no_config_says_is_refused(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        save_pretrained(make(), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_backbone_made_by_hand_is_refused(tmp_path: Path) -> None:
    from backbone.providers.resnet.network import FAMILY, ResNet

    with pytest.raises(ValueError, match="must come from build_backbone to be saved, got a ResNet made by hand"):
        ResNet(FAMILY["resnet18"]).save_pretrained(tmp_path)


def test_another_kind_than_the_class_is_refused(tmp_path: Path) -> None:
    folder = save_pretrained(MODELS["detector"](), tmp_path)
    with pytest.raises(ValueError, match=r"must hold a Backbone, got a FCOS; load it by backbone\.from_pretrained"):
        Backbone.from_pretrained(folder)


def spoil_config(folder: Path, **changes: Any) -> None:
    saved = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**saved, **changes}))


SPOILT: dict[str, tuple[Any, type[Exception], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), FileNotFoundError, "got no config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, "got no model.safetensors"),
    "another library's": (
        lambda f: (f / "config.json").write_text('{"model_type": "resnet"}'),
        ValueError,
        "got 'resnet'",
    ),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), ValueError, "got 'no JSON'"),
    "cut": (lambda f: os.truncate(f / "model.safetensors", 1000), ValueError, "it may be truncated"),
    "another network": (
        lambda f: spoil_config(f, config={"name": "resnet34", "out_features": ["c2", "c3"]}),
        ValueError,
        "must fit the network of its config.json, got .* tensors that differ",
    ),
    "an unknown key": (
        lambda f: spoil_config(f, config={"name": "resnet18", "freez": 1}),
        ValueError,
        "unknown key 'freez'",
    ),
}


@pytest.mark.parametrize(("spoil", "error", "message"), SPOILT.values(), ids=list(SPOILT))
def test_folder_that_is_not_whole_is_refused(spoil: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    folder = resnet(norm="bn").save_pretrained(tmp_path)
    spoil(folder)
    with pytest.raises(error, match=message):
        from_pretrained(folder)


@pytest.mark.parametrize("source", ["./nowhere", "nowhere", "a/b/c"])
def test_missing_folder_is_named(source: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"takes an existing folder or an id such as org/name, got '{source}'"):
        from_pretrained(source)
