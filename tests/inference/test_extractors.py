"""Which parts of a model compute in another dtype and are replayed as graphs: its backbones, wherever they are."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import build, randomise_norms, relative_error
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from backbone import Backbone, FeaturePyramid, optimize_for_inference
from backbone.hosts.torchvision import as_torchvision
from backbone.inference.extractors import find_extractors
from backbone.inference.graphs import GraphedExtractor

without_a_device = pytest.mark.filterwarnings("ignore:cuda_graphs=True needs a CUDA device")


def body() -> Backbone:
    model = build("resnet18", norm="frozen_bn")
    randomise_norms(model)
    return model.eval()


class Deep(nn.Module):
    """Keeps its backbone where no rule would look for it, and has a head."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"level": nn.ModuleList([model])})
        self.head = nn.Conv2d(512, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.parts["level"][0](images)["c5"])  # type: ignore[no-any-return, index]


class Two(nn.Module):
    """Sees each image by two backbones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = body(), body()
        self.again = self.first
        self.head = nn.Conv2d(512, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.first(images)["c5"] + self.second(images)["c5"] + self.again(images)["c5"])  # type: ignore[no-any-return]


class Pyramid(nn.Module):
    """A library's pyramid around a backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.body = body()
        self.fpn = FeaturePyramidNetwork([spec.channels for spec in self.body.feature_specs.values()], 32)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.fpn(self.body(images))  # type: ignore[no-any-return]


def detector(extractor: nn.Module) -> nn.Module:
    model = nn.Module()
    model.backbone, model.head = extractor, nn.Conv2d(256, 4, 1)
    return model


def shell(extractor: nn.Module) -> nn.Module:
    model = nn.Module()
    model.network = extractor
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "a backbone": (body, [""]),
    "a pyramid": (lambda: FeaturePyramid(body()), [""]),
    "a detector of torchvision": (lambda: detector(as_torchvision(FeaturePyramid(body()))), ["backbone"]),
    "a library's pyramid": (lambda: detector(Pyramid()), ["backbone"]),
    "a shell in a detector": (lambda: detector(shell(body())), ["backbone.network"]),
    "deep inside": (lambda: Deep(body()), ["parts.level.0"]),
    "two": (Two, ["first", "second"]),
    "another library's": (lambda: detector(nn.Conv2d(3, 32, 1)), ["backbone"]),
    "none": (lambda: nn.Conv2d(3, 32, 1), [""]),
}


@pytest.mark.parametrize("name", MODELS)
def test_extractors_are_found_wherever_they_are(name: str) -> None:
    make, expected = MODELS[name]
    model = make()
    paths = {id(module): path for path, module in model.named_modules()}
    assert [paths[id(each)] for each in find_extractors(model)] == expected


@pytest.mark.parametrize("make", [lambda: Deep(body()), Two])
@torch.no_grad()
def test_heads_stay_in_float_beside_a_backbone_in_bfloat16(make: Callable[[], nn.Module]) -> None:
    model, images = make().eval(), torch.randn(1, 3, 64, 64)
    fast: Any = optimize_for_inference(model, dtype=torch.bfloat16)
    in_half = {name for name, parameter in fast.named_parameters() if parameter.dtype == torch.bfloat16}
    assert {name for name, _ in fast.named_parameters()} - in_half == {"head.weight", "head.bias"}
    assert fast.optimization.dtype == torch.bfloat16
    actual, expected = fast(images), model(images)
    assert actual.dtype == torch.float32
    assert 1e-5 < relative_error(actual, expected) < 3e-2


@torch.no_grad()
def test_a_shell_returns_features_in_the_dtype_asked_for() -> None:
    fast: Any = optimize_for_inference(nn.Sequential(body()), dtype=torch.bfloat16)
    assert fast(torch.randn(1, 3, 64, 64))["c5"].dtype == torch.bfloat16


@without_a_device
@torch.no_grad()
def test_each_backbone_is_replayed_as_a_graph_of_its_own() -> None:
    model, images = Two().eval(), torch.randn(1, 3, 64, 64)
    fast: Any = optimize_for_inference(model, cuda_graphs=True)
    assert isinstance(fast.first, GraphedExtractor)
    assert isinstance(fast.second, GraphedExtractor)
    assert fast.again is fast.first
    assert relative_error(fast(images), model(images)) <= 1e-5
    without = optimize_for_inference(fast)
    assert not any(isinstance(module, GraphedExtractor) for module in without.modules())
    assert relative_error(without(images), model(images)) <= 1e-5
