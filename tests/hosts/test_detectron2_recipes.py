"""Every ResNet recipe of detectron2, with our name in place of its builder's: the same detector, number for number."""

import copy
import itertools
from typing import Any

import pytest
import torch
from conftest import randomise_norms, relative_error
from detectron2_pairs import (
    NOT_ITS_RESNET,
    detector,
    example,
    flat,
    in_double_precision,
    losses_and_gradients,
    read_lazy_recipe,
    read_recipe,
    recipes,
    stand_in_for_compiled_layers,
    with_our_name,
)
from torch import Tensor

TOLERANCE = 1e-4
NOISE = 1e-9
"""Below it a gradient is rounding: that of a bias in front of a softmax is zero."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning"),  # detectron2's anchors
]


def read(name: str) -> Any:
    return read_recipe(name) if name.endswith(".yaml") else read_lazy_recipe(name)


def model_of(name: str) -> str:
    """All that decides which model a recipe builds; recipes that differ in their schedules alone share it."""
    if not name.endswith(".yaml"):
        return name
    cfg = read_recipe(name)
    cfg.MODEL.WEIGHTS = ""
    return str(cfg.MODEL.dump())


MODELS = [list(same) for _, same in itertools.groupby(sorted(recipes(), key=model_of), model_of)]


def error(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape:
        return float("inf")
    actual, expected = actual.double(), expected.double()  # some are masks
    size = expected.abs().max() if expected.numel() else torch.tensor(0)
    return relative_error(actual, expected) if size > NOISE else float((actual - expected).abs().sum() > NOISE)


@torch.no_grad()
def outputs(model: Any, inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
    """What the detector finds, and its feature maps: heads at random weights may find nothing."""
    features = model.eval().backbone(inputs[0]["image"][None])
    return {**flat(model(copy.deepcopy(inputs))), **features}


def test_all_recipes_of_its_resnets_are_here() -> None:
    assert (len(recipes()), len(MODELS), len(NOT_ITS_RESNET)) == (62, 51, 4)


@pytest.mark.parametrize("names", MODELS, ids=lambda names: names[0])
def test_the_recipe_gives_the_same_numbers(names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_for_compiled_layers(monkeypatch)
    recipe = read(names[0])
    theirs, ours = detector(recipe), detector(with_our_name(recipe))
    randomise_norms(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert ours.backbone.output_shape() == theirs.backbone.output_shape()
    assert ours.backbone.size_divisibility == theirs.backbone.size_divisibility
    inputs = example()
    inputs[0]["image"] = inputs[0]["image"].double()
    models = [in_double_precision(model, monkeypatch) for model in (theirs, ours)]
    expected, actual = (outputs(model, inputs) for model in models)
    (their_losses, their_gradients), (losses, gradients) = (losses_and_gradients(model, inputs) for model in models)
    for theirs_, ours_ in ((expected, actual), (their_losses, losses), (their_gradients, gradients)):
        assert set(ours_) == set(theirs_)
        errors = {key: error(ours_[key], theirs_[key]) for key in theirs_}
        assert max(errors.values(), default=0.0) <= TOLERANCE, max(errors, key=errors.__getitem__)
