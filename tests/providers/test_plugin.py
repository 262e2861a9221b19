"""The example plugin, installed by pip as a third party's package would be, and a broken one beside it."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build
from typer.testing import CliRunner

from backbone import freeze_report, list_backbones
from backbone.command import app as cli
from backbone.command.catalogue import Entry, find_backbones, parse_count, parse_strides
from backbone.command.list import print_entries
from backbone.console import console
from backbone.hosts.torchvision import build_detector
from backbone.recipe import DetectorConfig
from backbone.registry import find_constructor, origin

os.environ.setdefault("BACKBONE_CACHE", tempfile.mkdtemp())  # what is measured of timm's models is no user's
EXAMPLE = Path(__file__).parent / "example_plugin"
NAME = "tiny_pyramid_net"
ORIGIN = "example-plugin (example_plugin:build)"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that pip has installed the example into."""
    folder = tmp_path_factory.mktemp("plugin")
    source = shutil.copytree(EXAMPLE, folder / "source")  # a build leaves files behind
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(folder / "site"), str(source)]
    subprocess.run(command, check=True)
    return folder / "site"


@pytest.fixture(autouse=True)
def _installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(site))


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plugin whose module fails."""
    info = tmp_path / "shaky-1.0.dist-info"
    info.mkdir()
    (tmp_path / "shaky_module.py").write_text("raise RuntimeError('no licence')")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shaky\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[backbone.backbones]\ntiny_shaky = shaky_module:build\n")
    monkeypatch.syspath_prepend(str(tmp_path))


def found(*arguments: Any, **filters: Any) -> list[Entry]:
    return list(find_backbones(*arguments, **filters, on_error=lambda name, error: None))


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.app, arguments)
    return result.exit_code, result.stdout, result.stderr


def test_installed_plugin_is_listed_with_its_origin() -> None:
    assert NAME in list_backbones()
    assert origin(NAME) == ORIGIN


def test_table_for_a_terminal_shows_the_origin(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "_width", 100)
    print_entries(found("tiny*"))
    assert ORIGIN in capsys.readouterr().out


def test_pipe_gets_names_only() -> None:
    assert run("list", "tiny*") == (0, f"{NAME}\n", "")


@pytest.mark.parametrize(("name", "expected"), [("resnet18", "built in"), ("timm/resnet18", "timm")])
def test_origin_of_what_is_no_plugin(name: str, expected: str) -> None:
    assert origin(name) == expected


@pytest.mark.parametrize("detector", ["faster_rcnn", "retinanet", "deeplabv3"])
def test_plugin_trains_in_a_torchvision_detector(detector: str) -> None:
    config = {"detector": detector, "backbone": {"name": NAME, "norm": "bn"}, "num_classes": 3, "min_size": 64}
    model = build_detector(DetectorConfig.model_validate(config)).train()
    if detector == "deeplabv3":
        loss = model(torch.randn(2, 3, 64, 64))["out"].square().mean()
    else:
        targets = [{"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1])}] * 2
        loss = torch.stack(list(model(list(torch.rand(2, 3, 64, 64)), targets).values())).sum()
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_plugin_freezes_as_ours_do() -> None:
    report = freeze_report(build(NAME, freeze_at=2))
    assert [stage.frozen for stage in report.values()] == [True, True, False, False, False]


def test_broken_plugin_is_named_with_its_error(broken: None) -> None:
    code, _, shown = run("describe", "tiny_shaky")
    assert code == 2
    assert "'tiny_shaky' comes from shaky (shaky_module:build)" in shown
    assert "no licence" in shown


def test_broken_plugin_disturbs_no_other(broken: None) -> None:
    code, names, shown = run("list", "*tiny*", "--max-parameters", "1M")
    assert (code, names) == (0, f"{NAME}\n")
    assert "tiny_shaky left out" in shown
    assert "no licence" in shown
    assert callable(find_constructor("resnet18"))


FILTERS: list[tuple[dict[str, object], list[str]]] = [
    ({"pattern": "*", "provider": "example-plugin"}, [NAME]),
    ({"pattern": "resnet1?", "provider": "built in"}, ["resnet18"]),
    ({"pattern": "resnet??", "max_parameters": 12_000_000}, ["resnet18"]),
    ({"pattern": "resnet18", "max_parameters": 11_000_000}, []),
    ({"pattern": "tiny*", "strides": (4, 32)}, [NAME]),
    ({"pattern": "tiny*", "strides": (64,)}, []),
    ({"pattern": "timm/levit_384*", "strides": (8,)}, ["timm/levit_384_s8"]),
    ({"pattern": "test_conv*", "provider": "timm", "max_parameters": 260_000}, ["timm/test_convnext"]),
]


@pytest.mark.parametrize(("filters", "names"), FILTERS)
def test_filters_leave(filters: dict[str, object], names: list[str]) -> None:
    assert [entry.name for entry in found(**filters)] == names


def test_measured_entry_tells_parameters_and_strides() -> None:
    (entry,) = found("resnet18", max_parameters=10**9)
    assert entry == Entry("resnet18", "built in", 11_176_512, (4, 8, 16, 32))


@pytest.mark.parametrize(("text", "number"), [("30M", 30_000_000), ("2.5m", 2_500_000), ("500k", 500_000), ("7", 7)])
def test_count_is_read(text: str, number: int) -> None:
    assert parse_count(text) == number


@pytest.mark.parametrize("arguments", [("--max-parameters", "many"), ("--strides", "4;8"), ("--provider", "nobody")])
def test_filter_that_says_nothing_is_refused(arguments: tuple[str, ...]) -> None:
    assert run("list", *arguments)[0] == 2


def test_unknown_provider_is_told_the_known_ones() -> None:
    code, _, shown = run("list", "--provider", "tim")
    assert code == 2
    assert "unknown provider 'tim'; did you mean 'timm'? known: built in, " in " ".join(shown.split())


def test_strides_are_read() -> None:
    assert parse_strides("4,8,16,32") == (4, 8, 16, 32)
