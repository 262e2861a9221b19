"""Names and constructors: ours, the caller's, and those of plugins in fake distributions."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor, nn

from backbone import (
    Backbone,
    BackboneConfig,
    Features,
    FeatureSpec,
    UnknownBackboneError,
    build_backbone,
    list_backbones,
    register_backbone,
)
from backbone import registry as registry_module
from backbone.registry import find_constructor

OURS = [
    "resnet101",
    "resnet101d",
    "resnet152",
    "resnet152d",
    "resnet18",
    "resnet18d",
    "resnet18vd",
    "resnet34",
    "resnet34d",
    "resnet34vd",
    "resnet50",
    "resnet50d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "resnext50_32x4d",
    "wide_resnet101_2",
    "wide_resnet50_2",
]
PATTERNS = [
    ("resnet1*", ["resnet101", "resnet101d", "resnet152", "resnet152d", "resnet18", "resnet18d", "resnet18vd"]),
    ("resnet?0", ["resnet50"]),
    ("*50*", ["resnet50", "resnet50d", "resnext50_32x4d", "wide_resnet50_2"]),
    ("RESNET*", []),
    ("nothing", []),
]
MISSES = [
    ("resnet52", "resnet50"),
    ("resnext50", "resnext50_32x4d"),
    ("ResNet50", "resnet50"),
    ("wide_resnet50", "wide_resnet50_2"),
]

# A plugin's source -> what the error must say of it.
BROKEN_PLUGINS = {
    "raises": ("raise RuntimeError('no licence')", "no licence"),
    "lacks a dependency": ("import a_library_that_is_not_there", "a_library_that_is_not_there"),
    "lacks the constructor": ("", "build"),
    "is not Python": ("def", "SyntaxError"),
}

GOOD_PLUGIN = "def build(config): ...\n"

PluginMaker = Callable[..., str]


class Tiny(Backbone):
    """A backbone of another making: one map at stride 4."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, stride=4)
        self.stage_modules = {"stem": ("conv",)}
        self.feature_specs = {"c2": FeatureSpec(8, 4)}

    def forward(self, images: Tensor) -> Features:
        return {"c2": self.conv(images)}


def tiny(config: BackboneConfig) -> Tiny:
    return Tiny()


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test a registry that it may fill."""
    monkeypatch.setattr(registry_module, "_constructors", dict(registry_module._constructors))


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PluginMaker:
    """Install a fake distribution that declares a backbone; return its module's name."""

    def install(name: str, source: str, *, package: str = "plugin", target: str = "build") -> str:
        site = tmp_path / package
        module = f"{package}_module"
        info = site / f"{package}-1.0.dist-info"
        info.mkdir(parents=True)
        (site / f"{module}.py").write_text(source)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[backbone.backbones]\n{name} = {module}:{target}\n")
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.setitem(sys.modules, module, sys)  # so that the undo removes what the test imports
        monkeypatch.delitem(sys.modules, module)
        return module

    return install


def test_whole_family_is_listed_sorted() -> None:
    assert [name for name in list_backbones() if name in OURS] == OURS


@pytest.mark.parametrize(("pattern", "expected"), PATTERNS)
def test_pattern_selects_names(pattern: str, expected: list[str]) -> None:
    assert list_backbones(pattern) == expected


def test_registered_constructor_is_built_by_name() -> None:
    register_backbone("tiny")(tiny)
    assert isinstance(build_backbone(BackboneConfig(name="tiny", norm="bn", out_features=("c2",))), Tiny)


def test_decorator_gives_the_constructor_back() -> None:
    assert register_backbone("tiny")(tiny) is tiny


def test_registered_name_is_listed() -> None:
    register_backbone("tiny")(tiny)
    assert "tiny" in list_backbones()


@pytest.mark.parametrize("name", ["resnet50", "tiny"])
def test_taken_name_is_refused(name: str) -> None:
    if name == "tiny":
        register_backbone(name)(tiny)
    with pytest.raises(ValueError, match=f"backbone '{name}' is already registered by .*; choose another name"):
        register_backbone(name)(tiny)


def test_refused_registration_changes_nothing() -> None:
    before = find_constructor("resnet50")
    with pytest.raises(ValueError, match="already registered"):
        register_backbone("resnet50")(tiny)
    assert find_constructor("resnet50") is before


@pytest.mark.parametrize(("wrong", "right"), MISSES)
def test_near_miss_is_told_the_nearest_name(wrong: str, right: str) -> None:
    with pytest.raises(UnknownBackboneError, match=f"^unknown backbone '{wrong}'; did you mean '{right}'\\? known: "):
        find_constructor(wrong)


def test_far_miss_is_told_every_name() -> None:
    with pytest.raises(UnknownBackboneError) as caught:
        find_constructor("zzz")
    assert str(caught.value) == f"unknown backbone 'zzz'; known: {', '.join(list_backbones())}"


