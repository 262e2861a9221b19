"""Our backbones as transformers backbones: configuration, contract, saving and loading, and freezing that holds."""

import copy
import importlib
import inspect
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomise_norms
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", minversion="5")

from transformers import AutoBackbone, AutoConfig  # noqa: E402
from transformers_detectors import DETECTORS, RESNET_18, boxes, images  # noqa: E402

import backbone.hosts.transformers as host  # noqa: E402
from backbone import (  # noqa: E402
    BackboneConfig,
    FreezeSchedule,
    build_backbone,
    freeze_report,
    freeze_stages,
    optimize_for_inference,
)
from backbone.hosts.transformers import (  # noqa: E402
    TransformersBackbone,
    TransformersBackboneConfig,
    find_backbone,
)
from backbone.norm import FrozenBatchNorm2d  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*frozen at random weights")
STAGES = ["stem", "stage1", "stage2", "stage3", "stage4"]


def config(*features: str, name: str = "resnet18", **settings: Any) -> TransformersBackboneConfig:
    return TransformersBackboneConfig({"name": name, **settings}, out_features=list(features) or None)


def hosted(*features: str, **settings: Any) -> Any:
    model = TransformersBackbone(config(*features, **settings))
    randomise_norms(model)
    return model


def detr(**settings: Any) -> Any:
    model = DETECTORS["detr"].make(config("stage4", **settings))
    randomise_norms(find_backbone(model))
    return model


def reloaded(model: Any, folder: Path, **settings: Any) -> Any:
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, **settings)


def frozen_stages(model: nn.Module) -> list[str]:
    return [stage for stage, report in freeze_report(find_backbone(model).network).items() if report.frozen]


def backward(model: Any) -> dict[str, Tensor | None]:
    model(images()).logits.square().sum().backward()
    return {name: parameter.grad for name, parameter in find_backbone(model).network.named_parameters()}


# configuration


@pytest.mark.parametrize(
    "given",
    [
        "resnet18",
        {"name": "resnet18"},
        BackboneConfig(name="resnet18"),
        {"name": "resnet18", "weights": None, "checkpoint_stages": ("c2",)},
        {"name": "resnet18", "weights": Path("x.pth"), "freeze_at": 2},
    ],
)
def test_configuration_survives_its_json(given: Any, tmp_path: Path) -> None:
    before = TransformersBackboneConfig(given, out_features=["stage1", "stage3"])
    before.save_pretrained(tmp_path)
    after = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(after, TransformersBackboneConfig)
    assert (after.to_diff_dict(), after.plan()) == (before.to_diff_dict(), before.plan())


@pytest.mark.parametrize(
    ("features", "indices", "expected"),
    [
        (None, None, ["stage4"]),
        (["stage1", "stage3"], None, ["stage1", "stage3"]),
        (None, [1, 3], ["stage1", "stage3"]),
        (None, (-2, -1), ["stage3", "stage4"]),
        (["stage2"], [2], ["stage2"]),
        (["stem", "stage1"], [0, 1], ["stem", "stage1"]),
        (None, [0, 2], ["stem", "stage2"]),
    ],
)
def test_features_by_name_and_by_number(features: Any, indices: Any, expected: list[str]) -> None:
    made = TransformersBackboneConfig("resnet18", features, indices)
    assert made.stage_names == STAGES
    assert made.out_features == expected
    assert [STAGES[index] for index in made.out_indices] == expected


