"""timm's models behind the contract, held against timm's own features_only models."""

import copy
import hashlib
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import build, randomise_norms, relative_error
from safetensors.torch import save_file
from torch import nn

from backbone import (
    BackboneConfig,
    FreezeSchedule,
    FrozenBatchNorm2d,
    UnknownBackboneError,
    build_backbone,
    freeze_report,
    freeze_stages,
    list_backbones,
    optimize_for_inference,
    thaw_norms,
)
from backbone.providers.timm.plan import levels, plan
from backbone.providers.timm.provider import TimmBackbone
from backbone.stages import STAGE_NAMES

TOOLS = Path(__file__).parents[2] / "tools"
ALL = ("c2", "c3", "c4", "c5")

# One model for each way in which timm's families differ; `tools/check_timm.py` checks every family.
MODELS = {
    "test_resnet": ALL,  # convolutions and BatchNorm2d
    "regnetx_002": ALL,  # BatchNormAct2d
    "test_convnext": ALL,  # LayerNorm; rounds sizes down
    "test_efficientnet": ALL,  # C2 is the second group of blocks
    "dla46x_c": ALL,  # levels at strides 1 and 2, refuses odd sizes
    "swin_tiny_patch4_window7_224": ALL,  # windows, channels last, drop-path
    "edgenext_xx_small": ALL,
    "test_vit": ALL,  # one map: simple pyramid
    "levit_128s": ("c4", "c5"),  # BatchNorm1d, one image size, no C2 and C3
    "mvitv2_tiny": ALL,  # timm's module names are out of date
    "visformer_tiny": ("c3", "c4", "c5"),  # parameters beside modules
}
# Name -> why it cannot be a backbone.
REFUSED = {
    "inception_v3": "299x299 gives 71x71 at stride 4",
    "crossvit_tiny_240": "strides 12, 17",
    "convmixer_768_32": "strides 7",
    "pit_ti_224": "27x27 at stride 8",
}
# Settings that timm has no way to honour -> part of the reason.
UNSUPPORTED: list[tuple[str, dict[str, object], str]] = [
    ("test_resnet", {"stride_in_1x1": True}, "stride_in_1x1 must be false"),
    ("test_resnet", {"weights": "default", "stem_channels_from": [2, 1, 0]}, "stem_channels_from must be null: timm"),
    ("test_resnet", {"num_classes": 10}, "num_classes must be null"),
    ("test_resnet", {"checkpoint_stages": ["c2"]}, "checkpoint_stages must be empty"),
    ("test_resnet", {"dilate_first_block": True, "output_stride": 16}, "keeps the previous dilation"),
    ("test_convnext", {"zero_init_residual": True}, "zero_init_residual"),
    ("test_convnext", {"norm": "gn"}, "has no batch norm"),
    ("test_efficientnet", {"norm": "gn"}, "must be divisible"),
    ("edgenext_xx_small", {"output_stride": 16}, "output_stride must be 32"),
    ("test_vit", {"output_stride": 8}, "output_stride must be 32"),
    ("dla46x_c", {"output_stride": 16}, "output_stride must be 32"),
    ("levit_128s", {}, "c4, c5; got c2, c3"),
]


@pytest.fixture(scope="module")
def checks() -> Iterator[Any]:
    """The tool that checks every family."""
    sys.path.insert(0, str(TOOLS))
    yield importlib.import_module("check_timm")
    sys.path.remove(str(TOOLS))


def build_timm(model: str, **settings: object) -> TimmBackbone:
    backbone = build(f"timm/{model}", **{"out_features": MODELS.get(model, ALL), **settings})
    assert isinstance(backbone, TimmBackbone)
    return backbone


def batch(backbone: TimmBackbone, channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, *(backbone.only_size or (64, 64)))


@pytest.mark.parametrize("model", MODELS)
def test_model_keeps_the_whole_contract(checks: Any, model: str) -> None:
    assert checks.check(model, MODELS[model]) == ""