@pytest.mark.parametrize("error", [KeyError, ValueError])
def test_unknown_name_is_a_key_error_and_a_value_error(error: type[Exception]) -> None:
    with pytest.raises(error, match="unknown backbone 'zzz'"):
        build_backbone(BackboneConfig(name="zzz", norm="bn"))


def test_constructor_of_something_else_is_refused_by_name() -> None:
    register_backbone("linear")(lambda config: nn.Linear(1, 1))  # type: ignore[type-var]
    with pytest.raises(ValueError, match=r"'linear' must return a backbone\.Backbone, got Linear"):
        build_backbone(BackboneConfig(name="linear", norm="bn"))


def test_feature_that_a_backbone_lacks_is_refused_by_name() -> None:
    register_backbone("tiny")(tiny)
    with pytest.raises(ValueError, match="out_features must be among those of 'tiny', c2; got c3, c4, c5"):
        build_backbone(BackboneConfig(name="tiny", norm="bn"))


def test_plugin_is_listed(install: PluginMaker) -> None:
    install("plugged", GOOD_PLUGIN)
    assert "plugged" in list_backbones("plug*")


def test_listing_does_not_import_a_plugin(install: PluginMaker) -> None:
    module = install("plugged", GOOD_PLUGIN)
    list_backbones()
    assert module not in sys.modules


def test_building_ours_does_not_import_a_plugin(install: PluginMaker) -> None:
    module = install("plugged", GOOD_PLUGIN)
    find_constructor("resnet18")
    assert module not in sys.modules


def test_lookup_imports_the_plugin(install: PluginMaker) -> None:
    module = install("plugged", GOOD_PLUGIN)
    constructor = find_constructor("plugged")
    assert constructor is sys.modules[module].build


def test_lookup_of_one_plugin_does_not_import_another(install: PluginMaker) -> None:
    install("plugged", GOOD_PLUGIN)
    other = install("other", GOOD_PLUGIN, package="other_plugin")
    find_constructor("plugged")
    assert other not in sys.modules


def test_plugin_is_built_by_name(install: PluginMaker) -> None:
    source = "\n".join(
        [
            "from torch import nn",
            "from backbone import Backbone, FeatureSpec",
            "class Plugged(Backbone):",
            "    def __init__(self):",
            "        super().__init__()",
            "        self.conv = nn.Conv2d(3, 8, 4, stride=4)",
            "        self.stage_modules = {'stem': ('conv',)}",
            "        self.feature_specs = {'c2': FeatureSpec(8, 4)}",
            "def build(config): return Plugged()",
        ]
    )
    install("plugged", source)
    model = build_backbone(BackboneConfig(name="plugged", norm="bn", out_features=("c2",)))
    assert type(model).__name__ == "Plugged"


def test_plugin_may_register_itself_with_the_decorator(install: PluginMaker) -> None:
    source = (
        "from backbone import register_backbone\n@register_backbone('plugged')\ndef made(config): ...\nbuild = None\n"
    )
    install("plugged", source)
    assert find_constructor("plugged").__name__ == "made"


@pytest.mark.parametrize(("source", "reason"), BROKEN_PLUGINS.values(), ids=list(BROKEN_PLUGINS))
def test_broken_plugin_is_named_with_the_reason(install: PluginMaker, source: str, reason: str) -> None:
    install("plugged", source, package="shaky")
    with pytest.raises(ImportError, match=rf"backbone 'plugged' comes from shaky \(shaky_module:build\).*{reason}"):
        find_constructor("plugged")


def test_broken_plugin_does_not_break_listing(install: PluginMaker) -> None:
    install("plugged", "raise RuntimeError")
    assert {"plugged", "resnet50"} <= set(list_backbones())


def test_broken_plugin_does_not_break_ours(install: PluginMaker) -> None:
    install("plugged", "raise RuntimeError")
    assert callable(find_constructor("resnet50"))


def test_plugin_that_names_no_constructor_is_refused(install: PluginMaker) -> None:
    install("plugged", "build = 3\n", package="shaky")
    with pytest.raises(ValueError, match=r"'plugged': shaky \(shaky_module:build\) must name a constructor, got 3"):
        find_constructor("plugged")


def test_name_declared_by_two_plugins_is_refused_with_both(install: PluginMaker) -> None:
    install("plugged", GOOD_PLUGIN, package="first")
    install("plugged", GOOD_PLUGIN, package="second")
    with pytest.raises(ValueError, match=r"(?=.*first)(?=.*second).*uninstall one of them"):
        find_constructor("plugged")


def test_plugin_cannot_take_over_a_name_of_ours(install: PluginMaker) -> None:
    before = find_constructor("resnet50")
    install("resnet50", GOOD_PLUGIN)
    assert find_constructor("resnet50") is before


def test_plugin_joins_the_suggestions(install: PluginMaker) -> None:
    install("convnext_plugged", GOOD_PLUGIN)
    with pytest.raises(UnknownBackboneError, match="did you mean 'convnext_plugged'"):
        find_constructor("convnext_pluged")
