"""One call builds a backbone, from a name, keys or a config, and holds a plugin to what was asked for."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights

from backbone import (
    Backbone,
    BackboneConfig,
    DetectorConfig,
    FeaturePyramid,
    Features,
    FeatureSpec,
    FreezeSchedule,
    Preprocessing,
    build_backbone,
    freeze_report,
    freeze_stages,
    list_backbones,
    load_weights,
    register_backbone,
)
from backbone import registry as registry_module
from backbone.config import BackboneKeys
from backbone.hosts.torchvision import as_torchvision, build_detector
from backbone.recipe import DetectorKeys

if TYPE_CHECKING:  # mypy, which warns of ignores that nothing needs, is the test
    build_backbone("resnet50", norm="bn", weights=Path("x.pth"), freeze_at=2, out_features=["c5"])
    build_backbone("resnet50", freez_at=2)  # type: ignore[call-arg]
    build_backbone("resnet50", norm="batch")  # type: ignore[arg-type]
    BackboneConfig("resnet50", freeze_at="2")  # type: ignore[arg-type]
    BackboneConfig(freeze_at=2)  # type: ignore[call-arg]
    build_detector("fcos", "resnet50", num_classes=3, min_size=[600, 800])
    build_detector("fcoss", "resnet50")  # type: ignore[arg-type]
    build_detector("fcos", num_clases=3)  # type: ignore[call-arg]


def test_keys_of_the_call_are_those_of_the_config() -> None:
    assert ["name", *BackboneKeys.__annotations__] == list(BackboneConfig.model_fields)
    assert ["detector", "backbone", *DetectorKeys.__annotations__] == list(DetectorConfig.model_fields)


@pytest.mark.parametrize(
    ("call", "leading", "keys"),
    [
        (build_backbone, ["config"], BackboneKeys),
        (BackboneConfig, ["name"], BackboneKeys),
        (build_detector, ["config", "backbone"], DetectorKeys),
    ],
)
def test_help_shows_every_key_by_name(call: Callable[..., Any], leading: list[str], keys: type) -> None:
    parameters = inspect.signature(call).parameters
    assert list(parameters) == [*leading, *keys.__annotations__]
    assert not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())


def test_every_way_to_ask_asks_for_the_same() -> None:
    expected = BackboneConfig(name="resnet18", norm="bn", freeze_at=2)
    config = BackboneConfig("resnet18", norm="bn")
    ways = [
        build_backbone("resnet18", norm="bn", freeze_at=2),
        build_backbone(expected),
        build_backbone(config, freeze_at=2),
    ]
    assert [model.config for model in ways] == [expected] * 3
    assert config.freeze_at == 0


def test_wrappers_tell_config_stages_and_preprocessing_of_what_is_inside_now() -> None:
    body = build_backbone("resnet18", norm="bn")
    wrapper = as_torchvision(FeaturePyramid(body, out_channels=8))
    body.preprocessing = Preprocessing((1.0,) * 3)
    assert wrapper.config is body.config
    assert wrapper.preprocessing.mean == (1.0,) * 3
    assert list(wrapper.stages) == list(body.stages)
    body.stage_modules = {"stem": ("conv1",)}
    body.unbuilt_prefixes = ("layer9.",)
    assert (dict(wrapper.stage_modules), wrapper.unbuilt_prefixes) == ({"stem": ("body.conv1",)}, ("body.layer9.",))
    wrapper.preprocessing = Preprocessing((2.0,) * 3)
    assert body.preprocessing.mean == (2.0,) * 3


WAYS_TO_GIVE: dict[str, Callable[[Path], Any]] = {
    "a path": lambda path: path,
    "a string": str,
    "a state dict": torch.load,
    "a checkpoint": lambda path: {"state_dict": torch.load(path), "epoch": 3},
}


@pytest.mark.parametrize("way", WAYS_TO_GIVE)
def test_weights_may_be(way: str, tmp_path: Path) -> None:
    state = build_backbone("resnet18", norm="bn").state_dict()
    torch.save(state, tmp_path / "w.pth")
    model = build_backbone("resnet18", weights=WAYS_TO_GIVE[way](tmp_path / "w.pth"), freeze_at=2)
    assert torch.equal(model.state_dict()["layer4.1.conv2.weight"], state["layer4.1.conv2.weight"])


def test_state_dict_given_as_weights_is_not_changed() -> None:
    state = build_backbone("resnet18", norm="bn").state_dict()
    before = {key: value.clone() for key, value in state.items()}
    build_backbone("resnet18", weights=state, in_channels=4, stem_channels_from=[0, 1, 2, None], norm="bn")
    assert state.keys() == before.keys()
    assert all(torch.equal(state[key], before[key]) for key in before)


@pytest.mark.parametrize("weights", [ResNet18_Weights.DEFAULT, "ResNet18_Weights.DEFAULT", "DEFAULT", "IMAGENET1K_V1"])
def test_torchvisions_names_and_members_mean_the_same(weights: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    state = build_backbone("resnet18", norm="bn").state_dict()
    monkeypatch.setattr(type(ResNet18_Weights.DEFAULT), "get_state_dict", lambda *_, **__: state)
    model = build_backbone("resnet18", weights=weights)
    assert torch.equal(model.state_dict()["conv1.weight"], state["conv1.weight"])


STATE = build_backbone("resnet18", norm="bn").state_dict()


def test_load_weights_finds_the_backbone_and_its_name() -> None:
    for model in (
        build_backbone("resnet18", norm="bn"),
        FeaturePyramid(build_backbone("resnet18", norm="bn"), out_channels=8),
        build_detector("fcos", "resnet18", num_classes=2),
        nn.ModuleDict({"model": build_backbone("resnet18", norm="bn"), "head": nn.Linear(1, 1)}),
    ):
        report = load_weights(model, STATE)
        assert (len(report.loaded), report.missing) == (120, [])
        loaded = {
            key.rpartition("layer1.0.conv1.")[2]: v for key, v in model.state_dict().items() if "layer1.0.conv1." in key
        }
        assert torch.equal(loaded["weight"], STATE["layer1.0.conv1.weight"])


def test_load_weights_finds_our_modules_in_torchvisions_own_pyramid() -> None:
    from torchvision.models.detection.backbone_utils import BackboneWithFPN

    layers = {"layer1": "0", "layer2": "1"}
    theirs = BackboneWithFPN(build_backbone("resnet18", norm="bn"), layers, [64, 128], 8)
    report = load_weights(theirs, STATE)
    assert torch.equal(theirs.state_dict()["body.layer2.0.conv1.weight"], STATE["layer2.0.conv1.weight"])
    assert len(report.dropped["stages that are not built"]) == 60


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(1, 1), "Linear must be a backbone of this package or hold one, got none in it"),
        (nn.Sequential(build_backbone("resnet18"), build_backbone("resnet18")), "must hold one backbone, got 0, 1"),
    ],
)
def test_model_without_one_backbone_is_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_weights(model, STATE)


def test_bands_chosen_from_a_file_of_13_get_preprocessing_that_fits() -> None:
    state = {**STATE, "conv1.weight": torch.rand(64, 13, 7, 7)}
    model = build_backbone("resnet18", norm="bn", weights=state, stem_channels_from=[3, 2, 1])
    assert torch.equal(model.state_dict()["conv1.weight"], state["conv1.weight"][:, [3, 2, 1]])
    assert model.preprocessing == Preprocessing((0.485, 0.406, 0.456), (0.229, 0.225, 0.224))
    every = build_backbone("resnet18", norm="bn", weights=state, in_channels=13)
    assert len(every.preprocessing.mean) == len(every.preprocessing.std) == 13


def test_random_pyramid_of_a_plain_vit_is_told() -> None:
    timm = pytest.importorskip("timm")
    state = timm.create_model("vit_tiny_patch16_224").state_dict()
    model = build_backbone("timm/vit_tiny_patch16_224", norm="bn", out_features=["c2", "c5"])
    report = load_weights(model, state)
    own = sum(value.numel() for key, value in model.state_dict().items() if key.startswith("pyramid."))
    assert own > 0
    assert sum(model.state_dict()[key].numel() for key in report.initial) == own
    assert not any(key.startswith("pyramid.") for key in report.loaded)
    assert "not in the weights, left as it was (random when fresh): pyramid" in str(report)
    assert not load_weights(model, model.state_dict()).initial


def test_level_of_pooling_alone_has_a_stage() -> None:
    pytest.importorskip("timm")
    model = build_backbone("timm/vgg11_bn", norm="bn")
    assert set(model.feature_specs) <= set(model.stages)
    assert isinstance(model.stages["c5"][0], nn.MaxPool2d)


class Plugin(Backbone):
    """A backbone of a plugin that honours what it is told, but for what a test tells it to ignore."""

    def __init__(self, config: BackboneConfig, ignored: str) -> None:
        super().__init__()
        self.ignored = ignored
        features = ("c4", "c5") if ignored == "out_features" else config.out_features
        stride = 32 if ignored == "output_stride" else config.output_stride
        in_channels = 3 if ignored == "in_channels" else config.in_channels
        self.stem = nn.Conv2d(in_channels, 4, 16, stride=16)
        self.last = nn.Conv2d(4, 8, 1, stride=stride // 16 or 1)
        self.stage_modules = {"stem": ("stem",), "c5": ("last" if ignored != "stage_modules" else "lost",)}
        channels = 9 if ignored == "channels" else 8
        specs = {"c4": FeatureSpec(4, 16), "c5": FeatureSpec(channels, 16 if ignored == "stride" else stride)}
        self.feature_specs = {name: specs[name] for name in features}

    def forward(self, images: Tensor) -> Features:
        if self.ignored == "meta" and images.mean() > 9:  # a question that only real images answer
            raise AssertionError
        c4 = self.stem(images)
        features = {"c4": c4, "c5": self.last(c4)}
        if self.ignored == "dict":
            return list(features.values())  # type: ignore[return-value]
        return features if self.ignored == "maps" else {name: features[name] for name in self.feature_specs}


# what the plugin ignores -> the keys it was asked for, what the error says
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "out_features": ({}, "must state the out_features it was asked for, c5, got c4, c5"),
    "output_stride": ({"output_stride": 16}, "must keep to output_stride 16, got c5 at stride 32"),
    "in_channels": ({"in_channels": 4}, "must take images of in_channels 4, got a network that takes 3"),
    "channels": ({}, r"c5 as FeatureSpec\(channels=9, stride=32\), which is \(2, 9, 2, 3\) .*got \(2, 8, 2, 3\)"),
    "stride": ({}, r"c5 as FeatureSpec\(channels=8, stride=16\), which is \(2, 8, 4, 6\) .*got \(2, 8, 2, 3\)"),
    "maps": ({}, "must return c5, got c4, c5"),
    "dict": ({}, "must return a dict of feature maps by name, got list"),
    "stage_modules": ({}, "must name modules it has, got lost"),
}


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    monkeypatch.setattr(registry_module, "_constructors", dict(registry_module._constructors))

    def plugin(ignored: str) -> None:
        register_backbone("plugin")(lambda config: Plugin(config, ignored))

    return plugin


@pytest.mark.parametrize("ignored", BROKEN)
def test_plugin_that_does_not_keep_to_its_request_is_refused_with_both_values(
    ignored: str, plugin: Callable[[str], None]
) -> None:
    keys, message = BROKEN[ignored]
    plugin(ignored)
    with pytest.raises(ValueError, match=f"'?plugin'?.*{message}|the forward of Plugin {message}"):
        build_backbone("plugin", out_features=["c5"], norm="bn", **keys)


@pytest.mark.parametrize("ignored", ["nothing", "meta"])
@pytest.mark.parametrize("keys", [{}, {"in_channels": 4}, {"output_stride": 16}])
def test_plugin_that_keeps_to_it_is_built_once_and_not_moved(
    ignored: str, keys: dict[str, Any], plugin: Callable[[str], None]
) -> None:
    plugin(ignored)
    model = build_backbone("plugin", out_features=["c5"], norm="bn", **keys)
    assert model.training
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert model(torch.rand(1, keys.get("in_channels", 3), 64, 64))["c5"].shape[1] == 8


def test_trial_run_moves_no_statistics(plugin: Callable[[str], None]) -> None:
    class WithNorm(Plugin):
        def __init__(self, config: BackboneConfig) -> None:
            super().__init__(config, "")
            self.stem = nn.Sequential(self.stem, nn.BatchNorm2d(4))  # type: ignore[assignment]

    register_backbone("with_norm")(WithNorm)
    state = build_backbone("with_norm", out_features=["c5"], norm="bn").state_dict()
    assert state["stem.1.num_batches_tracked"] == 0
    assert torch.equal(state["stem.1.running_var"], torch.ones(4))


@pytest.mark.parametrize("name", get_args(DetectorConfig.model_fields["detector"].annotation))
def test_detector_takes_its_name_and_a_ready_backbone(name: str) -> None:
    segments = name in ("deeplabv3", "fcn")
    ready = build_backbone("resnet18", norm="bn", freeze_at=2, out_features=["c5"] if segments else ["c3", "c4", "c5"])
    model: Any = build_detector(name, ready, num_classes=3)  # type: ignore[arg-type]
    assert model.backbone.body is ready
    assert model.config.num_classes == 3
    assert not ready.get_parameter("conv1.weight").requires_grad


def test_detector_takes_a_ready_pyramid_and_a_backbone_made_by_hand() -> None:
    pyramid = FeaturePyramid(build_backbone("resnet18", norm="bn"), out_channels=8, extra_levels="maxpool")
    model: Any = build_detector("faster_rcnn", pyramid, num_classes=3)
    assert model.backbone.fpn is pyramid.fpn
    with pytest.raises(ValueError, match="pyramid must not be given beside a ready FeaturePyramid"):
        build_detector("faster_rcnn", pyramid, pyramid={"out_channels": 8})
    by_hand = Plugin(BackboneConfig("plugin", out_features=["c4", "c5"]), "")
    built: Any = build_detector("fcos", by_hand, num_classes=3, min_size=64, max_size=64, pyramid={"out_channels": 32})
    targets = [{"boxes": torch.tensor([[1.0, 1, 9, 9]]), "labels": torch.tensor([1])}] * 2
    assert set(built([torch.rand(3, 64, 64)] * 2, targets)) == {"classification", "bbox_regression", "bbox_ctrness"}


def test_detector_config_takes_keys_over_it_and_a_name_as_backbone() -> None:
    config = DetectorConfig(detector="fcos", backbone="resnet18", num_classes=5)  # type: ignore[arg-type]
    model: Any = build_detector(config, num_classes=3)
    assert (model.config.num_classes, config.num_classes) == (3, 5)
    assert model.config.backbone.out_features == ("c3", "c4", "c5")


def test_freezing_reaches_the_backbone_of_a_detector_and_nothing_else() -> None:
    detector = build_detector("fcos", "resnet18", num_classes=2, pyramid={"out_channels": 32})
    freeze_stages(detector, 2)
    frozen = {
        name.split(".")[2] for name, p in detector.named_parameters() if not p.requires_grad and ".bn" not in name
    }
    assert frozen - {"layer2", "layer3", "layer4"} == {"conv1", "layer1"}
    assert [stage.frozen for stage in freeze_report(detector).values()] == [True, True, False, False, False]
    assert FreezeSchedule({0: 0}).apply(detector, 0)
    assert all(p.requires_grad for name, p in detector.named_parameters() if "layer1.0.conv" in name)


def test_version_is_the_projects() -> None:
    import tomllib

    import backbone

    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert backbone.__version__ == project["version"]


def test_public_names_are_all_there() -> None:
    import backbone

    assert all(hasattr(backbone, name) for name in backbone.__all__)
    assert set(backbone.__all__) <= set(dir(backbone))
    assert "resnet18" in list_backbones()