@pytest.mark.parametrize(("model", "reason"), REFUSED.items())
def test_model_without_maps_at_our_strides_is_refused_with_the_reason(model: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        build(f"timm/{model}")


@pytest.mark.parametrize(("model", "settings", "reason"), UNSUPPORTED)
def test_setting_that_cannot_be_honoured_is_refused(model: str, settings: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        build(f"timm/{model}", **settings)


@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_is_in_exactly_one_stage(model: str) -> None:
    backbone = build_timm(model)
    staged = [parameter for modules in backbone.stages.values() for parameter in modules.parameters()]
    expected = [p for name, p in backbone.named_parameters() if not name.startswith("pyramid.")]
    assert sorted(map(id, staged)) == sorted(map(id, expected))


@pytest.mark.parametrize("model", [model for model, found in MODELS.items() if len(found) == len(ALL)])
def test_all_five_stages_have_parameters(model: str) -> None:
    report = freeze_report(build_timm(model))
    assert list(report) == list(STAGE_NAMES)
    assert all(stage.parameters for stage in report.values())


STEMS = {
    "test_resnet": {"conv1", "bn1", "act1", "maxpool"},
    "regnetx_002": {"stem"},
    "test_convnext": {"stem"},
    "test_efficientnet": {"conv_stem", "bn1", "blocks.0"},
    "mvitv2_tiny": {"patch_embed"},
    "swin_tiny_patch4_window7_224": {"patch_embed"},
}


@pytest.mark.parametrize(("model", "modules"), STEMS.items())
def test_stem_is_what_comes_before_c2(model: str, modules: set[str]) -> None:
    assert set(build_timm(model).stage_modules["stem"]) == {f"network.{name}" for name in modules}


def test_stages_of_a_plain_transformer_are_quarters_of_its_blocks() -> None:
    backbone = build_timm("vit_tiny_patch16_224")
    blocks = [[path for path in paths if ".blocks." in path] for paths in backbone.stage_modules.values()]
    assert blocks == [[], *([f"network.blocks.{first + n}" for n in range(3)] for first in (0, 3, 6, 9))]
    assert backbone.stage_parameters == {"stem": ["network.cls_token", "network.pos_embed"]}


def test_level_is_chosen_by_stride_and_not_by_index() -> None:
    assert levels("a model", [1, 2, 4, 8, 8, 16, 32, 64]) == {"c2": 2, "c3": 4, "c4": 5, "c5": 6}


@pytest.mark.parametrize("model", ["test_resnet", "test_convnext", "test_efficientnet", "visformer_tiny"])
def test_what_only_later_levels_need_is_not_built(model: str) -> None:
    whole, early = build_timm(model), build_timm(model, out_features=["c3"])
    assert list(early.feature_specs) == ["c3"]
    needed = sum(
        p.numel() for stage in ("stem", "c2", "c3") if stage in whole.stages for p in whole.stages[stage].parameters()
    )
    assert sum(parameter.numel() for parameter in early.parameters()) == needed


def test_model_built_in_inference_mode_is_whole() -> None:
    plan.cache_clear()
    with torch.inference_mode():
        built = build_timm("test_resnet")
    complete = {f"network.{key}": value.shape for key, value in timm.create_model("test_resnet").state_dict().items()}
    expected = {key: shape for key, shape in complete.items() if not key.startswith("network.fc.")}
    assert {key: value.shape for key, value in built.state_dict().items()} == expected
    assert list(built.stages) == list(STAGE_NAMES)


# Model -> how the map's dilation shows: strides at output_stride 16 and 8.
DILATED = ("test_resnet", "regnetx_002", "test_convnext", "test_efficientnet")


@pytest.mark.parametrize("output_stride", [16, 8])
@pytest.mark.parametrize("model", DILATED)
def test_dilated_levels_keep_their_names_and_equal_timms(model: str, output_stride: int) -> None:
    backbone = build_timm(model, output_stride=output_stride).eval()
    assert [spec.stride for spec in backbone.feature_specs.values()] == [min(s, output_stride) for s in (4, 8, 16, 32)]
    reference: Any = timm.create_model(model, output_stride=output_stride).eval()
    state = {k.removeprefix("network."): v for k, v in backbone.state_dict().items()}
    missing = reference.load_state_dict(state, strict=False).missing_keys
    assert all(f"network.{key}".startswith(backbone.unbuilt_prefixes) for key in missing)
    images = torch.randn(1, 3, 64, 96)
    expected = reference.forward_intermediates(images, indices=backbone.indices, intermediates_only=True)
    for (name, actual), wanted in zip(backbone(images).items(), expected, strict=True):
        spec = backbone.feature_specs[name]
        assert actual.shape == (1, spec.channels, 64 // spec.stride, 96 // spec.stride)
        assert relative_error(actual, wanted) <= 1e-5


@pytest.mark.parametrize("model", ["test_convnext", "test_vit", "swin_tiny_patch4_window7_224", "dla46x_c"])
@pytest.mark.parametrize("size", [(33, 70), (100, 64), (1, 1)])
def test_sizes_round_up_for_every_image(model: str, size: tuple[int, int]) -> None:
    backbone = build_timm(model).eval()
    for name, feature in backbone(torch.randn(1, 3, *size)).items():
        stride = backbone.feature_specs[name].stride
        assert feature.shape[2:] == tuple(-(-side // stride) for side in size)


def test_padding_is_zeros_at_the_right_and_below() -> None:
    backbone = build_timm("test_convnext").eval()
    images = torch.randn(1, 3, 50, 40)
    padded = torch.zeros(1, 3, 64, 64)
    padded[..., :50, :40] = images
    assert torch.equal(backbone(images)["c4"], backbone(padded)["c4"][..., :4, :3])


def test_model_of_one_size_says_so() -> None:
    with pytest.raises(ValueError, match=r"images of timm/levit_128s must be 224x224 pixels.* got 64x64"):
        build_timm("levit_128s")(torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize(
    "images", [torch.zeros(3, 64, 64), torch.zeros(1, 4, 64, 64), torch.zeros(1, 3, 64, 64).byte()]
)
def test_images_of_another_kind_are_refused(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="images must be a floating-point tensor"):
        build_timm("test_resnet")(images)


def test_input_channels_are_free() -> None:
    assert build_timm("test_convnext", in_channels=5)(torch.randn(1, 5, 64, 64))["c5"].shape == (1, 64, 2, 2)


NORM_KINDS = {"frozen_bn": "frozen_bn", "bn": "bn", "sync_bn": "sync_bn", "gn": "gn"}


@pytest.mark.parametrize("norm", NORM_KINDS)
@pytest.mark.parametrize("model", ["resnet18", "cs3darknet_focus_s"])  # BatchNorm2d; BatchNormAct2d
def test_norm_means_what_it_means_for_ours(model: str, norm: str) -> None:
    report = freeze_report(build_timm(model, norm=norm))
    kinds = {stage.norm for stage in report.values()}
    assert kinds <= {norm, "bn+sync_bn"}, kinds
    trainable = [stage.parameters == stage.trainable_parameters for stage in report.values()]
    assert all(trainable) == (norm != "frozen_bn")


@pytest.mark.parametrize("norm", ["bn", "gn"])
@pytest.mark.parametrize("zero", [True, False])
def test_zero_init_residual_holds_for_every_trainable_norm(norm: str, zero: bool) -> None:
    backbone = build_timm("resnet18", norm=norm, zero_init_residual=zero)
    assert bool(backbone.get_parameter("network.layer1.0.bn2.weight").any()) != zero


@pytest.mark.parametrize("norm", ["bn", "sync_bn"])
@pytest.mark.parametrize("model", ["test_byobnet", "levit_128s"])  # norm with activation; norm of tokens
def test_frozen_norms_equal_the_layers_they_stand_for(model: str, norm: str) -> None:
    backbone = build_timm(model, norm=norm).eval()
    randomise_norms(backbone)
    images = batch(backbone)
    expected = backbone(images)
    freeze_stages(backbone, 5)
    for name, actual in backbone.train()(images).items():
        assert relative_error(actual, expected[name]) <= 1e-5


def test_norms_with_activation_thaw_into_the_very_same_modules() -> None:
    backbone = build_timm("regnetx_002")
    before = {name: module for name, module in backbone.named_modules() if hasattr(module, "running_var")}
    freeze_stages(backbone, 5)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in backbone.modules())
    freeze_stages(backbone, 0)
    assert {name: module for name, module in backbone.named_modules() if hasattr(module, "running_var")} == before


def test_norms_built_frozen_stay_so_until_they_are_thawed() -> None:
    backbone = build_timm("regnetx_002", norm="frozen_bn", freeze_at=3)
    freeze_stages(backbone, 0)
    norms = [m for m in backbone.modules() if hasattr(m, "running_var")]
    assert all(isinstance(m, FrozenBatchNorm2d) for m in norms)
    thaw_norms(backbone)
    assert not any(isinstance(m, FrozenBatchNorm2d) for m in backbone.modules())
    assert all(parameter.requires_grad for parameter in backbone.parameters())


def with_dropout(backbone: TimmBackbone) -> TimmBackbone:
    for module in backbone.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.5  # type: ignore[assignment]
    return backbone


@pytest.mark.parametrize("event", ["train", "deepcopy", "wrapped"])
def test_drop_path_rests_in_frozen_stages(event: str) -> None:
    backbone = with_dropout(build_timm("swin_tiny_patch4_window7_224", freeze_at=2))
    images = torch.randn(4, 3, 64, 64)
    model: nn.Module = copy.deepcopy(backbone) if event == "deepcopy" else backbone
    holder = nn.Sequential(model).train() if event == "wrapped" else model.train()
    first, second = holder(images), holder(images)
    assert torch.equal(first["c2"], second["c2"])
    assert not torch.equal(first["c3"], second["c3"])


def test_drop_path_acts_again_in_thawed_stages() -> None:
    backbone = with_dropout(build_timm("swin_tiny_patch4_window7_224", freeze_at=5)).train()
    freeze_stages(backbone, 1)
    images = torch.randn(4, 3, 64, 64)
    assert not torch.equal(backbone(images)["c2"], backbone(images)["c2"])


def test_thawing_an_evaluated_model_leaves_it_evaluated() -> None:
    backbone = build_timm("test_convnext", freeze_at=5).eval()
    freeze_stages(backbone, 0)
    assert not any(module.training for module in backbone.modules())


def test_schedule_thaws_parameters_beside_modules() -> None:
    backbone = build_timm("test_vit")
    schedule = FreezeSchedule({0: 1, 1: 0})
    schedule.apply(backbone, 0)
    assert not backbone.get_parameter("network.pos_embed").requires_grad
    assert schedule.apply(backbone, 1)
    assert backbone.get_parameter("network.pos_embed").requires_grad


def test_pyramid_of_a_transformer_trains_whatever_is_frozen() -> None:
    backbone = build_timm("test_vit", freeze_at=5)
    trainable = [name for name, p in backbone.named_parameters() if p.requires_grad]
    assert trainable == [name for name, _ in backbone.pyramid.named_parameters(prefix="pyramid")]  # type: ignore[union-attr]


def test_network_without_batch_norms_does_not_claim_frozen_ones(recwarn: pytest.WarningsRecorder) -> None:
    build_backbone(BackboneConfig(name="timm/test_convnext"))
    assert not recwarn.list


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, torch.Tensor]:
    return publish("test_convnext", monkeypatch, tmp_path)


def publish(model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, torch.Tensor]:
    """Let timm find what it publishes for ``model`` in a file; return it."""
    complete = timm.create_model(model)
    with torch.no_grad():
        for parameter in complete.parameters():
            parameter.normal_()
    randomise_norms(complete)
    file = tmp_path / "weights.pth"
    torch.save(complete.state_dict(), file)
    for name in timm.models.get_arch_pretrained_cfgs(model):
        config = timm.models._registry._model_pretrained_cfgs[name]
        monkeypatch.setattr(config, "hf_hub_id", None)
        monkeypatch.setattr(config, "file", str(file))
    return complete.state_dict()


@pytest.mark.parametrize("source", ["default", "r160_in1k"])
def test_weights_of_timm_are_loaded_by_timm(published: dict[str, torch.Tensor], source: str) -> None:
    backbone = build_timm("test_convnext", weights=source)
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, published[key.removeprefix("network.")])


def test_list_weights_of_a_resnet_are_loaded_by_timm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    state = publish("resnet18", monkeypatch, tmp_path)
    for key, value in build_timm("resnet18", norm="bn", weights="default").state_dict().items():
        assert torch.equal(value, state[key.removeprefix("network.")])


def test_tag_in_the_name_is_the_default(published: dict[str, torch.Tensor]) -> None:
    backbone = build_timm("test_convnext.r160_in1k", weights="default")
    assert torch.equal(backbone.get_parameter("network.stem.0.weight"), published["stem.0.weight"])


def test_preprocessing_of_the_weights_travels_with_the_backbone(published: dict[str, torch.Tensor]) -> None:
    preprocessing = build_timm("test_convnext", weights="default").preprocessing
    config = timm.get_pretrained_cfg("test_convnext")
    assert config is not None
    assert (preprocessing.mean, preprocessing.std) == (config.mean, config.std)
    assert preprocessing.interpolation == config.interpolation == "bicubic"


def test_weights_adapt_to_input_channels_as_timm_does(published: dict[str, torch.Tensor]) -> None:
    weight = build_timm("test_convnext", weights="default", in_channels=1).get_parameter("network.stem.0.weight")
    assert relative_error(weight, published["stem.0.weight"].sum(1, keepdim=True)) <= 1e-5


FILE_MODELS = ("resnet18", "convnext_atto")  # a ResNet has torchvision's names, too


def saved(kind: str, state: dict[str, torch.Tensor], folder: Path) -> str:
    """Write ``state`` as a file of a kind; return where it is."""
    path = folder / f"x{kind.partition('#')[0]}"
    if kind == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 3} if kind in (".ckpt", ".tar") else state, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return f"file://{path}#sha256={digest}" if "#" in kind else str(path)


@pytest.mark.parametrize("kind", [".pth", ".safetensors", ".ckpt", ".tar", ".pth#sha256"])
@pytest.mark.parametrize("model", FILE_MODELS)
def test_file_of_timms_names_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: str, kind: str) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    complete = timm.create_model(model, num_classes=7)
    backbone = build_timm(model, weights=saved(kind, complete.state_dict(), tmp_path))
    config: Any = complete.pretrained_cfg
    assert backbone.preprocessing.interpolation == config["interpolation"]
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, complete.state_dict()[key.removeprefix("network.")])


