"""norm: bn_eval, statistics fixed, weight and bias trained: exactly BatchNorm2d in evaluation mode."""

import copy
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
import torch
from conftest import build, randomise_norms, relative_error
from torch import Tensor, nn

from backbone import (
    Backbone,
    FreezeSchedule,
    engine_enabled,
    freeze_norms,
    freeze_report,
    freeze_stages,
    optimize_for_inference,
)
from backbone.bn_eval import EvalBatchNorm2d, fix_statistics
from backbone.engine import gradient
from backbone.providers.resnet.blocks import BasicBlock, Bottleneck

NAMES = ("resnet18", "resnet50", "timm/resnet18d", "timm/regnetx_002", "timm/mobilenetv3_small_050")


def reference(model: Backbone, name: str, **settings: object) -> Backbone:
    """Return the same network with BatchNorm2d in evaluation mode, its parameters trainable."""
    plain = build(name, norm="bn", **settings)
    plain.load_state_dict(model.state_dict())
    plain.train()
    for module in plain.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return plain


def loss(model: Backbone, images: Tensor) -> Tensor:
    return torch.stack([feature.square().mean() for feature in model(images).values()]).sum()


@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_are_those_of_batch_norm_in_evaluation_mode(name: str) -> None:
    model = build(name, norm="bn_eval").double()
    randomise_norms(model)
    plain = reference(model, name).double()
    plain.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    model.train()
    for network in (model, plain):
        loss(network, images).backward()  # type: ignore[no-untyped-call]
    wanted = {key: p.grad for key, p in plain.named_parameters()}
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert relative_error(parameter.grad, wanted[key]) < 1e-9, key  # type: ignore[arg-type]


# on the engine's path


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "basic": lambda: BasicBlock(4, 4, norm=EvalBatchNorm2d),
    "basic, strided": lambda: BasicBlock(4, 4, norm=EvalBatchNorm2d, stride=2),
    "bottleneck": lambda: Bottleneck(4, 2, 4, norm=EvalBatchNorm2d),
    "bottleneck, strided": lambda: Bottleneck(4, 2, 6, norm=EvalBatchNorm2d, stride=2),
}
"""Residual blocks of few channels."""