def test_features_of_the_backbones_own_keys_count() -> None:
    made = TransformersBackboneConfig({"name": "resnet18", "out_features": ["c3", "c5"]})
    assert made.out_features == ["stage2", "stage4"]
    assert TransformersBackboneConfig(BackboneConfig(name="resnet18")).out_features == ["stage4"]


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"backbone": {"name": "resnet18", "freeze": 2}}, "unknown key 'freeze'; did you mean 'freeze_at'"),
        ({"backbone": {"name": "resnet18", "freeze_at": 6}}, "backbone: freeze_at must be 0 to 5"),
        ({"backbone": 18}, "backbone must be a name"),
        ({"out_features": ["stage5"]}, "must be a subset of stage_names"),
        ({"out_features": ["stage1", "stage2"], "out_indices": [0, 2]}, "should correspond to the same stages"),
        ({"out_features": ["stage2", "stage1"]}, "same order"),
        ({"out_features": ["stage1", "stage1"]}, "must not contain any duplicates"),
        ({"out_indices": [0, 5]}, "out_indices must be valid indices"),
        ({"backbone": {"name": "resnet18", "out_features": ["c5"]}, "out_features": ["stage1"]}, "must be given once"),
        ({"freeze_at": 2}, "freeze_at must be given in backbone"),
        ({"output_stride": 16}, "output_stride must be given in backbone"),
        ({"dilation": True}, "output_stride: 16"),
        ({"use_pretrained_backbone": True}, "weights: IMAGENET1K_V2"),
        ({"num_channels": 4}, "in_channels"),
    ],
)
def test_what_cannot_be_honoured_is_refused(arguments: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        TransformersBackboneConfig(**arguments)


@pytest.mark.parametrize("name", ["detr", "conditional_detr", "deformable_detr", "dab_detr", "table_transformer"])
def test_a_detectors_dilation_is_refused_by_our_key(name: str) -> None:
    detector = DETECTORS[name]
    wanted = detector.make_config(config(*detector.features))
    wanted.dilation = True
    with pytest.raises(ValueError, match=r"dilation of \w+Config means nothing .* output_stride: 16"):
        detector.model_class(wanted)


def test_output_stride_does_what_dilation_means() -> None:
    detector = DETECTORS["detr"]
    model = detector.make(config("stage4", output_stride=16))
    assert find_backbone(model)(images()).feature_maps[0].shape == (2, 512, 4, 4)


# the contract of transformers' backbones


def test_importing_it_twice_is_safe() -> None:
    before = dict(vars(host))
    importlib.reload(host)
    vars(host).update(before)
    made: Any = AutoBackbone
    assert isinstance(made.from_config(config("stage1")), TransformersBackbone)


def test_pixel_values_is_the_first_argument() -> None:
    assert next(iter(inspect.signature(hosted("stage1").forward).parameters)) == "pixel_values"


@pytest.mark.parametrize("features", [["stem"], ["stage1"], ["stem", "stage2"], ["stage2", "stage4"], STAGES])
def test_channels_are_those_of_the_maps(features: list[str]) -> None:
    model = hosted(*features)
    maps = model(images()).feature_maps
    assert model.num_features == [64, 64, 128, 256, 512]
    assert model.out_feature_channels == dict(zip(STAGES, model.num_features, strict=True))
    assert isinstance(maps, tuple)
    assert model.channels == [m.shape[1] for m in maps]
    assert [64 // m.shape[-1] for m in maps] == [2 ** (1 + STAGES.index(stage)) for stage in features]
    assert model.out_indices == [STAGES.index(stage) for stage in features]


@pytest.mark.parametrize("name", ["resnet18", "resnet18d", "timm/resnet18d", "timm/regnetx_002"])
@torch.no_grad()
def test_the_stem_is_c1_of_the_backbone(name: str, tmp_path: Path) -> None:
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    model = hosted("stem", "stage2", name=name, norm="frozen_bn", freeze_at=1).eval()
    alone = build_backbone(name, norm="frozen_bn", out_features=["c1", "c3"]).eval()
    alone.load_state_dict(model.network.state_dict())
    expected = alone(images())
    for hosted_model in (model, reloaded(model, tmp_path).eval()):
        stem, stage2 = hosted_model(images()).feature_maps
        assert stem.shape == (2, alone.feature_specs["c1"].channels, 32, 32)
        assert torch.equal(stem, expected["c1"])
        assert torch.equal(stage2, expected["c3"])
    assert model.channels[0] == model.num_features[0] == alone.feature_specs["c1"].channels


def test_a_network_without_a_map_at_stride_2_refuses_the_stem() -> None:
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=r"must not name c1 \(stride 2\) for timm/convnext_atto"):
        hosted("stem", name="timm/convnext_atto")


def test_stages_beyond_the_last_feature_are_not_built() -> None:
    assert not hasattr(hosted("stage2").network, "layer3")


@pytest.mark.parametrize("attribute", ["out_features", "out_indices"])
def test_a_modified_configuration_gives_the_last_stage(attribute: str) -> None:
    modified = copy.deepcopy(config("stage1", "stage2"))
    setattr(modified, attribute, None)
    modified.use_pretrained_backbone = False
    assert (modified.out_features, modified.out_indices) == (["stage4"], [4])
    model = TransformersBackbone(modified)
    assert (model.channels, len(model(images()).feature_maps)) == ([512], 1)


def test_a_copied_configuration_builds_the_same() -> None:
    given = config("stem", "stage3", norm="bn")
    first: Any = TransformersBackbone(given)
    second: Any = TransformersBackbone(copy.deepcopy(given))
    assert first.channels == second.channels == [64, 256]
    second.load_state_dict(first.state_dict())
    assert all(map(torch.equal, first.eval()(images()).feature_maps, second.eval()(images()).feature_maps))


def test_it_has_the_attributes_of_every_backbone() -> None:
    model = hosted("stage1", "stage4")
    assert model.backbone_type.value == "transformers"
    assert (model.stage_names, model.out_features, model.out_indices) == (STAGES, ["stage1", "stage4"], [1, 4])
    assert len(model.num_features) == len(model.out_feature_channels) == len(STAGES)
    assert model.channels == [model.out_feature_channels[stage] for stage in model.out_features]


@pytest.mark.parametrize("features", [["stage2", "stage3"], ["stem", "stage1"], STAGES])
def test_hidden_states_come_where_asked_one_for_each_feature(features: list[str]) -> None:
    model = hosted(*features)
    plain, asked = model(images()), model(images(), output_hidden_states=True)
    assert (plain.hidden_states, plain.attentions) == (None, None)
    assert [m.shape for m in asked.hidden_states] == [m.shape for m in plain.feature_maps]
    assert all(map(torch.equal, asked.hidden_states, plain.feature_maps))
    model.config.output_hidden_states = True
    assert model(images()).hidden_states is not None


def test_a_tuple_comes_where_asked() -> None:
    model = hosted("stage2")
    (maps,) = model(images(), return_dict=False)
    assert torch.equal(maps[0], model(images()).feature_maps[0])


def test_attentions_are_refused() -> None:
    with pytest.raises(ValueError, match="output_attentions must be false"):
        hosted("stage1")(images(), output_attentions=True)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_detectors_attention_is_none_of_its_business(attention: str) -> None:
    detector = DETECTORS["detr"]
    wanted = detector.make_config(config("stage4"))
    wanted._attn_implementation = attention
    assert detector.model_class(wanted)(images()).logits.shape == (2, 5, 4)


# saving and loading


@pytest.mark.parametrize("norm", ["frozen_bn", "bn", "gn"])
@pytest.mark.parametrize("freeze_at", [0, 2])
def test_save_and_load_change_nothing(norm: str, freeze_at: int, tmp_path: Path) -> None:
    model = hosted("stage1", "stage3", norm=norm, freeze_at=freeze_at).eval()
    model.save_pretrained(tmp_path)
    loader: Any = TransformersBackbone
    again, told = loader.from_pretrained(tmp_path, output_loading_info=True)
    assert {reason: keys for reason, keys in told.items() if keys} == {}
    assert all(map(torch.equal, again(images()).feature_maps, model(images()).feature_maps))
    assert freeze_report(again.network) == freeze_report(model.network)


@pytest.mark.parametrize("norm", ["frozen_bn", "bn"])
def test_a_detector_saved_and_loaded_is_the_same_and_frozen_the_same(norm: str, tmp_path: Path) -> None:
    model = detr(norm=norm, freeze_at=2)
    model.eval()
    model.save_pretrained(tmp_path)
    again, told = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert {reason: keys for reason, keys in told.items() if keys} == {}
    assert torch.equal(again(images()).logits, model(images()).logits)
    assert frozen_stages(again) == frozen_stages(model) == ["stem", "c2"]
    assert again.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("name", ["timm/resnet18d", "timm/convnext_atto"])
def test_models_of_timm_are_saved_and_loaded(name: str, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    model = hosted("stage2", "stage4", name=name, freeze_at=1).eval()
    again = reloaded(model, tmp_path)
    assert all(map(torch.equal, again(images()).feature_maps, model(images()).feature_maps))
    assert freeze_report(again.network) == freeze_report(model.network)


def test_deep_copies_and_pickles_compute_the_same() -> None:
    model = detr(norm="bn", freeze_at=1).eval()
    expected = model(images()).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images()).logits, expected)


