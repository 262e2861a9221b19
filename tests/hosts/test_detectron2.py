"""Our backbones inside detectron2: its keys, its names, its files, its loop."""

import copy
import functools
import importlib
import importlib.util
import pickle
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from detectron2_pairs import (  # skips without detectron2
    by_their_names,
    detector,
    example,
    losses_and_gradients,
    read_recipe,
    recipes,
    with_our_name,
)

# isort: split
import pytest
import torch
from conftest import randomise_norms, relative_error, saved_mebibytes
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyCall, LazyConfig, get_cfg, instantiate
from detectron2.engine import SimpleTrainer
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_backbone, build_model
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone import resnet as their_resnet
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from backbone import (
    Backbone,
    BackboneConfig,
    Features,
    FeatureSpec,
    FreezeSchedule,
    Preprocessing,
    freeze_report,
    freeze_stages,
    list_backbones,
    optimize_for_inference,
    register_backbone,
)
from backbone.hosts.detectron2 import (
    DROP_IN_BUILDERS,
    DetectronBackbone,
    DetectronPyramid,
    FreezeScheduleHook,
    add_backbone_config,
)
from backbone.providers.resnet.deformable import DeformableConv3x3

THEIR_PLAIN, THEIR_FPN, THEIR_RETINANET = DROP_IN_BUILDERS
ALL_FEATURES = ["res2", "res3", "res4", "res5"]
FASTER_RCNN = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning"),  # detectron2's anchors
]


def settings(*overrides: object, builder: str = THEIR_PLAIN, ours: bool = True) -> Any:
    """A ResNet-18 with detectron2's own keys."""
    cfg = get_cfg()
    add_backbone_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = DROP_IN_BUILDERS[builder] if ours else builder
    cfg.MODEL.RESNETS.update(DEPTH=18, RES2_OUT_CHANNELS=64, OUT_FEATURES=ALL_FEATURES)
    cfg.MODEL.FPN.IN_FEATURES = ALL_FEATURES
    cfg.merge_from_list(list(overrides))
    return cfg