@pytest.mark.parametrize("out_features", [ALL, ("c3",)])
@pytest.mark.parametrize("kind", [".pth", ".ckpt"])
@pytest.mark.parametrize("model", [*FILE_MODELS, "test_vit"])
def test_own_state_dict_is_loaded(tmp_path: Path, model: str, kind: str, out_features: tuple[str, ...]) -> None:
    state = build_timm(model).state_dict()
    settings = {} if model == "test_vit" else {"out_features": out_features}
    for key, value in build_timm(model, weights=saved(kind, state, tmp_path), **settings).state_dict().items():
        assert torch.equal(value, state[key])


def test_eps_of_timms_norms_stays_with_weights_of_timm(tmp_path: Path) -> None:
    before = build_timm("tf_mobilenetv3_small_100", norm="bn")
    file = saved(".pth", before.state_dict(), tmp_path)
    after = build_timm("tf_mobilenetv3_small_100", norm="bn", weights=file)
    assert {m.eps for m in after.modules() if hasattr(m, "running_var")} == {1e-3}


BROKEN: dict[str, Any] = {
    "missing": lambda state: {k: v for k, v in state.items() if k != "stages.1.blocks.0.gamma"},
    "unexpected": lambda state: {**state, "junk": torch.zeros(2)},
    "another shape": lambda state: {**state, "stem.0.bias": torch.zeros(3)},
    "not finite": lambda state: {**state, "stem.0.bias": state["stem.0.bias"] * torch.nan},
    "empty": lambda state: {},
    "of another network": lambda state: timm.create_model("test_vit").state_dict(),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_file_that_does_not_fit_is_one_clear_error(tmp_path: Path, kind: str) -> None:
    file = saved(".pth", BROKEN[kind](timm.create_model("convnext_atto").state_dict()), tmp_path)
    with pytest.raises(ValueError, match=file) as caught:
        build_timm("convnext_atto", weights=file)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("name", "tag"), [("timm/test_convnext", "default"), ("timm/test_convnext.r160_in1k", "r160_in1k")]
)
def test_models_name_in_the_place_of_a_tag_is_told_what_to_write(name: str, tag: str) -> None:
    with pytest.raises(ValueError, match=f"got '{name}'; write {tag}$"):
        build_timm("test_convnext", weights=name)