def test_what_a_checkpoint_lacks_starts_as_in_a_fresh_network(tmp_path: Path) -> None:
    model = hosted("stage2", norm="bn")
    state = {key: value for key, value in model.state_dict().items() if "layer2.0.conv1" not in key}
    torch.manual_seed(0)
    state = {
        key: value for key, value in state.items() if not key.endswith(("num_batches_tracked", "layer1.0.bn1.bias"))
    }
    again = TransformersBackbone.from_pretrained(None, config=model.config, state_dict=state)
    found = again.network.state_dict()
    assert float(found["layer2.0.conv1.weight"].std()) == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.05)
    assert not found["layer1.0.bn1.bias"].any()
    assert {int(value) for key, value in found.items() if key.endswith("num_batches_tracked")} == {0}
    assert torch.equal(found["layer1.0.conv1.weight"], model.network.state_dict()["layer1.0.conv1.weight"])


def test_a_fresh_backbone_in_a_detector_keeps_its_own_initialisation() -> None:
    weight = find_backbone(detr()).network.get_parameter("layer3.1.conv2.weight")
    assert float(weight.detach().std()) == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.05)


def test_weights_named_in_the_configuration_are_read_once_and_not_at_loading(tmp_path: Path) -> None:
    source = hosted("stage4", norm="bn")
    torch.save(source.network.state_dict(), tmp_path / "x.pth")
    model = TransformersBackbone(config("stage4", weights=str(tmp_path / "x.pth")))
    assert torch.equal(model.network.get_parameter("conv1.weight"), source.network.get_parameter("conv1.weight"))
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "x.pth").unlink()
    assert isinstance(TransformersBackbone.from_pretrained(tmp_path / "saved"), TransformersBackbone)


