"""What is frozen at the values it was built with is said once, when training begins, and only then."""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backbone import Backbone, FeaturePyramid, build_backbone, freeze_stages, load_weights, optimize_for_inference

IMAGES = torch.rand(1, 3, 64, 64)
MATCH = "frozen at random weights"
STATE = {key: value + 1 for key, value in build_backbone("resnet18").state_dict().items()}

# settings -> what the warning says
FROZEN: list[tuple[dict[str, Any], str]] = [
    ({}, "resnet18: all norms are frozen at random weights and will never train; set weights, "),
    ({"freeze_at": 2}, "resnet18: the first 2 stages and all norms are frozen"),
    ({"norm": "bn", "freeze_at": 2}, "resnet18: the first 2 stages are frozen"),
    ({"freeze_at": 5}, "resnet18: the first 5 stages are frozen"),
]


def copied(model: Backbone) -> None:
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(STATE[key])


def given_data(model: Backbone) -> None:
    for key, parameter in model.named_parameters():
        parameter.data = STATE[key].clone()


def through_a_pyramid(model: Backbone) -> None:
    load_weights(FeaturePyramid(model, out_channels=8), STATE)


def the_very_same(model: Backbone) -> None:
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()})


WAYS: dict[str, Callable[[Backbone], object]] = {
    "load_weights": lambda model: load_weights(model, STATE),
    "load_weights of a pyramid": through_a_pyramid,
    "load_state_dict": lambda model: model.load_state_dict(STATE),
    "load_state_dict by assignment": lambda model: model.load_state_dict(STATE, assign=True),
    "a host's partial loading": lambda model: model.load_state_dict(
        {"conv1.weight": STATE["conv1.weight"]}, strict=False
    ),
    "weights equal to the initial ones": the_very_same,
    "a copy into parameters": copied,
    "parameters' data": given_data,
}


def warned(model: nn.Module, images: Tensor = IMAGES) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(images)
    return [str(each.message) for each in caught if MATCH in str(each.message)]


@pytest.mark.parametrize(("settings", "message"), FROZEN)
def test_first_forward_in_training_says_what_is_frozen(settings: dict[str, Any], message: str) -> None:
    (said,) = warned(build_backbone("resnet18", **settings))
    assert said.startswith(message)


@pytest.mark.parametrize("settings", [{"freeze_at": 2}, {"weights": STATE}])
def test_building_does_not_warn(settings: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_backbone("resnet18", **settings)


def test_it_is_said_once() -> None:
    model = build_backbone("resnet18")
    assert [len(warned(model)) for _ in range(3)] == [1, 0, 0]


def test_nothing_stays_on_the_module() -> None:
    model = build_backbone("resnet18")
    warned(model)
    assert not model._forward_pre_hooks


def test_evaluation_is_silent_and_training_after_it_is_not() -> None:
    model = build_backbone("resnet18").eval()
    assert not warned(model)
    assert warned(model.train())


def test_nothing_frozen_is_silent() -> None:
    assert not warned(build_backbone("resnet18", norm="bn"))


def test_stages_frozen_after_building_count() -> None:
    model = build_backbone("resnet18", norm="bn")
    freeze_stages(model, 3)
    assert "the first 3 stages" in warned(model)[0]


@pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))
def test_weights_that_came_in_silence_it(way: Callable[[Backbone], object]) -> None:
    model = build_backbone("resnet18", freeze_at=2)
    way(model)
    assert not warned(model)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("loaded", [False, True])
def test_copies_say_it_too_and_on_their_own(copy_of: Callable[[Backbone], Backbone], loaded: bool) -> None:
    model = build_backbone("resnet18")
    other = copy_of(model)
    if loaded:
        other.load_state_dict(STATE)
    assert (len(warned(other)), len(warned(model))) == (0 if loaded else 1, 1)


def test_moved_to_bfloat16_is_still_the_same() -> None:
    model = build_backbone("resnet18").to(torch.bfloat16)
    assert warned(model, IMAGES.bfloat16())


def test_pyramid_around_it_says_it() -> None:
    assert warned(FeaturePyramid(build_backbone("resnet18"), out_channels=8))


def test_functional_call_with_other_weights_is_silent() -> None:
    model = build_backbone("resnet18")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.func.functional_call(model, STATE, (IMAGES,))


def test_export_in_training_mode_works_and_leaves_the_question_open() -> None:
    model = build_backbone("resnet18", out_features=["c2"])
    torch.export.export(model, (IMAGES,))
    assert warned(model)


def test_compiled_forward_in_training_mode_is_one_graph() -> None:
    model = build_backbone("resnet18", out_features=["c2"])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(IMAGES)["c2"], model.eval()(IMAGES)["c2"], atol=1e-5)


def test_jit_trace_works() -> None:
    model = build_backbone("resnet18", out_features=["c2"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.trace.* is deprecated")  # torch 2.14
        warnings.filterwarnings(
            "ignore", category=torch.jit._trace.TracerWarning
        )  # shapes are compared, as in every check
        traced: Any = torch.jit.trace(model, IMAGES, strict=False)  # type: ignore[no-untyped-call]
    assert torch.allclose(traced(IMAGES)["c2"], model(IMAGES)["c2"], atol=1e-5)


def test_optimised_copy_has_nothing_to_say() -> None:
    assert not warned(optimize_for_inference(build_backbone("resnet18", out_features=["c2"])))


def test_meta_device_is_not_watched() -> None:
    with torch.device("meta"):
        assert not build_backbone("resnet18")._forward_pre_hooks


def test_replicas_of_data_parallel_see_plain_tensors() -> None:
    model = build_backbone("resnet18")
    replica = model._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
    for path, parameter in model.named_parameters():  # what torch.nn.parallel.replicate does
        owner, _, name = path.rpartition(".")
        if not owner:
            setattr(replica, name, parameter.detach())
    assert not any("AttributeError" in text for text in warned(replica))
