"""Freezing by its effects: which bytes move in a training step, through everything a training run does."""

import copy
import random
from collections.abc import Callable

import pytest
import torch
from conftest import build
from torch import nn

from backbone import (
    Backbone,
    FreezeSchedule,
    FrozenBatchNorm2d,
    freeze_report,
    freeze_stages,
)
from backbone.stages import STAGE_NAMES

INVALID_FREEZE_AT = (-1, 6, True, 2.0, "2", None)
FREEZE_AT = range(6)


def train_step(model: Backbone, optimizer: torch.optim.Optimizer | None = None) -> None:
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=0.1)
    optimizer.zero_grad()
    with torch.enable_grad():
        loss = torch.stack([feature.square().mean() for feature in model(torch.randn(2, 3, 33, 33)).values()]).sum()
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def snapshot(model: Backbone) -> dict[str, list[bytes]]:
    return {
        stage: [value.numpy().tobytes() for value in modules.state_dict().values()]
        for stage, modules in model.stages.items()
    }


def moved_stages(model: Backbone, before: dict[str, list[bytes]]) -> list[str]:
    return [stage for stage, state in snapshot(model).items() if state != before[stage]]


def moves_in_training(model: Backbone) -> list[str]:
    before = snapshot(model)
    train_step(model.train())
    return moved_stages(model, before)


@pytest.mark.parametrize("norm", ["bn", "frozen_bn", "sync_bn", "gn"])
@pytest.mark.parametrize("freeze_at", FREEZE_AT)
def test_exactly_the_first_stages_keep_their_bytes(freeze_at: int, norm: str) -> None:
    assert moves_in_training(build(norm=norm, freeze_at=freeze_at)) == list(STAGE_NAMES[freeze_at:])


@pytest.mark.parametrize("norm", ["bn", "frozen_bn"])
def test_any_order_of_freezing_and_thawing_ends_the_same(norm: str) -> None:
    model = build(norm=norm)
    order = [5, 0, *random.Random(0).sample(FREEZE_AT, 6)]
    for freeze_at in order:
        freeze_stages(model, freeze_at)
        assert moves_in_training(model) == list(STAGE_NAMES[freeze_at:]), freeze_at


def round_trip(model: Backbone) -> Backbone:
    fresh = build(freeze_at=4)
    fresh.load_state_dict(model.state_dict(), strict=True)
    freeze_stages(fresh, 2)
    return fresh


LIFE_EVENTS: dict[str, Callable[[Backbone], Backbone]] = {
    "train": lambda model: model.train(),
    "eval then train": lambda model: model.eval().train(),
    "deepcopy": copy.deepcopy,
    "state dict round trip": round_trip,
    "convert_sync_batchnorm": nn.SyncBatchNorm.convert_sync_batchnorm,
    "double and back": lambda model: model.double().float(),
}


@pytest.mark.parametrize("event", LIFE_EVENTS)
def test_frozen_stages_stay_frozen_through(event: str) -> None:
    assert moves_in_training(LIFE_EVENTS[event](build(freeze_at=2))) == ["c3", "c4", "c5"]


def test_thawing_gives_trainable_batch_norms_with_the_same_parameters() -> None:
    model = build()
    before = dict(model.named_parameters())
    for freeze_at in (5, 0):
        freeze_stages(model, freeze_at)
        assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert not any(isinstance(module, FrozenBatchNorm2d) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_optimizer_built_before_freezing_steps_thawed_stages() -> None:
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for freeze_at in (3, 0):
        freeze_stages(model, freeze_at)
        before = snapshot(model)
        train_step(model, optimizer)
        assert moved_stages(model, before) == list(STAGE_NAMES[freeze_at:])


def test_freezing_between_backward_and_step_leaves_nothing_to_step() -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=0.1)
    train_step(model, optimizer)  # momentum is there
    model(torch.randn(2, 3, 33, 33))["c5"].sum().backward()
    freeze_stages(model, 5)
    before = snapshot(model)
    optimizer.step()
    assert moved_stages(model, before) == []


def test_thawed_batch_norms_count_batches_again() -> None:
    model = build(freeze_at=5)
    freeze_stages(model, 0)
    train_step(model.train())
    assert int(model.get_buffer("bn1.num_batches_tracked")) == 1


