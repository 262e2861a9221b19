"""Freezing among converters, pruning, wrappers and other libraries' ways to freeze."""

import copy
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torchvision
from conftest import build, randomise_norms, relative_error
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.nn.utils import parametrize, prune

from backbone import (
    Backbone,
    FreezeSchedule,
    FrozenBatchNorm2d,
    engine_enabled,
    freeze_norms,
    freeze_report,
    freeze_stages,
    optimize_for_inference,
    thaw_norms,
)

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def norms_of(model: nn.Module) -> dict[str, nn.Module]:
    return {path: module for path, module in model.named_modules() if hasattr(module, "running_var")}


def test_freezing_and_thawing_keep_every_module_object() -> None:
    model = build()
    before = dict(model.named_modules())
    for freeze_at in (3, 5, 1, 0):
        freeze_stages(model, freeze_at)
        assert all(module is before[path] for path, module in model.named_modules())
        assert len(before) == sum(1 for _ in model.modules())


@pytest.mark.filterwarnings("ignore:.*frozen at random weights")
@pytest.mark.parametrize("norm", ["frozen_bn", "sync_bn"])
def test_built_norms_stay_the_same_objects_through_freeze_and_thaw_norms(norm: str) -> None:
    model = build(norm=norm)
    before = norms_of(model)
    thaw_norms(freeze_norms(thaw_norms(model)))
    assert all(module is before[path] for path, module in norms_of(model).items())
    assert not any(isinstance(module, FrozenBatchNorm2d) for module in model.modules())


def test_a_hook_on_a_norm_goes_on_being_called_while_it_is_frozen() -> None:
    model, calls = build(), []
    model.get_submodule("bn1").register_forward_hook(lambda *_: calls.append(1))
    for freeze_at in (0, 2, 0):
        freeze_stages(model, freeze_at)
        model.eval()(IMAGES)
    assert len(calls) == 3


def converted(model: nn.Module) -> Any:
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]


def converted_by_timm(model: nn.Module) -> Any:
    layers = pytest.importorskip("timm.layers", reason="timm is not installed")
    return layers.convert_sync_batchnorm(model)


@pytest.mark.parametrize("convert", [converted, converted_by_timm])
def test_a_converter_cannot_thaw_a_frozen_norm_but_is_remembered(convert: Callable[[nn.Module], Any]) -> None:
    model = build(freeze_at=2)
    frozen = [path for path, norm in norms_of(model).items() if isinstance(norm, FrozenBatchNorm2d)]
    model = convert(model)
    assert [path for path, norm in norms_of(model).items() if isinstance(norm, FrozenBatchNorm2d)] == frozen
    freeze_stages(model, 0)
    assert {type(norm) for norm in norms_of(model).values()} == {nn.SyncBatchNorm}
    for norm in norms_of(model).values():
        assert isinstance(norm, nn.SyncBatchNorm)
        assert norm.process_group is None
        assert all(parameter.requires_grad for parameter in norm.parameters())


def set_anew(model: nn.Module) -> None:
    for name, child in model.named_children():
        set_anew(child)
        setattr(model, name, child)


def written_anew(model: nn.Module) -> None:
    for name, child in model.named_children():
        written_anew(child)
        model._modules[name] = child  # as torch.ao.quantization.convert does


def checkpointed(model: nn.Module) -> None:
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, nn.ReLU))


@pytest.mark.parametrize("walk", [set_anew, written_anew, checkpointed])
def test_a_walk_that_sets_children_anew_adds_none_to_a_frozen_norm(walk: Callable[[nn.Module], object]) -> None:
    model = build(norm="frozen_bn", freeze_at=2)
    names, keys = [name for name, _ in norms_of(model).items()], list(model.state_dict())
    for look, expected in (
        (lambda: list(norms_of(model)), names),
        (lambda: list(model.state_dict()), keys),
        (lambda: model.load_state_dict(dict(build().state_dict()), strict=True) and list(model.state_dict()), keys),
        (lambda: [type(norm) for norm in model.get_submodule("bn1").children()], []),
    ):
        walk(model)
        assert look() == expected