def of_block(made: Any) -> tuple[Any, tuple[Tensor, ...]]:
    names = [name for name, _ in made.named_parameters()]

    def function(x: Tensor, *values: Tensor) -> Tensor:
        for name, value in zip(names, values, strict=True):
            path, _, leaf = name.rpartition(".")
            made.get_submodule(path)._parameters[leaf] = value
        return made(x)  # type: ignore[no-any-return]

    x = torch.randn(2, made.conv1.in_channels, 5, 5, dtype=torch.float64, requires_grad=True)
    return function, (x, *[p.detach().clone().requires_grad_() for p in made.parameters()])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the nodes that the engine makes, one a call."""
    made: list[int] = []
    apply: Any = gradient._FoldedLayers.apply

    def counted(*given: object) -> object:
        made.append(1)
        return apply(*given)

    monkeypatch.setattr(gradient._FoldedLayers, "apply", counted)
    return made


@pytest.mark.engine
@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_and_their_gradients_are_those_of_finite_differences(name: str, calls: list[int]) -> None:
    block = BLOCKS[name]().double()
    randomise_norms(block)
    for norm in block.modules():
        if isinstance(norm, EvalBatchNorm2d):
            norm.weight.data[0] = 0.0  # a dead channel has a gradient, too
    function, inputs = of_block(block)
    assert torch.autograd.gradcheck(function, inputs)
    assert calls
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.engine
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet50d", "timm/resnet18d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_engine_is_as_exact_as_the_modules(name: str, dtype: torch.dtype, calls: list[int]) -> None:
    model = build(name, norm="bn_eval").train()
    randomise_norms(model)
    images, exact = torch.randn(2, 3, 64, 64), copy.deepcopy(model).double()
    with engine_enabled(False):
        loss(exact, images.double()).backward()  # type: ignore[no-untyped-call]
    truth: dict[str, Any] = {key: parameter.grad for key, parameter in exact.named_parameters()}
    errors = []
    for is_on in (False, True):
        model.zero_grad()
        with engine_enabled(is_on), torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            value = loss(model, images)
        value.backward()  # type: ignore[no-untyped-call]
        assert bool(calls) == is_on
        found: dict[str, Any] = {key: parameter.grad for key, parameter in model.named_parameters()}
        for ending in ("weight", "bias"):
            errors.append(median(relative_error(found[k].double(), truth[k]) for k in truth if k.endswith(ending)))
    assert len(calls) >= 8
    of_modules, ours = errors[:2], errors[2:]
    assert all(mine < 4 * theirs for mine, theirs in zip(ours, of_modules, strict=True)), errors


@pytest.mark.engine
@pytest.mark.parametrize("trains", ["weight", "bias", "both", "convolutions"])
def test_parts_train_alone(trains: str, calls: list[int]) -> None:
    model = build("resnet18", norm="bn_eval").double().train()
    randomise_norms(model)
    plain = reference(model, "resnet18").double()
    plain.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for network in (model, plain):
        for module in network.modules():
            is_norm = hasattr(module, "running_mean")
            for name, parameter in module.named_parameters(recurse=False):
                wanted = {"both": is_norm, "convolutions": not is_norm}.get(trains, is_norm and name == trains)
                parameter.requires_grad_(wanted)
        loss(network, images).backward()  # type: ignore[no-untyped-call]
    expected = {key: p.grad for key, p in plain.named_parameters()}
    for key, parameter in model.named_parameters():
        assert (parameter.grad is None) == (expected[key] is None) == (not parameter.requires_grad)
        if parameter.grad is not None:
            assert relative_error(parameter.grad, expected[key]) < 1e-9, key  # type: ignore[arg-type]
    assert calls


@pytest.mark.engine
def test_a_frozen_norm_beside_those_that_train_stays_frozen(calls: list[int]) -> None:
    model: Any = build("resnet18", norm="bn_eval", out_features=["c3"]).double().train()
    randomise_norms(model)
    freeze_norms(model.layer2[0].bn1)
    images, gradients = torch.randn(1, 3, 64, 64, dtype=torch.float64), []
    for is_on in (False, True):
        model.zero_grad()
        with engine_enabled(is_on):
            loss(model, images).backward()  # type: ignore[no-untyped-call]
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    plain, ours = gradients
    assert len(calls) == 5
    assert "layer2.0.bn1.weight" not in ours
    assert plain.keys() == ours.keys()
    assert max(relative_error(ours[key], plain[key]) for key in plain) < 1e-9


@pytest.mark.engine
def test_no_map_is_kept_for_the_norms() -> None:
    kept = {}
    for norm in ("bn_eval", "frozen_bn"):
        model = build("resnet50", norm=norm).train()
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            if tensor.ndim == 4:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(torch.randn(1, 3, 64, 64))
        kept[norm] = sum(sizes.values())
    assert kept["bn_eval"] == kept["frozen_bn"]


def test_a_norm_that_is_watched_is_called(calls: list[int]) -> None:
    model, seen = build("resnet18", norm="bn_eval", out_features=["c2"]).train(), []
    for norm in model.modules():
        if isinstance(norm, EvalBatchNorm2d):
            norm.register_forward_hook(lambda *_: seen.append(1))
    loss(model, torch.randn(1, 3, 64, 64)).backward()  # type: ignore[no-untyped-call]
    assert (len(seen), calls) == (5, [])


def test_what_trains_is_never_out_of_date() -> None:
    model, images = build("resnet18", norm="bn_eval", out_features=["c3"]).train(), torch.randn(1, 3, 64, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        loss(model, images).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with engine_enabled(False):
        expected = model(images)["c3"]
    assert relative_error(model(images)["c3"], expected) < 1e-5


@pytest.mark.parametrize("name", ["resnet18", "timm/resnet18d"])
def test_training_moves_weight_and_bias_and_no_statistics(name: str) -> None:
    model = build(name, norm="bn_eval")
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss(model.train(), torch.randn(2, 3, 64, 64)).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {key for key, _ in model.named_parameters()}


@pytest.mark.parametrize("name", ["resnet18", "timm/resnet18d"])
def test_state_dicts_fit_batch_norm_both_ways(name: str) -> None:
    model, plain = build(name, norm="bn_eval"), build(name, norm="bn")
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    state = {key: value for key, value in plain.state_dict().items() if "num_batches" not in key}
    model.load_state_dict(state)  # as torchvision's and detectron2's frozen norms save them


def test_a_converter_of_batch_norms_cannot_move_it() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(build(norm="bn_eval"))  # type: ignore[no-untyped-call]
    assert sum(isinstance(module, EvalBatchNorm2d) for module in model.modules()) == 20


def test_freezing_and_thawing_give_it_back_with_the_same_parameters() -> None:
    model = build(norm="bn_eval")
    parameters = list(model.parameters())
    freeze_stages(model, 2)
    assert [(stage.norm, stage.frozen) for stage in freeze_report(model).values()] == [
        *[("frozen_bn", True)] * 2,
        *[("bn_eval", False)] * 3,
    ]
    schedule = FreezeSchedule({0: 2, 3: 0})
    assert not schedule.apply(model, 0)
    assert schedule.apply(model, 3)
    assert {stage.norm for stage in freeze_report(model).values()} == {"bn_eval"}
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(parameter.requires_grad for parameter in parameters)


def test_a_frozen_stage_gives_the_same_features() -> None:
    model = build(norm="bn_eval").eval()
    randomise_norms(model)
    images = torch.randn(1, 3, 64, 64)
    before = model(images)
    freeze_stages(model, 5)
    assert all(relative_error(model(images)[level], feature) < 1e-5 for level, feature in before.items())


def test_it_is_folded_for_inference() -> None:
    model = build(norm="bn_eval").eval()
    randomise_norms(model)
    fast = optimize_for_inference(model)
    images = torch.randn(1, 3, 64, 64)
    assert fast.optimization.folded == 20  # type: ignore[union-attr]
    with torch.no_grad():
        expected, features = model(images), fast(images)
    assert all(relative_error(features[level], expected[level]) < 1e-4 for level in expected)


def test_it_keeps_the_dtype_under_autocast() -> None:
    norm = EvalBatchNorm2d(4)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(torch.randn(1, 4, 8, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_it_copies_pickles_and_moves() -> None:
    norm = copy.deepcopy(EvalBatchNorm2d(4)).double().train()
    assert not norm.training
    assert norm(torch.randn(2, 4, 3, 3, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4, track_running_stats=False), nn.BatchNorm3d(4)]
)
def test_norms_that_cannot_be_fixed_are_refused_and_nothing_is_touched(norm: nn.Module) -> None:
    module = nn.Sequential(nn.BatchNorm2d(4), norm)
    with pytest.raises(ValueError, match="norm must not be bn_eval for a network with"):
        fix_statistics(module)
    assert type(module[0]) is nn.BatchNorm2d