@pytest.mark.parametrize("channels", [1, 4])
def test_mean_and_std_adapt_to_input_channels(published: dict[str, torch.Tensor], channels: int) -> None:
    rgb = build_timm("test_convnext", weights="default").preprocessing
    adapted = build_timm("test_convnext", weights="default", in_channels=channels).preprocessing
    for given, wanted in ((adapted.mean, rgb.mean), (adapted.std, rgb.std)):
        expected = (sum(wanted) / 3,) if channels == 1 else (*wanted, wanted[0])
        assert given == pytest.approx(expected)


@pytest.mark.parametrize(
    ("model", "offered"), [("test_convnext", "default, r160_in1k"), ("nf_resnet26", "publishes none")]
)
def test_unknown_tag_is_refused_with_the_known_ones(model: str, offered: str) -> None:
    with pytest.raises(ValueError, match=f"{offered}.*got 'in99k'"):
        build_timm(model, weights="in99k")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("timm/convnext_tny", "did you mean 'timm/convnext_tiny'"),
        ("timm/test_convnext.r16_in1k", "did you mean 'r160_in1k'"),
    ],
)
def test_unknown_name_is_told_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(UnknownBackboneError, match=hint):
        build(name)


@pytest.mark.parametrize("norm", ["bn", "frozen_bn"])
@pytest.mark.parametrize("model", ["resnet18", "regnetx_002"])
def test_inference_copy_folds_every_norm_and_equals(model: str, norm: str) -> None:
    backbone = build_timm(model, norm=norm).eval()
    randomise_norms(backbone)
    images = torch.randn(1, 3, 64, 64)
    fast: Any = optimize_for_inference(backbone)
    assert fast.optimization.kept == ()
    for name, expected in backbone(images).items():
        assert relative_error(fast(images)[name], expected) <= 1e-5