def test_lightnings_revert_of_sync_batch_norms_reaches_frozen_ones() -> None:
    layer_sync = pytest.importorskip("lightning.pytorch.plugins.layer_sync", reason="lightning is not installed")
    model = layer_sync.TorchSyncBatchNorm().revert(build(norm="sync_bn", freeze_at=2))
    freeze_stages(model, 0)
    assert not any(isinstance(norm, nn.SyncBatchNorm) for norm in norms_of(model).values())
    model.train()(IMAGES)["c5"].sum().backward()
    freeze_stages(model, 5)  # what Lightning left freezes again
    assert all(isinstance(norm, FrozenBatchNorm2d) for norm in norms_of(model).values())


def test_what_was_changed_while_frozen_is_there_after_the_thaw() -> None:
    model = build(freeze_at=1)
    norm: Any = model.get_submodule("bn1")
    norm.momentum, norm.eps = 0.01, 1e-3
    norm.register_buffer("extra", torch.ones(3))
    norm.weight = nn.Parameter(torch.full((64,), 2.0))
    freeze_stages(model, 0)
    assert (norm.momentum, norm.eps, type(norm)) == (0.01, 1e-3, nn.BatchNorm2d)
    assert torch.equal(norm.get_buffer("extra"), torch.ones(3))
    assert torch.equal(model.get_parameter("bn1.weight"), torch.full((64,), 2.0))


def test_init_functions_and_walks_do_not_find_the_layer_a_frozen_norm_stands_for() -> None:
    model = build(freeze_at=5)
    seen: list[nn.Module] = []
    model.apply(seen.append)
    for found in (seen, list(model.modules()), [child for module in model.modules() for child in module.children()]):
        assert not any(isinstance(module, nn.BatchNorm2d) for module in found)


# --- pruning and parametrization --------------------------------------------------------------------------------------


def test_a_pruned_norm_freezes_and_thaws_with_the_right_numbers() -> None:
    model = build().eval()
    randomise_norms(model)
    prune.l1_unstructured(model.get_submodule("layer1.0.bn1"), "weight", amount=0.5)  # type: ignore[no-untyped-call]
    prune.random_unstructured(model.get_submodule("layer1.0.conv1"), "weight", amount=0.5)  # type: ignore[no-untyped-call]
    expected = model(IMAGES)["c5"].detach()
    for freeze_at in (2, 5, 0, 5):
        freeze_stages(model, freeze_at)
        model.eval()
        assert relative_error(model(IMAGES)["c5"], expected) <= 1e-5
        assert relative_error(optimize_for_inference(model)(IMAGES)["c5"], expected) <= 1e-5
    freeze_stages(model, 0)
    assert model.get_parameter("layer1.0.bn1.weight_orig").requires_grad


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def test_a_parametrized_norm_is_refused_before_anything_is_touched() -> None:
    model = build().eval()
    parametrize.register_parametrization(model.get_submodule("layer2.0.bn1"), "weight", Doubled())
    before = {path: type(module) for path, module in model.named_modules()}
    with pytest.raises(ValueError, match=r"can be frozen, got .* at 'layer2\.0\.bn1'"):
        freeze_stages(model, 3)
    assert {path: type(module) for path, module in model.named_modules()} == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_norm_parametrized_while_frozen_computes_it_and_is_not_thawed_by_halves() -> None:
    model = build(freeze_at=2).eval()
    randomise_norms(model)
    parametrize.register_parametrization(model.get_submodule("layer1.1.bn2"), "weight", Doubled())
    with engine_enabled(False):
        expected = model(IMAGES)["c5"].detach()
    assert relative_error(model(IMAGES)["c5"], expected) <= 1e-5
    assert relative_error(optimize_for_inference(model)(IMAGES)["c5"], expected) <= 1e-5
    before = {path: type(module) for path, module in model.named_modules()}
    with pytest.raises(ValueError, match=r"can be thawed, got .* at 'layer1\.1\.bn2'"):
        freeze_stages(model, 0)
    assert {path: type(module) for path, module in model.named_modules()} == before


# --- other libraries' ways to freeze ----------------------------------------------------------------------------------