# freezing holds


def test_freezing_survives_from_pretrained(tmp_path: Path) -> None:
    model = reloaded(detr(freeze_at=2), tmp_path)
    before = {key: value.clone() for key, value in find_backbone(model).network.state_dict().items()}
    gradients = backward(model.train())
    assert {name.partition(".")[0] for name, gradient in gradients.items() if gradient is not None} == {
        "layer2",
        "layer3",
        "layer4",
    }
    torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1).step()
    after = find_backbone(model).network.state_dict()
    still = [key for key in before if key.startswith(("conv1", "bn1", "layer1"))]
    assert all(torch.equal(before[key], after[key]) for key in still)
    assert not torch.equal(before["layer2.0.conv1.weight"], after["layer2.0.conv1.weight"])


@pytest.mark.parametrize(
    "thaw",
    [
        lambda model: model.model.unfreeze_backbone(),
        lambda model: model.requires_grad_(True),
        lambda model: model.train(),
        lambda model: (model.model.freeze_backbone(), model.model.unfreeze_backbone()),
    ],
)
def test_what_is_frozen_stays_so_whatever_the_detector_does(thaw: Any) -> None:
    model = detr(freeze_at=2).train()
    thaw(model)
    frozen = {name for name, gradient in backward(model).items() if gradient is None}
    assert {"conv1.weight", "layer1.1.conv2.weight", "layer3.0.bn1.weight"} <= frozen
    assert "layer2.0.conv1.weight" not in frozen
    assert frozen_stages(model) == ["stem", "c2"]


def test_a_detectors_own_freeze_reaches_the_whole_backbone() -> None:
    model = detr(freeze_at=1)
    model.model.freeze_backbone()
    assert set(backward(model.train()).values()) == {None}


