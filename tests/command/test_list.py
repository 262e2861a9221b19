"""``backbone list``: filters that measure, and what is kept of a library's models."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from backbone.command.app import app
from backbone.command.catalogue import find_backbones
from backbone.command.measurements import MeasurementCache, cache_folder

timm = pytest.importorskip("timm", reason="timm's models are listed here")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what is measured away from the user's own cache."""
    monkeypatch.setenv("BACKBONE_CACHE", str(tmp_path / "cache"))


def listed(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["list", *arguments])


def test_long_shows_parameters_and_strides() -> None:
    result = listed("resnet18", "--long")
    assert ["resnet18", "built", "in", "11,176,512", "4,", "8,", "16,", "32"] in [
        line.split() for line in result.stdout.splitlines()
    ]


def test_models_without_maps_are_one_note_and_no_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    from backbone.providers.timm import provider

    def measure(name: str) -> tuple[int, tuple[int, ...]]:
        if name == "timm/resnet18":
            return 11_176_512, (4, 8, 16, 32)
        raise ValueError(f"{name} has maps at strides 7")

    monkeypatch.setattr(provider, "measure", measure)
    result = listed("timm/resnet1*", "--strides", "4")
    assert result.stdout == "timm/resnet18\n"
    assert re.fullmatch(
        "note: [0-9]+ models left out, which have no maps at strides 4 to 32, such as timm/resnet[0-9a-z]+\n",
        result.stderr,
    )


def test_what_was_measured_of_a_library_is_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from backbone.providers.timm import provider

    first = listed("timm/resnet1?", "--max-parameters", "12M").stdout
    assert first == "timm/resnet18\n"

    def fail(name: str) -> Any:
        raise AssertionError(f"{name} was measured again")

    monkeypatch.setattr(provider, "measure", fail)
    assert listed("timm/resnet1?", "--max-parameters", "12M").stdout == first


def test_what_was_measured_before_an_interruption_is_kept() -> None:
    def interrupted(names: list[str]) -> Any:
        yield names[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(find_backbones("timm/resnet1?", measured=True, on_error=lambda *_: None, track=interrupted))
    (file,) = cache_folder().glob("timm-*.json")
    assert timm.__version__ in file.name
    assert list(json.loads(file.read_text())) == ["timm/resnet18"]


@pytest.mark.parametrize("content", ["", "[]", '{"timm/resnet18": {"parameters": "many"}}'])
def test_a_cache_that_makes_no_sense_is_measured_anew(content: str) -> None:
    listed("timm/resnet18", "--long")
    (file,) = cache_folder().glob("timm-*.json")
    file.write_text(content)
    assert "11,176,512" in listed("timm/resnet18", "--long").stdout


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("BACKBONE_CACHE", str(tmp_path / "file" / "cache"))
    assert "11,176,512" in listed("timm/resnet18", "--long").stdout


def test_built_in_networks_are_not_kept() -> None:
    with MeasurementCache() as cache:
        assert cache.measure("resnet18").parameters == 11_176_512
    assert not cache_folder().exists()
