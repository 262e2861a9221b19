"""norm: bn_eval, statistics fixed, weight and bias trained: exactly BatchNorm2d in evaluation mode."""

import copy

import pytest
import torch
from conftest import build, randomise_norms, relative_error
from torch import Tensor, nn

from backbone import Backbone, FreezeSchedule, freeze_report, freeze_stages, optimize_for_inference
from backbone.bn_eval import EvalBatchNorm2d, fix_statistics

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