def freeze_like_smp(model: nn.Module) -> None:
    """What segmentation_models_pytorch's ``freeze_encoder`` does."""
    for parameter in model.parameters():
        parameter.requires_grad = False
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def test_the_report_sees_norms_in_evaluation_mode() -> None:
    model = build().train()
    freeze_like_smp(model)
    assert {(stage.norm, stage.frozen) for stage in freeze_report(model).values()} == {("bn", True)}
    model.get_submodule("layer3.0.bn1").train()
    assert [name for name, stage in freeze_report(model).items() if not stage.frozen] == ["c4"]


def test_the_report_sees_what_timm_froze() -> None:
    utils = pytest.importorskip("timm.utils", reason="timm is not installed")
    model: Any = build("timm/regnetx_002").train()
    utils.freeze(model.network, ["stem", "s1"])
    report = freeze_report(model)
    assert [(stage.norm, stage.frozen) for stage in list(report.values())[:2]] == [("frozen_bn", True)] * 2
    assert not report["c3"].frozen


def test_the_report_sees_torchvisions_frozen_norms() -> None:
    model = build()
    for path, norm in norms_of(model).items():
        model.set_submodule(path, torchvision.ops.FrozenBatchNorm2d(norm.num_features))
    model.requires_grad_(False)
    assert {(stage.norm, stage.frozen) for stage in freeze_report(model).values()} == {("frozen_bn", True)}


class Normless(Backbone):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.pool = nn.MaxPool2d(2)
        self.stage_modules = {"stem": ("pool",), "c2": ("conv",)}


def test_stages_without_norms_are_reported_by_their_parameters() -> None:
    model = Normless().train()
    assert [(stage.norm, stage.frozen) for stage in freeze_report(model).values()] == [("none", True), ("none", False)]
    freeze_stages(model, 2)
    assert [(stage.norm, stage.frozen) for stage in freeze_report(model).values()] == [("none", True), ("none", True)]


# --- FSDP2 ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_process(tmp_path: Any) -> Any:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    os.environ.setdefault("MASTER_ADDR", "localhost")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def trained(model: Any, schedule: Callable[[Any, int], None]) -> dict[str, Tensor]:
    """Four steps of four epochs, frozen as ``schedule`` says; the weights that come out."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for epoch in range(4):
        schedule(model, epoch)
        features = model(IMAGES)
        c5 = features["c5"] if isinstance(features, dict) else features
        optimizer.zero_grad()
        c5.square().mean().backward()
        optimizer.step()
    state = model.state_dict()
    return {key: value.full_tensor() if hasattr(value, "full_tensor") else value for key, value in state.items()}


class Torchvisions(nn.Module):
    """torchvision's network up to C5, with its frozen norms."""

    def __init__(self) -> None:
        super().__init__()
        network: Any = torchvision.models.resnet18(norm_layer=torchvision.ops.FrozenBatchNorm2d)
        for name, child in list(network.named_children())[:-2]:
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return x


@pytest.mark.filterwarnings("ignore:.*(is deprecated|nested tensors)")
def test_fully_shard_then_freeze_and_thaw_trains_as_torchvisions_network(one_process: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    theirs, ours = Torchvisions(), build("resnet18", norm="frozen_bn")
    randomise_norms(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    periods = FreezeSchedule({0: 2, 1: 4, 2: 0})
    stages = [["conv1"], ["layer1"], ["layer2"], ["layer3"], ["layer4"]]

    def by_requires_grad(model: Any, epoch: int) -> None:
        for number, names in enumerate(stages):
            for name in names:
                model.get_submodule(name).requires_grad_(number >= periods.freeze_at(epoch))

    mesh = init_device_mesh("cpu", (1,))
    for model in (theirs, ours):
        for module in model.modules():
            if type(module).__name__ == "BasicBlock":
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
    expected = trained(theirs, by_requires_grad)
    actual = trained(ours, lambda model, epoch: periods.apply(model, epoch) and None)  # type: ignore[arg-type]
    for key, value in expected.items():
        assert relative_error(actual[key], value) <= 1e-5, key


def test_a_deepcopy_of_a_frozen_model_thaws_alone() -> None:
    model = build(freeze_at=5)
    copied = copy.deepcopy(model)
    freeze_stages(copied, 0)
    assert not any(isinstance(norm, FrozenBatchNorm2d) for norm in norms_of(copied).values())
    assert all(isinstance(norm, FrozenBatchNorm2d) for norm in norms_of(model).values())
