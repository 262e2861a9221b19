"""``backbone compare``: its numbers against those of describe, the allocator and the benchmark tool."""

import importlib
import json
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from backbone import BackboneConfig
from backbone.command.app import app
from backbone.command.comparison import Candidate, Question, compare
from backbone.command.live_memory import peak_memory
from backbone.command.timing import quartiles, time_rounds
from backbone.hosts.torchvision import build_detector
from backbone.recipe import DetectorConfig

TOOLS = Path(__file__).parents[2] / "tools"
SMALL = ("--image-size", "64", "64", "--rounds", "2", "--device", "cpu")


def compared(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backbone.command.timing.TIMED_SECONDS", 1e-3)


def test_a_row_for_each_network_with_the_quickest_first(tmp_path: Path) -> None:
    result = compared(
        "resnet34", "resnet18", *SMALL, "--json", tmp_path / "j" / "c.json", "--picture", tmp_path / "c.png"
    )
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "j" / "c.json").read_text())["rows"]
    assert {row["name"]: row["parameters"] for row in rows} == {"resnet18": 11_176_512, "resnet34": 21_284_672}
    medians = [row["optimized"]["median"] for row in rows]
    assert medians == sorted(medians)
    assert all(row["plain"]["low"] <= row["plain"]["median"] <= row["plain"]["high"] for row in rows)
    assert {row["name"]: (row["weights"], row["accuracy"]) for row in rows} == {
        "resnet18": ("IMAGENET1K_V1", 69.758),
        "resnet34": ("IMAGENET1K_V1", 73.314),
    }
    printed = [line.split()[0] for line in result.stdout.splitlines() if re.match(r" +resnet", line)]
    assert printed == [row["name"] for row in rows]
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_a_detector_is_measured_as_a_whole() -> None:
    warnings.filterwarnings("ignore", message=".*frozen at random weights")
    question = Question((64, 64), rounds=1, detector="retinanet")
    (row,) = compare([Candidate("r", BackboneConfig(name="resnet18", freeze_at=2), question)], question)
    detector = build_detector(
        DetectorConfig.model_validate({"detector": "retinanet", "backbone": {"name": "resnet18"}})
    )
    assert row.parameters == sum(parameter.numel() for parameter in detector.parameters())
    assert row.memory > 4 * row.parameters


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("resnet19",), "unknown backbone 'resnet19'"), (("nowhere.yaml",), "must be an existing YAML file")],
)
def test_a_wrong_name_is_told_before_anything_is_measured(arguments: tuple[str, ...], message: str) -> None:
    result = compared("resnet18", *arguments, *SMALL)
    assert (result.exit_code, message in result.stderr) == (2, True)


def test_memory_is_the_most_that_lives_at_one_time() -> None:
    def run() -> None:
        first = torch.ones(1000)  # 4000 bytes
        second = first + 1  # 8000
        del first
        (second * 2).add_(1)  # 8000 again

    assert peak_memory(torch.device("cpu"), run) == 8000


def test_rounds_time_every_candidate_once() -> None:
    calls: list[str] = []
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}
    rounds = list(time_rounds("cpu", runs, 3))
    assert [set(each) for each in rounds] == [{"a", "b"}] * 3
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)


def test_the_benchmark_measures_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same network and image by the tool's and by this command's way, in the same rounds: within 30 %."""
    monkeypatch.syspath_prepend(str(TOOLS))
    tool: Any = importlib.import_module("benchmark.command")
    case = tool.Case(tool.Workload.INFER, "resnet18", 1, 96, 96, tool.DtypeName.FLOAT32, tool.DeviceName.CPU)
    theirs = tool.builders_of(case, [], [])
    mine = Candidate("resnet18", BackboneConfig(name="resnet18"), Question((96, 96)))
    runs = {"tool": theirs["ours"](case).step, "command": mine.optimized}
    monkeypatch.setattr("backbone.command.timing.TIMED_SECONDS", 0.02)
    rounds = list(time_rounds("cpu", runs, 9))
    ratios = [each["tool"] / each["command"] for each in rounds]
    assert quartiles(ratios)[1] == pytest.approx(1, abs=0.3)
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmark"]:
        sys.modules.pop(name)
