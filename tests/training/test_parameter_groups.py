"""Learning rates by stage, and their course: which parameter moves how far."""

import math
import sys
from typing import Any

import pytest
import torch
from runs import TOOLS, recipe
from torch import nn

sys.path.append(str(TOOLS))
from backbone import freeze_stages
from backbone.hosts.torchvision import build_detector
from backbone.recipe import DetectorConfig, TrainConfig
from backbone.training.parameter_groups import PARTS, make_optimizer, parameter_groups, parts_of, rate_factor


def detector(name: str = "retinanet", **settings: Any) -> nn.Module:
    with torch.device("meta"):
        return build_detector(DetectorConfig.model_validate({**recipe(name, norm="bn"), **settings}))


def groups_of(model: nn.Module, **settings: Any) -> dict[str, dict[str, Any]]:
    train = TrainConfig.model_validate({"learning_rate": 0.1, "weight_decay": 0.01, **settings})
    return {group["name"]: group for group in parameter_groups(model, train)}


def test_every_parameter_is_in_one_group_frozen_or_not() -> None:
    model = detector()
    freeze_stages(model.backbone, 5)  # type: ignore[arg-type]
    members = [id(parameter) for group in groups_of(model).values() for parameter in group["params"]]
    assert sorted(members) == sorted(map(id, model.parameters()))


@pytest.mark.parametrize("freeze_at", [0, 2, 5])
def test_groups_are_the_same_whatever_is_frozen(freeze_at: int) -> None:
    def names(model: nn.Module) -> list[list[str]]:
        name = {id(parameter): name for name, parameter in model.named_parameters()}
        return [[name[id(p)] for p in group["params"]] for group in groups_of(model).values()]

    model = detector()
    before = names(model)
    freeze_stages(model.backbone, freeze_at)  # type: ignore[arg-type]
    assert names(model) == before


def test_layer_decay_and_multipliers_multiply() -> None:
    groups = groups_of(detector(), layer_decay=0.5, lr_multipliers={"stem": 0.0, "c2": 0.1, "pyramid": 2.0})
    rates = {part: groups[part]["lr"] for part in PARTS}
    expected = [0, 0.1 / 16 * 0.1, 0.1 / 8, 0.1 / 4, 0.1 / 2, 0.2, 0.1]
    assert list(rates.values()) == pytest.approx(expected)


def test_norms_and_biases_do_not_decay() -> None:
    groups = groups_of(detector())
    assert {name: group["weight_decay"] for name, group in groups.items() if part_alone(name)} == dict.fromkeys(
        PARTS, 0.01
    )
    undecayed = [group for name, group in groups.items() if not part_alone(name)]
    assert all(group["weight_decay"] == 0 for group in undecayed)
    assert all(parameter.ndim == 1 for group in undecayed for parameter in group["params"])


def part_alone(name: str) -> bool:
    return name in PARTS


def test_parts_follow_the_model() -> None:
    parts = parts_of(detector())
    assert parts["backbone.body.bn1.weight"] == "stem"
    assert parts["backbone.body.layer4.1.conv2.weight"] == "c5"
    assert parts["backbone.fpn.inner_blocks.0.0.weight"] == "pyramid"
    assert parts["head.classification_head.cls_logits.bias"] == "head"


def test_a_multiplier_of_a_part_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must name parts that the detector has, stem, c2, .* head; got pyramid"):
        groups_of(detector("fcn"), lr_multipliers={"pyramid": 0.1})


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_optimizer_is_the_recipes(name: str) -> None:
    train = TrainConfig.model_validate({"optimizer": name})
    optimizer = make_optimizer(parameter_groups(detector(), train), train)
    assert type(optimizer) is {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[name]
    assert name == "adamw" or optimizer.defaults["momentum"] == 0.9


COURSES: list[tuple[dict[str, Any], dict[int, float]]] = [
    ({"warmup_steps": 4}, {0: 0.001, 2: 0.5005, 4: 1.0, 79: 1.0, 80: 0.1, 109: 0.1, 110: 0.01}),
    ({"learning_rate_decay": "cosine"}, {0: 1.0, 60: 0.5, 30: (1 + math.sqrt(0.5)) / 2, 120: 0.0}),
    ({"learning_rate_decay": "none"}, {0: 1.0, 119: 1.0}),
]


@pytest.mark.parametrize(("settings", "expected"), COURSES)
def test_learning_rate_takes_its_course(settings: dict[str, Any], expected: dict[int, float]) -> None:
    train = TrainConfig.model_validate({"warmup_steps": 0, **settings})
    assert {step: rate_factor(train, step, step / 10) for step in expected} == pytest.approx(expected)