def test_what_is_thawed_on_purpose_stays_thawed() -> None:
    model = detr(freeze_at=2)
    schedule = FreezeSchedule({0: 2, 1: 0})
    schedule.apply(find_backbone(model).network, 1)
    assert backward(model.train())["conv1.weight"] is not None
    freeze_stages(find_backbone(model).network, 3)
    model.zero_grad(set_to_none=True)
    assert backward(model.train())["layer2.0.conv1.weight"] is None


def test_a_detectors_frozen_norms_become_ours_and_keep_their_values() -> None:
    model = DETECTORS["detr"].make(config("stage4", norm="bn"))
    randomise_norms(find_backbone(model))
    before = {key: value.clone() for key, value in model.eval().state_dict().items()}
    network = find_backbone(model).network
    assert {type(m) for name, m in network.named_modules() if name.endswith("bn1")} == {FrozenBatchNorm2d}
    assert {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])} == set()
    model.train()(images())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items() if "running" in key)


def test_norms_keep_their_eps_and_activation_in_a_detector() -> None:
    pytest.importorskip("timm")
    settings: dict[str, Any] = {"name": "timm/tf_efficientnet_b0", "norm": "bn"}  # eps 1e-3, SiLU inside of norms
    model = DETECTORS["detr"].make(config("stage4", **settings)).eval()
    alone: Any = TransformersBackbone(config("stage4", **settings))
    alone.eval()
    alone.load_state_dict({**alone.state_dict(), **find_backbone(model).state_dict()})
    assert torch.allclose(find_backbone(model)(images()).feature_maps[0], alone(images()).feature_maps[0], atol=1e-5)


def test_a_trainable_norm_stays_trainable_where_the_detector_wants_it() -> None:
    model = DETECTORS["upernet"].make(config(*STAGES[1:], norm="bn", freeze_at=1))
    reports = freeze_report(find_backbone(model.train()).network)
    assert [report.norm for report in reports.values()] == ["frozen_bn", "bn", "bn", "bn", "bn"]


# inference, and what is absent


@pytest.mark.parametrize("norm", ["frozen_bn", "bn"])
def test_an_optimised_detector_gives_the_same_outputs(norm: str) -> None:
    model = detr(norm=norm).eval()
    fast = optimize_for_inference(model)
    assert torch.allclose(fast(images()).logits, model(images()).logits, atol=1e-4)
    assert not any(isinstance(m, FrozenBatchNorm2d) for m in find_backbone(fast).modules())


def test_a_model_without_our_backbone_is_told_so() -> None:
    model = DETECTORS["upernet"].make(transformers.ResNetConfig(**RESNET_18, out_features=STAGES[1:]))
    with pytest.raises(ValueError, match=r"must have a TransformersBackbone, got UperNetForSemanticSegmentation"):
        find_backbone(model)


def test_without_transformers_one_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    for name in [name for name in sys.modules if name.startswith("backbone.hosts.transformers")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'backbone\[transformers\]'$"):
        importlib.import_module("backbone.hosts.transformers")


@pytest.mark.filterwarnings("ignore:.*pin_memory")
def test_freezing_holds_through_the_trainer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs it")
    pytest.importorskip("scipy", reason="transformers' losses match boxes by scipy")
    model = reloaded(detr(freeze_at=2), tmp_path / "saved")
    model.model.unfreeze_backbone()
    before = {key: value.clone() for key, value in find_backbone(model).network.state_dict().items()}
    samples = [
        {"pixel_values": image, "labels": label} for image, label in zip(images(), boxes()["labels"], strict=True)
    ]
    arguments = transformers.TrainingArguments(
        str(tmp_path / "run"),
        max_steps=1,
        learning_rate=0.1,
        weight_decay=0.1,
        report_to="none",
        save_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=True,
    )
    collate = lambda batch: {  # noqa: E731
        "pixel_values": torch.stack([sample["pixel_values"] for sample in batch]),
        "labels": [sample["labels"] for sample in batch],
    }
    transformers.Trainer(model, arguments, collate, samples).train()
    after = find_backbone(model).network.state_dict()
    moved = {key.partition(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert moved == {"layer2", "layer3", "layer4"}
