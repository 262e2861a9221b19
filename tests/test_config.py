"""What a user may write in YAML, and what he reads when it is wrong."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from backbone import Backbone, BackboneConfig, build_backbone, load_config
from backbone.config import json_schema

CONFIGS = Path(__file__).parent.parent / "configs"
RECIPES = sorted(CONFIGS.glob("*.yaml"))

VALID: list[tuple[str, dict[str, Any]]] = [
    ("name: resnet50", {}),
    ("name: resnet50\nweights: null", {"weights": None}),
    ("name: resnet50\nweights: IMAGENET1K_V2", {"weights": "IMAGENET1K_V2"}),
    ("name: resnet50\nnorm: sync_bn", {"norm": "sync_bn"}),
    ("name: resnet50\nnorm: gn", {"norm": "gn"}),
    ("name: resnet50\nfreeze_at: 0", {"freeze_at": 0}),
    ("name: resnet50\nfreeze_at: 5", {"freeze_at": 5}),
    ("name: resnet50\noutput_stride: 8", {"output_stride": 8}),
    ("name: resnet50\ndilate_first_block: true", {"dilate_first_block": True}),
    ("name: resnet50\nin_channels: 1", {"in_channels": 1}),
    ("name: resnet50\nout_features: [c5]", {"out_features": ("c5",)}),
    ("name: resnet50\nnum_classes: 1", {"num_classes": 1}),
    ("name: resnet50\nout_features: [c2, c3]\ncheckpoint_stages: [c2]", {"checkpoint_stages": ("c2",)}),
    ("name: resnet50\nout_features: [c2]\nnum_classes: 9\ncheckpoint_stages: [c5]", {"checkpoint_stages": ("c5",)}),
]

# (YAML, every piece that the message must hold)
INVALID: list[tuple[str, list[str]]] = [
    ("freeze_at: 1", ["name is required"]),
    ("name: 50", ["name must be a backbone's name", "got 50"]),
    ("name: ''", ["name must be a backbone's name", "got ''"]),
    ("name: resnet50\nfreez_at: 2", ["unknown key 'freez_at'; did you mean 'freeze_at'?", "known keys: name, weights"]),
    ("name: resnet50\nnrom: bn", ["unknown key 'nrom'; did you mean 'norm'?"]),
    ("name: resnet50\nfreeze_at: 6", ["freeze_at must be 0 to 5 (stages counted from the stem", "got 6"]),
    ("name: resnet50\nfreeze_at: -1", ["freeze_at must be 0 to 5", "got -1"]),
    ("name: resnet50\nfreeze_at: '2'", ["freeze_at must be 0 to 5", "got '2'"]),
    ("name: resnet50\nfreeze_at: true", ["freeze_at must be 0 to 5", "got True"]),
    ("name: resnet50\nfreeze_at: 2.0", ["freeze_at must be 0 to 5", "got 2.0"]),
    ("name: resnet50\noutput_stride: 12", ["output_stride must be 32, 16 or 8 (image pixels)", "got 12"]),
    ("name: resnet50\noutput_stride: 16.0", ["output_stride must be 32, 16 or 8 (image pixels)", "got 16.0"]),
    ("name: resnet50\nnorm: batch", ["norm must be frozen_bn, bn_eval, bn, sync_bn or gn", "got 'batch'"]),
    ("name: resnet50\nweights: 3", ["weights must be null, a torchvision weights name", "got 3"]),
    ("name: resnet50\nstride_in_1x1: 1", ["stride_in_1x1 must be true or false", "got 1"]),
    ("name: resnet50\ndilate_first_block: 'no'", ["dilate_first_block must be true or false", "got 'no'"]),
    ("name: resnet50\nin_channels: 0", ["in_channels must be an integer of at least 1", "got 0"]),
    ("name: resnet50\nnum_classes: 0", ["num_classes must be null or an integer of at least 1", "got 0"]),
    (
        "name: resnet50\nout_features: c5",
        ["out_features must be a list of one or more of c1, c2, c3, c4, c5", "got 'c5'"],
    ),
    ("name: resnet50\nout_features: []", ["out_features must be a list of one or more", "got []"]),
    ("name: resnet50\nout_features: [c6]", ["out_features must be a list of one or more", "got ['c6']"]),
    ("name: resnet50\nout_features: [stem]", ["out_features must be a list of one or more", "got ['stem']"]),
    ("name: resnet50\nout_features: [c5, c5]", ["out_features must not repeat a stage", "['c5', 'c5']"]),
    ("name: resnet50\ncheckpoint_stages: [c3, c3]", ["checkpoint_stages must not repeat a stage"]),
    (
        "name: resnet50\nout_features: [c3]\ncheckpoint_stages: [c5]",
        ["checkpoint_stages must be among the stages that are built, c2, c3; got c5"],
    ),
    ("", ["must be a mapping of keys such as `name: resnet50`", "got NoneType"]),
    ("- resnet50", ["must be a mapping", "got list"]),
    ("name: [", ["not valid YAML"]),
    ("name: resnet50\nname: resnet18", ["key 'name' is given twice"]),
    ("name: !!python/object/apply:os.getcwd []", ["not valid YAML", "os.getcwd"]),
    # Not YAMLErrors in PyYAML, so that each needs its own care.
    ("? [a, b]\n: 1", ["not valid YAML", "a key must be a word, got a sequence"]),
    ("name: 2024-99-99", ["not valid YAML"]),
]

# recipe -> strides of its feature maps, number of frozen stages
RECIPE_TABLE: dict[str, tuple[dict[str, int], int]] = {
    "demo": ({"c2": 4, "c3": 8, "c4": 16, "c5": 32}, 0),
    "resnet18": ({"c2": 4, "c3": 8, "c4": 16, "c5": 32}, 2),
    "resnet50": ({"c2": 4, "c3": 8, "c4": 16, "c5": 32}, 2),
    "resnet50_dc5": ({"c5": 16}, 2),
    "resnet50_deeplab": ({"c4": 8, "c5": 8}, 0),
    "resnext50": ({"c2": 4, "c3": 8, "c4": 16, "c5": 32}, 2),
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return tmp_path / "recipe.yaml"


@pytest.mark.parametrize(("text", "expected"), VALID, ids=[text for text, _ in VALID])
def test_yaml_becomes_the_config_it_says(recipe: Path, text: str, expected: dict[str, Any]) -> None:
    recipe.write_text(text)
    config = load_config(recipe)
    assert {key: getattr(config, key) for key in expected} == expected


@pytest.mark.parametrize(("text", "pieces"), INVALID, ids=[text for text, _ in INVALID])
def test_bad_yaml_is_an_error_that_names_file_key_rule_and_value(recipe: Path, text: str, pieces: list[str]) -> None:
    recipe.write_text(text)
    with pytest.raises(ValueError, match=r"recipe\.yaml") as caught:
        load_config(recipe)
    absent = [piece for piece in pieces if piece not in str(caught.value)]
    assert not absent, str(caught.value)


def test_two_broken_rules_are_two_lines(recipe: Path) -> None:
    recipe.write_text("name: resnet50\nfreeze_at: 6\noutput_stride: 12")
    with pytest.raises(ValueError, match=r"recipe\.yaml") as caught:
        load_config(recipe)
    first, second = str(caught.value).splitlines()
    assert "freeze_at" in first
    assert "output_stride" in second


def test_unknown_key_far_from_all_reads_as_a_sentence(recipe: Path) -> None:
    recipe.write_text("name: resnet50\nzzzz: 1")
    with pytest.raises(ValueError, match=r"unknown key 'zzzz'[;.:,] known keys: "):
        load_config(recipe)


def test_two_unknown_keys_read_as_a_sentence(recipe: Path) -> None:
    recipe.write_text("name: resnet50\nzzzz: 1\nfreez_at: 2")
    rule = r"unknown key 'zzzz'; unknown key 'freez_at'; did you mean 'freeze_at'\? known keys: name, "
    with pytest.raises(ValueError, match=rule):
        load_config(recipe)


def test_message_speaks_of_no_pydantic(recipe: Path) -> None:
    recipe.write_text("name: resnet50\nfreeze_at: 6")
    with pytest.raises(ValueError, match="freeze_at") as caught:
        load_config(recipe)
    assert not any(word in str(caught.value) for word in ("pydantic", "Value error", "input_value", "validation"))


def test_error_carries_no_chain_of_causes(recipe: Path) -> None:
    recipe.write_text("name: resnet50\nfreeze_at: 6")
    with pytest.raises(ValueError, match="freeze_at") as caught:
        load_config(recipe)
    assert caught.value.__suppress_context__


def test_missing_config_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml")


def test_folder_in_place_of_a_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="must be an existing YAML file"):
        load_config(tmp_path)


def test_binary_file_in_place_of_a_config_is_named(recipe: Path) -> None:
    recipe.write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"recipe\.yaml: not valid YAML"):
        load_config(recipe)


def test_misspelt_key_is_refused_in_python_too() -> None:
    with pytest.raises(ValidationError, match="did you mean 'freeze_at'"):
        BackboneConfig(name="resnet50", freez_at=2)  # type: ignore[call-arg]


def test_config_cannot_be_changed_after_its_checks() -> None:
    config = BackboneConfig(name="resnet50")
    with pytest.raises(ValidationError, match="frozen"):
        config.freeze_at = 6


def test_weights_may_be_a_path_object() -> None:
    path = Path("some") / "resnet50.pth"
    assert BackboneConfig(name="resnet50", weights=path).weights == str(path)


@pytest.mark.parametrize(
    ("out_features", "num_classes", "stages"),
    [
        (("c2",), None, ("stem", "c2")),
        (("c4", "c3"), None, ("stem", "c2", "c3", "c4")),
        (("c5",), None, ("stem", "c2", "c3", "c4", "c5")),
        (("c2",), 10, ("stem", "c2", "c3", "c4", "c5")),
    ],
)
def test_stages_are_built_as_far_as_needed(
    out_features: tuple[Any, ...], num_classes: int | None, stages: tuple[str, ...]
) -> None:
    config = BackboneConfig(name="resnet50", out_features=out_features, num_classes=num_classes)
    assert config.built_stages == stages


def test_checked_in_schema_is_the_generated_one() -> None:
    drift = "configs/schema.json is out of date; run `make schema`"
    assert (CONFIGS / "schema.json").read_text(encoding="utf-8") == json_schema(), drift


def test_recipe_table_covers_every_recipe() -> None:
    assert set(RECIPE_TABLE) == {path.stem for path in RECIPES}


def on_meta(path: Path) -> Backbone:
    """Build a recipe without memory and without its weights."""
    with torch.device("meta"):
        return build_backbone(load_config(path), weights=None)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_builds_with_the_strides_it_promises(path: Path) -> None:
    strides = {name: spec.stride for name, spec in on_meta(path).feature_specs.items()}
    assert strides == RECIPE_TABLE[path.stem][0]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_freezes_the_stages_it_promises(path: Path) -> None:
    stages = on_meta(path).stages.values()
    still = [not any(parameter.requires_grad for parameter in modules.parameters()) for modules in stages]
    frozen = RECIPE_TABLE[path.stem][1]
    assert still == [number < frozen for number in range(5)]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_points_editors_to_the_schema(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=schema.json\n")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_says_what_it_reproduces(path: Path) -> None:
    assert "eproduces" in path.read_text(encoding="utf-8")