def test_norms_built_frozen_stay_frozen_when_thawed() -> None:
    model = build(norm="frozen_bn", freeze_at=5)
    freeze_stages(model, 0)
    assert not any(p.requires_grad for m in model.modules() if isinstance(m, FrozenBatchNorm2d) for p in m.parameters())


def test_gradients_flow_through_frozen_stages_to_the_image() -> None:
    images = torch.randn(1, 3, 64, 64, requires_grad=True)
    build(freeze_at=5)(images)["c5"].sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0


@pytest.mark.parametrize("freeze_at", INVALID_FREEZE_AT)
def test_a_number_of_stages_out_of_range_is_refused(freeze_at: int) -> None:
    with pytest.raises(ValueError, match=r"freeze_at must be 0 to 5 \(stages counted from the stem\), got"):
        freeze_stages(build(), freeze_at)


def test_a_norm_that_cannot_freeze_leaves_everything_as_it_was() -> None:
    model = build()
    model.get_submodule("layer2.0").bn1 = nn.BatchNorm2d(128, affine=False)
    with pytest.raises(ValueError, match=r"at 'layer2\.0\.bn1'"):
        freeze_stages(model, 4)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_stages_that_are_not_built_have_nothing_to_freeze() -> None:
    model = build(out_features=["c3"])
    freeze_stages(model, 5)
    assert list(freeze_report(model)) == ["stem", "c2", "c3"]
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_classifier_belongs_to_no_stage_and_stays_trainable() -> None:
    model = build(num_classes=10, freeze_at=5)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["fc.weight", "fc.bias"]


def test_the_report_counts_what_is_there() -> None:
    report = freeze_report(build(freeze_at=2))
    assert [(stage.norm, stage.frozen) for stage in report.values()] == [("frozen_bn", True)] * 2 + [("bn", False)] * 3
    assert report["stem"].parameters == 64 * 3 * 49 + 2 * 64
    assert [stage.trainable_parameters for stage in report.values()] == [
        0,
        0,
        *(report[name].parameters for name in ("c3", "c4", "c5")),
    ]


def test_the_report_tells_still_weights_with_moving_statistics_from_frozen() -> None:
    model = build().requires_grad_(False)
    assert [stage.frozen for stage in freeze_report(model).values()] == [False] * 5


SCHEDULE = FreezeSchedule({0: 3, 2: 1, 5: 0})


@pytest.mark.parametrize(("epoch", "frozen"), [(0, 3), (1, 3), (2, 1), (4, 1), (5, 0), (90, 0)])
def test_schedule_says_what_is_frozen_in_each_epoch(epoch: int, frozen: int) -> None:
    assert SCHEDULE.freeze_at(epoch) == frozen


def test_schedule_tells_when_something_changed() -> None:
    model = build()
    assert [SCHEDULE.apply(model, epoch) for epoch in range(6)] == [True, False, True, False, False, True]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_optimizer_state_outlives_a_schedule_that_freezes_and_thaws() -> None:
    model = build()
    schedule, optimizer = FreezeSchedule({0: 0, 1: 3, 2: 0}), torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    weight = model.get_parameter("layer1.0.conv1.weight")
    for epoch in range(3):
        schedule.apply(model, epoch)
        before = weight.detach().clone()
        momentum = optimizer.state[weight].get("momentum_buffer")
        sum(feature.square().mean() for feature in model(torch.randn(2, 3, 64, 64)).values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(before, weight) == (epoch == 1)
        assert momentum is None or optimizer.state[weight]["momentum_buffer"] is momentum


@pytest.mark.parametrize(
    ("periods", "rule"),
    [
        ({}, "epoch 0"),
        ({1: 2}, "epoch 0"),
        ({0: 6}, "0 to 5"),
        ({0: 2, -1: 0}, "integers from 0"),
        ({0: 2, "5": 0}, "integers from 0"),
    ],
)
def test_impossible_schedule_is_refused(periods: dict[int, int], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        FreezeSchedule(periods)


def test_what_was_computed_from_a_norm_is_dropped_by_freezing_and_thawing() -> None:
    """A fused optimizer's step moves no version counter, and on CUDA nobody looks at the values."""
    model = build("resnet18", norm="frozen_bn", freeze_at=5).eval()
    norms = [module for module in model.modules() if isinstance(module, FrozenBatchNorm2d)]
    for freeze_at in (0, 5):
        for norm in norms:
            norm.derived["anything"] = 1
        freeze_stages(model, freeze_at)
        assert not any(norm.derived for norm in norms)
