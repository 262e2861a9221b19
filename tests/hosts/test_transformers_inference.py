"""``optimize_for_inference`` reaches the backbone inside transformers' detectors, and leaves their heads in float32."""

import importlib
from typing import Any

import pytest
import torch
from conftest import randomise_norms, relative_error
from torch import nn

transformers = pytest.importorskip("transformers", minversion="5")

from transformers_detectors import DETECTORS, images  # noqa: E402

from backbone import optimize_for_inference  # noqa: E402
from backbone.hosts.transformers import TransformersBackboneConfig, find_backbone  # noqa: E402
from backbone.hosts.transformers.heads import CONV_NORM_LAYERS  # noqa: E402
from backbone.inference.graphs import GraphedExtractor  # noqa: E402

OUTPUTS = ("logits", "pred_boxes", "class_queries_logits", "masks_queries_logits")
CHOOSING = ("mask2former", "rt_detr", "d_fine", "deformable_detr")
"""They choose queries or masked places by scores, which without training are too close together to stay in order."""
NAMES = ["detr", "deformable_detr", "rt_detr", "d_fine", "mask2former", "maskformer", "upernet"]


def make(name: str) -> Any:
    detector = DETECTORS[name]
    torch.manual_seed(0)
    body = TransformersBackboneConfig({"name": "resnet18", "norm": detector.norm}, out_features=detector.features)
    model = detector.make(body).eval()
    randomise_norms(find_backbone(model))
    return model


def outputs(model: Any) -> dict[str, Any]:
    answer = model(images())
    return {name: answer[name] for name in OUTPUTS if answer.get(name) is not None}


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_backbone_computes_in_bfloat16_and_the_heads_in_float(name: str) -> None:
    model = make(name)
    fast: Any = optimize_for_inference(model, dtype=torch.bfloat16)
    network = find_backbone(fast).network
    inside = {id(parameter) for parameter in network.parameters()}
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in fast.parameters() if id(p) not in inside} == {torch.float32}
    assert fast.optimization.dtype == torch.bfloat16
    assert fast.optimization.folded >= 20
    assert {feature.dtype for feature in find_backbone(fast)(images()).feature_maps} == {torch.float32}
    expected, actual = outputs(model), outputs(fast)
    assert {output.dtype for output in actual.values()} == {torch.float32}
    if name not in CHOOSING:
        assert max(relative_error(actual[key], expected[key]) for key in expected) < 5e-2


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_maps_in_bfloat16_are_close_to_those_in_float(name: str) -> None:
    model = make(name)
    fast: Any = optimize_for_inference(model, dtype=torch.bfloat16)
    maps = zip(find_backbone(fast)(images()).feature_maps, find_backbone(model)(images()).feature_maps, strict=True)
    assert all(1e-6 < relative_error(actual, expected) < 3e-2 for actual, expected in maps)


@pytest.mark.filterwarnings("ignore:8-bit convolutions do not run here:UserWarning")
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_backbone_computes_in_8_bits_and_the_heads_in_float(name: str) -> None:
    model = make(name)
    fast: Any = optimize_for_inference(model, dtype=torch.int8, calibration=[images()] * 2)
    assert len(fast.optimization.int8) == 20
    assert {choice.dtype for choice in fast.optimization.int8} == {torch.int8}
    maps = zip(find_backbone(fast)(images()).feature_maps, find_backbone(model)(images()).feature_maps, strict=True)
    assert all(1e-4 < (actual - expected).norm() / expected.norm() < 0.1 for actual, expected in maps)
    expected, actual = outputs(model), outputs(fast)
    assert {output.dtype for output in actual.values()} == {torch.float32}
    if name not in CHOOSING:
        assert all((actual[key] - expected[key]).norm() / expected[key].norm() < 0.1 for key in expected)


@pytest.mark.filterwarnings("ignore:cuda_graphs=True needs a CUDA device")
@pytest.mark.parametrize("name", ["detr", "rt_detr", "mask2former", "upernet"])
@torch.no_grad()
def test_the_backbone_is_what_cuda_graphs_replay(name: str) -> None:
    model = make(name)
    fast: Any = optimize_for_inference(model, cuda_graphs=True).train(False)
    assert isinstance(find_backbone(fast).network, GraphedExtractor)
    expected, actual = outputs(model), outputs(fast)
    assert max(relative_error(actual[key], expected[key]) for key in expected) < 1e-4
    again = optimize_for_inference(fast)
    assert not any(isinstance(module, GraphedExtractor) for module in again.modules())


def test_weights_that_were_folded_are_not_kept() -> None:
    detector = DETECTORS["detr"]
    body = TransformersBackboneConfig({"name": "resnet18", "freeze_at": 3}, out_features=detector.features)
    fast = optimize_for_inference(detector.make(body).train())
    own = {id(parameter) for parameter in fast.parameters()}
    listed = find_backbone(fast)._frozen
    assert listed
    assert {id(parameter) for parameter in listed} <= own


@torch.no_grad()
def test_a_hosted_backbone_alone_returns_the_dtype_asked_for() -> None:
    body: Any = find_backbone(make("detr"))
    fast: Any = optimize_for_inference(body, dtype=torch.bfloat16)
    assert [feature.dtype for feature in fast(images()).feature_maps] == [torch.bfloat16]


@pytest.mark.parametrize("path", CONV_NORM_LAYERS)
def test_layers_of_heads_are_where_they_are_said_to_be(path: str) -> None:
    module, _, name = path.rpartition(".")
    assert hasattr(importlib.import_module(module), name)


@pytest.mark.parametrize("name", ["rt_detr", "rt_detr_v2", "d_fine", "upernet"])
@torch.no_grad()
def test_no_batch_norm_is_left_in_neck_and_head(name: str) -> None:
    model = make(name)
    randomise_norms(model)
    fast: Any = optimize_for_inference(model)
    assert [kept for kept in fast.optimization.kept if isinstance(fast.get_submodule(kept), nn.BatchNorm2d)] == []
    with torch.no_grad():
        expected, actual = model(images()), fast(images())
    if name == "upernet":
        assert relative_error(actual.logits, expected.logits) < 1e-4
    else:  # the neck's maps, before the best places are chosen
        maps = zip(actual.encoder_last_hidden_state, expected.encoder_last_hidden_state, strict=True)
        assert all(relative_error(*each) < 1e-4 for each in maps)