def test_names_of_timm_are_listed_on_request() -> None:
    assert list_backbones("timm/convnext_att*") == [f"timm/{name}" for name in timm.list_models("convnext_att*")]
    assert list_backbones("test_conv*", provider="timm") == [
        "timm/test_convnext",
        "timm/test_convnext2",
        "timm/test_convnext3",
    ]


def run_without_timm(program: str) -> str:
    """Run ``program`` in a process where timm cannot be imported; return what it prints."""
    blocked = "import sys; sys.modules['timm'] = None\n"
    command = [sys.executable, "-c", blocked + program]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_core_works_without_timm() -> None:
    program = """
import torch, backbone
model = backbone.build_backbone(backbone.BackboneConfig(name='resnet18', norm='bn'))
print(len(backbone.list_backbones()), list(model(torch.zeros(2, 3, 64, 64))))
"""
    assert run_without_timm(program) == f"{len(list_backbones())} ['c2', 'c3', 'c4', 'c5']\n"


@pytest.mark.parametrize("call", ["build_backbone(BackboneConfig(name='timm/resnet50'))", "list_backbones('timm/*')"])
def test_missing_timm_is_named_with_the_extra(call: str) -> None:
    program = f"from backbone import *\ntry:\n  {call}\nexcept ImportError as error:\n  print(error)\n"
    assert "pip install 'backbone[timm]'" in run_without_timm(program)


def test_importing_the_package_imports_no_timm() -> None:
    program = "import sys, backbone; backbone.list_backbones(); print('timm' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert shown == "False\n"
