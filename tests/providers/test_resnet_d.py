"""ResNet-D of our family: timm's features and gradients, strides, norms and weights; RT-DETR's variants."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build, randomise_norms, relative_error
from safetensors.torch import load_file
from torch import Tensor, nn

from backbone import convert_weights, inspect_weights, load_weights, optimize_for_inference
from backbone.engine import engine_enabled
from backbone.providers.resnet.resnet_d import DeepStem

timm = pytest.importorskip("timm")

PARITY = 1e-5
NAMES = ["resnet18d", "resnet34d", "resnet50d", "resnet101d", "resnet152d"]
TESTED = ["resnet18d", "resnet50d"]


def theirs(name: str, **settings: Any) -> Any:
    model = timm.create_model(name, **settings).eval()
    randomise_norms(model)
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value for key, value in model.state_dict().items() if not key.startswith("fc.")}


def their_features(model: Any, images: Tensor) -> list[Tensor]:
    x = model.maxpool(model.act1(model.bn1(model.conv1(images))))
    return [x := layer(x) for layer in (model.layer1, model.layer2, model.layer3, model.layer4)]


def same(first: Any, second: Any) -> bool:
    return all(relative_error(a, b) < PARITY for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_names_and_shapes_are_timms_at_every_depth(name: str) -> None:
    with torch.device("meta"):
        ours = build(name, num_classes=1000).state_dict()
        expected = timm.create_model(name).state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in expected.items()}


@pytest.mark.parametrize("output_stride", [32, 16, 8])
@pytest.mark.parametrize("norm", ["bn", "frozen_bn"])
@pytest.mark.parametrize("name", TESTED)
def test_features_are_timms(name: str, norm: str, output_stride: int) -> None:
    their = theirs(name, output_stride=output_stride)
    ours = build(name, norm=norm, output_stride=output_stride).eval()
    ours.load_state_dict(state(their))
    images = torch.randn(1, 3, 43, 59)
    with torch.no_grad():
        expected = their_features(their, images)
        assert same(ours(images).values(), expected)
        assert same(optimize_for_inference(ours)(images).values(), expected)


@pytest.mark.parametrize("name", TESTED)
def test_gradients_are_timms(name: str) -> None:
    their = theirs(name).double()
    ours = build(name, norm="frozen_bn").double().eval()
    ours.load_state_dict(state(their))
    images = torch.randn(1, 3, 43, 59, dtype=torch.float64)
    for features in (their_features(their, images), ours(images).values()):
        sum(feature.square().mean() for feature in features).backward()  # type: ignore[union-attr]
    weights = [key for key, value in ours.named_parameters() if value.requires_grad]
    for key in weights:
        assert relative_error(ours.get_parameter(key).grad, their.get_parameter(key).grad) < PARITY, key  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["resnet50d", "resnet18vd"])
def test_the_engine_changes_nothing_but_the_time(name: str) -> None:
    model = build(name, norm="frozen_bn").eval()
    randomise_norms(model)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad(), engine_enabled(False):
        expected = list(model(images).values())
    with torch.no_grad():
        assert same(model(images).values(), expected)


def test_every_norm_is_folded_in_an_inference_copy() -> None:
    fast = optimize_for_inference(build("resnet50d"))
    assert fast.optimization.kept == ()  # type: ignore[union-attr]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())


@pytest.mark.parametrize("name", ["resnet18vd", "resnet34vd"])
def test_rt_detrs_small_networks_project_c2(name: str) -> None:
    extra = build(name).state_dict().keys() - build(name.replace("vd", "d")).state_dict().keys()
    assert {key.rpartition(".")[0] for key in extra} == {"layer1.0.downsample.1", "layer1.0.downsample.2"}


@pytest.mark.parametrize("norm", ["sync_bn", "gn"])
def test_other_norms_reach_stem_and_shortcuts(norm: str) -> None:
    kinds = {type(module) for module in build("resnet18d", norm=norm).modules()}
    assert nn.BatchNorm2d not in kinds
    assert build("resnet18d", norm=norm).eval()(torch.zeros(1, 3, 64, 64))["c5"].shape == (1, 512, 2, 2)


@pytest.mark.parametrize("channels", [1, 4])
def test_a_deep_stem_takes_other_channels(channels: int, tmp_path: Path) -> None:
    torch.save(theirs("resnet18d").state_dict(), tmp_path / "x.pth")
    model = build("resnet18d", in_channels=channels)
    report = load_weights(model, tmp_path / "x.pth", name="resnet18d")
    assert model.get_parameter("conv1.0.weight").shape[1] == channels
    assert any("conv1.0.weight" in line for line in report.adapted)


@pytest.mark.parametrize("wrapper", ["", "module.", "backbone.", "model.backbone.body."])
def test_timms_weights_load_and_are_named(wrapper: str, tmp_path: Path) -> None:
    their = theirs("resnet18d")
    torch.save({f"{wrapper}{key}": value for key, value in their.state_dict().items()}, tmp_path / "x.pth")
    model = build("resnet18d").eval()
    load_weights(model, tmp_path / "x.pth", name="resnet18d")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert same(model(images).values(), their_features(their, images))
    assert inspect_weights(tmp_path / "x.pth").network == "resnet18d"


@pytest.mark.parametrize("to", ["timm", "transformers"])
def test_conversion_out_and_in_is_the_same(to: str, tmp_path: Path) -> None:
    torch.save(theirs("resnet18d").state_dict(), tmp_path / "x.pth")
    told = convert_weights(tmp_path / "x.pth", tmp_path / "y.safetensors", to)
    assert ("has no classifier: 2" in told) == (to == "transformers")
    first, second = build("resnet18d"), build("resnet18d")
    load_weights(first, tmp_path / "x.pth", name="resnet18d")
    load_weights(second, tmp_path / "y.safetensors", name="resnet18d")
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))
    assert ("embedder.embedder.0.convolution.weight" in load_file(tmp_path / "y.safetensors")) == (to == "transformers")


def test_conversion_to_a_library_without_it_is_refused(tmp_path: Path) -> None:
    torch.save(theirs("resnet18d").state_dict(), tmp_path / "x.pth")
    with pytest.raises(ValueError, match="detectron2 has no network with a deep stem, got resnet18d"):
        convert_weights(tmp_path / "x.pth", tmp_path / "y.pth", "detectron2")


class Negated(DeepStem):
    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)  # type: ignore[no-any-return, no-untyped-call]


CHANGED_STEMS: dict[str, Callable[[DeepStem], object]] = {
    "of a subclass": lambda layers: setattr(layers, "__class__", Negated),
    "with a layer more": lambda layers: layers.append(nn.Tanh()),
    "with a block more": lambda layers: layers.extend([nn.Tanh(), nn.Conv2d(64, 64, 1), nn.ReLU()]),
    "with a layer less": lambda layers: layers.pop(5),
    "with a hook that changes its output": lambda layers: layers.register_forward_hook(lambda *given: -given[-1]),
}


@pytest.mark.parametrize("change", CHANGED_STEMS)
@torch.no_grad()
def test_a_deep_stem_that_was_changed_computes_what_it_is(change: str) -> None:
    model, images = build("resnet18d", norm="frozen_bn", out_features=["c2"]).eval(), torch.randn(1, 3, 64, 64)
    randomise_norms(model)
    CHANGED_STEMS[change](model.get_submodule("conv1"))  # type: ignore[arg-type]
    with engine_enabled(False):
        expected = model(images)["c2"]
    for network in (model, optimize_for_inference(model)):
        assert relative_error(network(images)["c2"], expected) <= 1e-5