def pair(*overrides: object, builder: str = THEIR_PLAIN) -> tuple[Any, Any]:
    """detectron2's backbone with random norms, and ours with its state dict."""
    theirs, ours = (build_backbone(settings(*overrides, builder=builder, ours=ours)) for ours in (False, True))
    randomise_norms(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs.eval(), ours.eval()


def assert_same_features(theirs: nn.Module, ours: nn.Module, size: tuple[int, int] = (64, 96)) -> None:
    images = torch.randn(1, 3, *size)
    with torch.no_grad():
        expected, actual = theirs(images), ours(images)
    assert list(actual) == list(expected)
    assert max(relative_error(actual[name], expected[name]) for name in expected) <= 1e-5


# keys


def test_importing_again_registers_nothing_twice() -> None:
    importlib.reload(importlib.import_module("backbone.hosts.detectron2.builders"))
    assert all(ours in BACKBONE_REGISTRY for ours in DROP_IN_BUILDERS.values())


KEYS: list[tuple[object, ...]] = [
    ("MODEL.RESNETS.DEPTH", 34),
    ("MODEL.RESNETS.NORM", "GN"),
    ("MODEL.RESNETS.NORM", "BN"),
    ("MODEL.RESNETS.NORM", "naiveSyncBN", "MODEL.BACKBONE.FREEZE_AT", 0),
    ("MODEL.RESNETS.NORM", "LN"),
    ("MODEL.RESNETS.NORM", ""),
    ("MODEL.RESNETS.STEM_OUT_CHANNELS", 32),
    ("MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 128, "MODEL.RESNETS.STEM_OUT_CHANNELS", 16),
    ("MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256, "MODEL.RESNETS.WIDTH_PER_GROUP", 8,
     "MODEL.RESNETS.NUM_GROUPS", 8, "MODEL.RESNETS.STRIDE_IN_1X1", False),
    ("MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256, "MODEL.RESNETS.RES5_DILATION", 2),
    ("MODEL.RESNETS.OUT_FEATURES", ["res3"]),
    ("MODEL.PIXEL_MEAN", [1.0, 2.0, 3.0]),
]  # fmt: skip


@pytest.mark.parametrize("overrides", KEYS, ids=str)
def test_each_of_its_keys_means_the_same(overrides: tuple[object, ...]) -> None:
    theirs, ours = pair(*overrides)
    assert ours.output_shape() == theirs.output_shape()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert_same_features(theirs, ours)


@pytest.mark.parametrize(
    "overrides",
    [(), ("MODEL.FPN.NORM", "GN"), ("MODEL.FPN.FUSE_TYPE", "avg"), ("MODEL.FPN.OUT_CHANNELS", 64)],
    ids=str,
)
@pytest.mark.parametrize("builder", [THEIR_FPN, THEIR_RETINANET])
def test_each_of_its_pyramid_keys_means_the_same(builder: str, overrides: tuple[object, ...]) -> None:
    theirs, ours = pair(*overrides, builder=builder)
    assert (ours.output_shape(), ours.size_divisibility) == (theirs.output_shape(), theirs.size_divisibility)
    assert ours.padding_constraints == theirs.padding_constraints
    assert_same_features(theirs, ours)


@pytest.mark.parametrize("freeze_at", range(6))
@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "GN"])
def test_freeze_at_leaves_the_same_parameters_to_the_optimizer(freeze_at: int, norm: str) -> None:
    models = pair("MODEL.BACKBONE.FREEZE_AT", freeze_at, "MODEL.RESNETS.NORM", norm)
    theirs, ours = ([tuple(p.shape) for p in model.parameters() if p.requires_grad] for model in models)
    assert sorted(ours) == sorted(theirs)


BAD: list[tuple[tuple[object, ...], str]] = [
    (("MODEL.RESNETS.DEPTH", 51), "DEPTH must be one of 18, 34, 50, 101, 152, got 51"),
    (("MODEL.RESNETS.RES2_OUT_CHANNELS", 256), "needs NUM_GROUPS 1 and RES2_OUT_CHANNELS 64, got 1 and 256"),
    (("MODEL.RESNETS.RES5_DILATION", 4), "RES5_DILATION must be 1 or 2, got 4"),
    (("MODEL.RESNETS.OUT_FEATURES", ["stem"]), "out_features must be among res2, res3, res4, res5, got stem"),
    (("MODEL.RESNETS.NORM", "frozen_bn"), "norm must be one that detectron2 knows, .*got 'frozen_bn'"),
    (("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, False, False, True]), "choose resnet50 or deeper"),
    (("MODEL.BACKBONE.FREEZE_AT", 6), "freeze_at must be 0 to 5"),
    (("MODEL.BACKBONE_PLUGIN.IN_CHANNELS", 4), "IN_CHANNELS is 4, but the model .* 3 channels"),
    (("MODEL.RESNETS.RES5_DILATION", 2, "MODEL.BACKBONE_PLUGIN.OUTPUT_STRIDE", 32), "RES5_DILATION 2 makes it 16"),
    (("MODEL.BACKBONE_PLUGIN.OUTPUT_STRIDE", 64), "output_stride must be 32, 16 or 8"),
    (("MODEL.BACKBONE_PLUGIN.NAME", "resnet50"), "contradicts with DEPTH 18, RES2_OUT_CHANNELS 64"),
    (("MODEL.BACKBONE_PLUGIN.CHECKPOINT_STAGES", ["c4"]), "checkpoint_stages must be among res2, .* got c4"),
    (("MODEL.FPN.IN_FEATURES", ["res3", "res4"]), "in_features .* hold the last of them, got res3, res4"),
    (("MODEL.FPN.FUSE_TYPE", "max"), "fuse_type must be sum or avg, got 'max'"),
]


@pytest.mark.parametrize(("overrides", "rule"), BAD, ids=lambda value: str(value)[:60])
def test_what_cannot_be_is_refused_with_the_rule(overrides: tuple[object, ...], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        build_backbone(settings(*overrides, builder=THEIR_FPN))


def test_an_unknown_plugin_key_is_refused_with_the_nearest() -> None:
    cfg = settings()
    cfg.MODEL.BACKBONE_PLUGIN.OUTPUT_STRIDES = 8
    with pytest.raises(ValueError, match=r"unknown key .*OUTPUT_STRIDES; did you mean 'OUTPUT_STRIDE'"):
        build_backbone(cfg)


@pytest.mark.parametrize("builder", [THEIR_FPN, THEIR_RETINANET])
@pytest.mark.parametrize("size", [(64, 96), (65, 97), (33, 250)])
def test_a_pyramid_on_a_dilated_res5_takes_any_size(builder: str, size: tuple[int, int]) -> None:
    with pytest.raises(AssertionError, match="log2 contiguous"):
        build_backbone(settings("MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256,
                                "MODEL.RESNETS.RES5_DILATION", 2, builder=builder, ours=False))  # fmt: skip
    model = build_backbone(settings("MODEL.RESNETS.RES5_DILATION", 2, builder=builder))
    features = model(torch.randn(1, 3, *size))
    shapes = model.output_shape()
    assert [shapes[name].stride for name in ("p4", "p5", "p6")] == [16, 16, 32]
    for name, feature in features.items():
        assert feature.shape[2:] == tuple(-(-side // shapes[name].stride) for side in size)


DILATED: dict[str, tuple[object, ...]] = {
    FASTER_RCNN: ("MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4"]),  # its ROIPooler wants doubling strides
    "COCO-Detection/retinanet_R_50_FPN_1x.yaml": (),
}


@pytest.mark.parametrize("name", DILATED)
def test_a_detector_on_a_dilated_res5_trains_and_detects(name: str) -> None:
    small = ("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RESNETS.RES5_DILATION", 2)
    model = detector(with_our_name(read_recipe(name, *small, *DILATED[name])))
    losses, gradients = losses_and_gradients(model, example((97, 131)))
    assert all(loss.isfinite() for loss in losses.values())
    assert any(name.endswith("res5.1.conv2.weight") for name in gradients)
    with torch.no_grad():
        assert "instances" in model.eval()(example((97, 131)))[0]


class Pooling(Backbone):
    """A backbone of somebody else's: no parameter of it is named as in a ResNet."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.project = nn.Conv2d(config.in_channels, 8, 1)
        self.stage_modules = {"stem": ("project",)}
        self.feature_specs = {name: FeatureSpec(8, 1 << int(name[1])) for name in config.out_features}

    def forward(self, images: Tensor) -> Features:
        x = self.project(images)
        return {name: nn.functional.avg_pool2d(x, s.stride, ceil_mode=True) for name, s in self.feature_specs.items()}


def test_any_registered_backbone_works_under_its_own_parameter_names() -> None:
    if "pooling_of_the_detectron2_tests" not in list_backbones():
        register_backbone("pooling_of_the_detectron2_tests")(Pooling)
    row = ("MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256)
    plugin = ("MODEL.BACKBONE_PLUGIN.NAME", "pooling_of_the_detectron2_tests")
    model = build_backbone(settings(*row, *plugin, builder=THEIR_RETINANET))
    assert list(model(torch.randn(1, 3, 64, 64))) == ["p2", "p3", "p4", "p5", "p6", "p7"]
    assert {"bottom_up.project.weight", "fpn_output5.bias", "top_block.p6.weight"} <= model.state_dict().keys()
    model.load_state_dict(model.state_dict(), strict=True)


PLUGIN: list[tuple[tuple[object, ...], Callable[[Any], bool]]] = [
    (("OUTPUT_STRIDE", 8), lambda model: model.output_shape()["res5"].stride == 8),
    (("NAME", "resnext50_32x4d", "OUTPUT_STRIDE", 16), lambda model: model.network.layer4[0].conv2.dilation == (2, 2)),
    (("NAME", "resnext50_32x4d", "OUTPUT_STRIDE", 16, "DILATE_FIRST_BLOCK", False),
     lambda model: model.network.layer4[0].conv2.dilation == (1, 1)),
    (("NAME", "resnet18", "CHECKPOINT_STAGES", ["res3"]), lambda model: model.network.layer2.recompute),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "holds"), PLUGIN, ids=[str(keys) for keys, _ in PLUGIN])
def test_the_plugin_node_says_what_its_keys_cannot(keys: tuple[Any, ...], holds: Callable[[Any], bool]) -> None:
    overrides = [f"MODEL.BACKBONE_PLUGIN.{item}" if index % 2 == 0 else item for index, item in enumerate(keys)]
    row = ("MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256)
    model = build_backbone(settings(*row, *overrides))
    assert holds(model)


def test_images_of_five_channels_need_five_pixel_means_and_no_more() -> None:
    cfg = settings("MODEL.PIXEL_MEAN", [1.0] * 5)
    assert build_backbone(cfg)(torch.randn(1, 5, 64, 64))["res5"].shape[1] == 512


# settings that contradict weights


@pytest.mark.parametrize("name", [name for name in recipes() if name.endswith(".yaml")])
def test_no_recipe_of_its_zoo_is_said_to_contradict_its_weights(name: str) -> None:
    from backbone.hosts.detectron2.builders import _warn_of_contradictions

    recipe = read_recipe(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _warn_of_contradictions(recipe, "", Preprocessing())
        if not name.startswith("Misc"):
            recipe.MODEL.WEIGHTS = f"detectron2://{name.removesuffix('.yaml')}/137849600/model_final_f10217.pkl"
            _warn_of_contradictions(recipe, "", Preprocessing())


@pytest.mark.parametrize(
    ("weights", "messages"),
    [
        (
            "detectron2://ImageNetPretrained/torchvision/R-50.pkl",
            ["STRIDE_IN_1X1 is True, but .* with False", "FORMAT is BGR, .* RGB", r"PIXEL_STD is \[1.0.*58.395"],
        ),
        ("detectron2://ImageNetPretrained/FAIR/X-101-32x8d.pkl", ["STRIDE_IN_1X1 is True", "PIXEL_STD is"]),
        ("detectron2://COCO-Detection/retinanet_R_50_FPN_3x/190397829/model_final_5bd44e.pkl", []),
    ],
)
def test_a_setting_that_contradicts_the_weights_warns_with_both_values(weights: str, messages: list[str]) -> None:
    cfg = settings("MODEL.WEIGHTS", weights, "MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        build_backbone(cfg)
    assert len(caught) == len(messages)
    for warning, message in zip(caught, messages, strict=True):
        with pytest.warns(UserWarning, match=message):
            warnings.warn(str(warning.message), stacklevel=1)


def test_plugin_weights_are_loaded_and_their_pixels_compared(tmp_path: Path) -> None:
    reference = build_backbone(settings()).network
    randomise_norms(reference)
    torch.save(reference.state_dict(), tmp_path / "r18.pth")
    with pytest.warns(UserWarning, match="trained with") as caught:
        ours = build_backbone(settings("MODEL.BACKBONE_PLUGIN.WEIGHTS", str(tmp_path / "r18.pth")))
    assert [str(warning.message).split()[0] for warning in caught] == [
        "INPUT.FORMAT",
        "MODEL.PIXEL_MEAN",
        "MODEL.PIXEL_STD",
    ]
    assert all(torch.equal(a, b) for a, b in zip(reference.parameters(), ours.parameters(), strict=True))


def msra_file(path: Path) -> Path:
    row = ("MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256)
    state = build_backbone(settings(*row, ours=False)).state_dict()
    path.write_bytes(pickle.dumps(caffe2_names({key: state[key] for key in state if "stem.fc" not in key})))
    return path


def test_weights_that_expect_bgr_are_at_home_in_a_lazy_config(tmp_path: Path) -> None:
    weights = str(msra_file(tmp_path / "R-50.pkl"))
    ours = instantiate(LazyCall(DetectronBackbone)(name="resnet50", stride_in_1x1=True, weights=weights))  # no warning
    assert ours.preprocessing.channel_order == "bgr"


@pytest.mark.parametrize(("pixels", "said"), [("BGR", []), ("RGB", ["INPUT.FORMAT is RGB"])])
def test_weights_that_expect_bgr_warn_where_the_model_is_fed_rgb(pixels: str, said: list[str], tmp_path: Path) -> None:
    weights = str(msra_file(tmp_path / "R-50.pkl"))
    row = ("MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        build_backbone(settings(*row, "MODEL.BACKBONE_PLUGIN.WEIGHTS", weights, "INPUT.FORMAT", pixels))
    assert [str(warning.message).split(",")[0] for warning in caught] == said


# files


def detectors(*overrides: object) -> tuple[Any, Any]:
    small = ("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64)
    recipe = read_recipe(FASTER_RCNN, *small, *overrides)
    return build_model(recipe), build_model(with_our_name(recipe))


def as_zoo_pickle(model: nn.Module, path: Path) -> None:
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    path.write_bytes(pickle.dumps({"model": state, "__author__": "Detectron2 Model Zoo"}))


def as_torch_file(model: nn.Module, path: Path) -> None:
    torch.save({"model": model.state_dict(), "iteration": 1}, path)


def tensors_differing(first: nn.Module, second: nn.Module) -> list[str]:
    other = second.state_dict()
    return [key for key, value in first.state_dict().items() if key not in other or not torch.equal(value, other[key])]


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
@pytest.mark.parametrize(("suffix", "save"), [("pkl", as_zoo_pickle), ("pth", as_torch_file)])
@pytest.mark.parametrize("trained_with_ours", [False, True])
def test_a_file_of_one_detector_loads_into_the_other(
    trained_with_ours: bool, suffix: str, save: Callable[[nn.Module, Path], None], norm: str, tmp_path: Path
) -> None:
    theirs, ours = detectors("MODEL.RESNETS.NORM", norm)
    source, target = (ours, theirs) if trained_with_ours else (theirs, ours)
    randomise_norms(source)
    save(source, tmp_path / f"model.{suffix}")
    left = DetectionCheckpointer(target)._load_model(
        DetectionCheckpointer(target)._load_file(str(tmp_path / f"model.{suffix}"))
        if suffix == "pkl"
        else torch.load(tmp_path / f"model.{suffix}")
    )
    assert (left.missing_keys, left.unexpected_keys, left.incorrect_shapes) == ([], [], [])
    assert tensors_differing(source, target) == []


CAFFE2: dict[str, str] = {
    "stem.conv1.norm.": "res_conv1_bn_",
    "stem.conv1.": "conv1_",
    **{f".conv{number}.norm.": f"_branch2{letter}_bn_" for number, letter in enumerate("abc", 1)},
    **{f".conv{number}.": f"_branch2{letter}_" for number, letter in enumerate("abc", 1)},
    ".shortcut.norm.": "_branch1_bn_",
    ".shortcut.": "_branch1_",
    "bn_weight": "bn_s",
    "weight": "w",
    "bias": "b",
    ".": "_",
}


def caffe2_names(state: dict[str, Tensor]) -> dict[str, Any]:
    """The names of MSRA's R-50.pkl, which has scale and shift only."""
    named = {}
    for key, value in state.items():
        name = functools.reduce(lambda name, part: name.replace(*part), CAFFE2.items(), key)
        named[name] = value.numpy()
    given = {name: value for name, value in named.items() if "running" not in name}
    return {**given, "fc1000_w": given["conv1_w"], "conv1_w_momentum": given["conv1_w"]}


def torchvision_converted(state: dict[str, Tensor]) -> dict[str, Any]:
    """What detectron2's tools/convert-torchvision-to-d2.py writes."""
    named = {key: value.numpy() for key, value in state.items()}
    return {
        "model": {**named, "stem.fc.bias": named["stem.conv1.norm.bias"]},
        "__author__": "torchvision",
        "matching_heuristics": True,
    }


@pytest.mark.parametrize("convert", [caffe2_names, torchvision_converted])
@pytest.mark.parametrize("name", [FASTER_RCNN, "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml"])
def test_an_imagenet_file_loads_as_into_its_own(name: str, convert: Callable[..., Any], tmp_path: Path) -> None:
    whole = their_resnet.build_resnet_backbone(
        settings("MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256), ShapeSpec(channels=3)
    )
    randomise_norms(whole)
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(convert(whole.state_dict())))
    recipe = read_recipe(name)
    theirs, ours = build_model(recipe), build_model(with_our_name(recipe))
    ours.load_state_dict(theirs.state_dict())  # the same heads
    for model in (theirs, ours):
        DetectionCheckpointer(model).load(str(tmp_path / "R-50.pkl"))
    assert tensors_differing(theirs, ours) == []
    path = "backbone.bottom_up" if "FPN" in name else "backbone"
    assert torch.equal(ours.state_dict()[f"{path}.res2.0.conv3.weight"], whole.res2[0].conv3.weight)


def test_what_a_file_lacks_is_reported_under_its_names() -> None:
    model = build_backbone(settings(builder=THEIR_FPN))
    state = model.state_dict()
    del state["bottom_up.res3.1.conv2.norm.weight"], state["fpn_output4.bias"]
    found = nn.ModuleDict({"backbone": model}).load_state_dict(
        {
            f"backbone.{key}": value
            for key, value in {**state, "bottom_up.fc.weight": state["fpn_lateral2.bias"]}.items()
        },
        strict=False,
    )
    assert sorted(found.missing_keys) == ["backbone.bottom_up.res3.1.conv2.norm.weight", "backbone.fpn_output4.bias"]
    assert found.unexpected_keys == ["backbone.bottom_up.fc.weight"]


@pytest.mark.parametrize("event", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_speaks_its_names_too(event: Callable[[nn.Module], nn.Module]) -> None:
    model = build_backbone(settings())
    other = event(model)
    assert other.state_dict().keys() == model.state_dict().keys()
    other.load_state_dict(model.state_dict())


# deformable convolutions


@pytest.fixture
def its_own_deform_conv(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """detectron2's deform_conv.py as it is where its extension is compiled; on the CPU it calls torchvision itself."""
    monkeypatch.setitem(sys.modules, "detectron2._C", types.ModuleType("detectron2._C"))
    path = Path(their_resnet.__file__).parents[2] / "layers" / "deform_conv.py"
    spec = importlib.util.spec_from_file_location("detectron2.layers.deform_conv_compiled", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(their_resnet, "DeformConv", module.DeformConv)
    monkeypatch.setattr(their_resnet, "ModulatedDeformConv", module.ModulatedDeformConv)
    return module


def deformable(modulated: bool, groups: int) -> tuple[object, ...]:
    return (
        "MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256,
        "MODEL.RESNETS.OUT_FEATURES", ["res2", "res3"],
        "MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, True, False, False], "MODEL.RESNETS.DEFORM_MODULATED", modulated,
        "MODEL.RESNETS.DEFORM_NUM_GROUPS", groups,
    )  # fmt: skip


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.usefixtures("its_own_deform_conv")
def test_deformable_weights_are_interchangeable(modulated: bool, groups: int) -> None:
    theirs, ours = pair(*deformable(modulated, groups))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert "res3.0.conv2_offset.weight" in ours.state_dict()


@pytest.mark.usefixtures("its_own_deform_conv")
def test_a_deformable_stage_equals_its_own() -> None:
    theirs, ours = pair(*deformable(modulated=False, groups=1))
    for block in theirs.res3:
        nn.init.normal_(block.conv2_offset.weight, std=0.1)
    ours.load_state_dict(theirs.state_dict())
    assert_same_features(theirs, ours)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_modulated_stage_samples_where_its_channel_order_says(groups: int) -> None:
    """The offset's channels: (y, x) of nine places for each group, then the nine weights of each group."""
    conv = DeformableConv3x3(8, 8, 2, 1, 2, modulated=True, offset_groups=groups)
    nn.init.normal_(conv.offset.weight, std=0.5)
    x = torch.randn(1, 8, 9, 11)
    first, second, mask = torch.chunk(conv.offset(x), 3, dim=1)  # as in detectron2's DeformBottleneckBlock
    expected = deform_conv2d(x, torch.cat((first, second), 1), conv.weight, None, 2, 1, 1, mask.sigmoid())
    assert torch.equal(conv(x), expected)


def test_a_fresh_deformable_convolution_is_the_plain_one() -> None:
    model = DetectronBackbone("resnet50", out_features=["res3"], deform_on_per_stage=[False, True, False, False])
    conv = model.network.get_submodule("layer2.0.conv2")
    assert isinstance(conv, DeformableConv3x3)
    x = torch.randn(1, 128, 10, 13)
    assert relative_error(conv(x), torch.nn.functional.conv2d(x, conv.weight, None, 2, 1)) <= 1e-5


# LazyConfig


def lazy_pyramid() -> Any:
    return LazyCall(DetectronPyramid)(
        bottom_up=LazyCall(DetectronBackbone)(name="resnet18", out_features=ALL_FEATURES, freeze_at=2),
        in_features="${.bottom_up.out_features}",
        out_channels=64,
        top_block=LazyCall(LastLevelP6P7)(in_channels=512, out_channels="${..out_channels}"),
    )


def test_a_lazy_config_survives_saving_and_loading(tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    config = OmegaConf.create({"model": lazy_pyramid()}, flags={"allow_objects": True})
    LazyConfig.save(config, str(tmp_path / "config.yaml"))
    model = instantiate(LazyConfig.load(str(tmp_path / "config.yaml")).model)
    assert list(model(torch.randn(1, 3, 64, 64))) == ["p2", "p3", "p4", "p5", "p6", "p7"]
    assert freeze_report(model)["c2"].frozen


def test_our_backbone_works_below_its_own_pyramid() -> None:
    fpn = FPN(DetectronBackbone("resnet18"), ALL_FEATURES, 64, top_block=LastLevelMaxPool())
    assert list(fpn(torch.randn(1, 3, 64, 64))) == ["p2", "p3", "p4", "p5", "p6"]
    assert "bottom_up.res2.0.conv1.norm.weight" in fpn.state_dict()


def test_the_convolutions_of_a_top_block_are_the_ones_that_run() -> None:
    top_block = LastLevelP6P7(512, 64)
    model = DetectronPyramid(DetectronBackbone("resnet18"), out_channels=64, top_block=top_block)
    assert model.state_dict()["top_block.p6.weight"].data_ptr() == top_block.p6.weight.data_ptr()


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"bottom_up": nn.Identity()}, "bottom_up must be a DetectronBackbone, got Identity"),
        ({"top_block": nn.Identity()}, "top_block must be None, LastLevelMaxPool or a LastLevelP6P7 on res5 or p5"),
        ({"top_block": LastLevelP6P7(256, 256, in_feature="res4")}, "res5 or p5, got a LastLevelP6P7 on res4"),
    ],
)
def test_a_pyramid_of_foreign_parts_is_refused(arguments: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        DetectronPyramid(**{"bottom_up": DetectronBackbone("resnet18"), **arguments})


def test_only_the_stages_that_are_needed_are_built() -> None:
    """As in detectron2's tests/layers/test_blocks.py."""
    assert not any(
        key.startswith(("res3", "res5")) for key in DetectronBackbone("resnet18", out_features=["res2"]).state_dict()
    )
    whole = DetectronBackbone("resnet18", out_features=["res2", "res5"])
    assert {key[:4] for key in whole.state_dict()} >= {"res2", "res3", "res4", "res5"}
    assert list(whole(torch.randn(1, 3, 64, 64))) == ["res2", "res5"]


@pytest.mark.parametrize("needs_grad", [False, True])
def test_frozen_norms_keep_the_dtype_of_autocast(needs_grad: bool) -> None:
    images = torch.randn(1, 3, 64, 64, requires_grad=needs_grad)
    with torch.autocast("cpu", torch.bfloat16):
        assert {f.dtype for f in DetectronBackbone("resnet18")(images).values()} == {torch.bfloat16}


@torch.no_grad()
def test_a_detector_optimised_for_inference_gives_the_same_features() -> None:
    _, model = detectors()
    randomise_norms(model)
    images = torch.randn(1, 3, 64, 96)
    expected = model.eval().backbone(images)
    optimised: Any = optimize_for_inference(model)
    assert max(relative_error(optimised.backbone(images)[name], expected[name]) for name in expected) <= 1e-5
    assert "backbone.bottom_up.res2.0.conv1.weight" in optimised.state_dict()


@pytest.mark.filterwarnings("ignore:8-bit convolutions do not run here:UserWarning")
@torch.no_grad()
def test_a_detector_computes_in_8_bits_with_its_pyramid() -> None:
    _, model = detectors()
    randomise_norms(model)
    batch = [{"image": torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)}]
    fast: Any = optimize_for_inference(model.eval(), dtype=torch.int8, calibration=[batch] * 2)
    assert any("fpn" in choice.name for choice in fast.optimization.int8)
    images = model.preprocess_image(batch).tensor
    actual, expected = fast.backbone(images), model.backbone(images)
    assert list(actual) == list(expected)
    assert all((actual[name] - expected[name]).norm() / expected[name].norm() < 0.1 for name in expected)
    assert "instances" in fast(batch)[0]


# freezing and memory


def test_stages_freeze_and_report_through_the_host() -> None:
    model = build_backbone(settings("MODEL.RESNETS.NORM", "BN", builder=THEIR_FPN))
    assert [stage.frozen for stage in freeze_report(model).values()] == [True, True, False, False, False]
    freeze_stages(model, 0)
    assert all(p.requires_grad for p in model.parameters())


class OneImage(SimpleTrainer):  # type: ignore[misc]
    """detectron2's loop over the same image."""

    def __init__(self, model: nn.Module) -> None:
        trainable = [p for p in model.parameters() if p.requires_grad]
        super().__init__(model, [example()] * 50, torch.optim.SGD(trainable, lr=1e-6))


@pytest.mark.parametrize("iterations_per_epoch", [1, 2])
def test_the_hook_moves_the_frozen_stages_with_the_iterations(iterations_per_epoch: int) -> None:
    _, model = detectors("MODEL.BACKBONE.FREEZE_AT", 0)
    frozen: list[int] = []
    trainer = OneImage(model)
    hook = FreezeScheduleHook(FreezeSchedule({0: 2, 1: 1, 2: 0}), iterations_per_epoch=iterations_per_epoch)
    trainer.register_hooks([hook])
    model.backbone.register_forward_hook(
        lambda module, *_: frozen.append(sum(stage.frozen for stage in freeze_report(module).values()))
    )
    trainer.train(1, 3 * iterations_per_epoch)
    assert frozen == {1: [1, 0], 2: [2, 1, 1, 0, 0]}[iterations_per_epoch]  # from iteration 1 on, as when resumed


def test_the_hook_refuses_an_optimizer_that_lacks_what_it_thaws() -> None:
    _, model = detectors("MODEL.BACKBONE.FREEZE_AT", 2)
    trainer = OneImage(model)
    trainer.register_hooks([FreezeScheduleHook(FreezeSchedule({0: 2, 1: 0}))])
    with pytest.raises(ValueError, match=r"lacks .* parameters .* set MODEL.BACKBONE.FREEZE_AT to 0"):
        trainer.train(0, 2)
    assert trainer.iter == 0  # not hours later, when it thaws


@pytest.mark.parametrize("periods", [{0: 3}, {0: 3, 2: 0}])
def test_the_hook_wraps_a_distributed_model_anew(periods: dict[int, int], tmp_path: Path) -> None:
    _, model = detectors("MODEL.BACKBONE.FREEZE_AT", 0)
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrap = nn.parallel.DistributedDataParallel
        trainer = OneImage(wrap(model))
        trainer.register_hooks([FreezeScheduleHook(FreezeSchedule(periods), wrap=wrap)])
        first = trainer.model
        trainer.train(0, 4)
    finally:
        torch.distributed.destroy_process_group()
    assert isinstance(trainer.model, wrap)
    assert trainer.model is not first
    assert trainer.model.module is model
    assert (model.backbone.network.body.conv1.weight.grad is not None) == (2 in periods)


@pytest.mark.parametrize("builder", [THEIR_PLAIN, THEIR_FPN])
def test_gradients_in_float32_are_its_own(builder: str) -> None:
    models = pair("MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256, builder=builder)
    images = torch.randn(1, 3, 64, 96)
    gradients = []
    for model in models:
        sum(feature.square().mean() for feature in model.train()(images).values()).backward()
        parameters = by_their_names(model, dict(model.named_parameters()))
        gradients.append({name: p.grad for name, p in parameters.items() if p.grad is not None})
    theirs, ours = gradients
    assert theirs.keys() == ours.keys()
    assert max(relative_error(ours[name], theirs[name]) for name in theirs) <= 1e-4


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("builder", [THEIR_PLAIN, THEIR_FPN])
def test_no_more_is_saved_for_backward_than_by_its_own(builder: str, amp: bool) -> None:
    theirs, ours = pair("MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256, builder=builder)
    images = torch.randn(1, 3, 128, 128)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        assert saved_mebibytes(ours.train(), images) <= saved_mebibytes(theirs.train(), images) * 1.001
