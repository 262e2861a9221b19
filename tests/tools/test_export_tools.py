"""tools/check_exports.py and tools/export_latency.py: what is run again, and the tables they write."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def check_exports(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(TOOLS))
    tool = importlib.import_module("check_exports")
    monkeypatch.setattr(tool, "models", lambda: iter([("small", None), ("large", None)]))
    return tool


def run(tool: Any, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["tool", *map(str, arguments)])
    tool.main()


def test_what_this_revision_has_measured_is_not_measured_again(
    check_exports: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[list[str]] = []

    def measure(make: object, targets: list[str]) -> dict[str, dict[str, Any]]:
        done.append(targets)
        return {target: {"features": 2e-6, "num_detections": 0} for target in targets}

    monkeypatch.setattr(check_exports, "run_row", measure)
    out = tmp_path / "exports.json"
    run(check_exports, monkeypatch, "--out", out, "--only", "small", "--to", "onnx")
    run(check_exports, monkeypatch, "--out", out, "--only", "small")
    run(check_exports, monkeypatch, "--out", out, "--only", "small")
    assert done == [["onnx"], ["openvino"]]
    monkeypatch.setattr(check_exports, "revision", lambda: "another")
    run(check_exports, monkeypatch, "--out", out, "--only", "small")
    assert done[2:] == [["onnx", "openvino"]]
    assert list(json.loads(out.read_text())) == ["small"]


def test_the_table_has_a_row_for_every_model_and_says_what_was_not_run(check_exports: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n" + "\n".join(check_exports.MARKS) + "\nafter\n")
    cells = {"onnx": {"features": 2e-6, "num_detections": 0}, "openvino": {"reason": "a | b"}}
    check_exports.write_table(page, {"small": cells, "large": {}})
    lines = page.read_text().splitlines()
    assert "| small | ✓ 2e-06 | a / b |" in lines
    assert "| large | not run | not run |" in lines
    assert (lines[0], lines[-1]) == ("before", "after")


def test_ratios_are_to_our_optimised_copy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    tool = importlib.import_module("export_latency")
    ours = "ours, optimised, in PyTorch"
    result = tool.summary([{"x": 0.02, ours: 0.01}, {"x": 0.03, ours: 0.01}, {"x": 0.09, ours: 0.03}])
    assert list(result) == [ours, "x"]
    assert result["x"] == pytest.approx((30, 3))
    page = tmp_path / "page.md"
    page.write_text("\n".join(tool.MARKS))
    tool.write_table(page, {"resnet18": {"times": result}, "resnet50": {"times": {ours: (5.0, 1.0)}}})
    assert "| x | 3.00 (30 ms) | not run |" in page.read_text()


def test_torchvisions_network_takes_our_weights_and_gives_our_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from backbone import build_backbone

    monkeypatch.syspath_prepend(str(TOOLS))
    tool = importlib.import_module("export_latency")
    ours, images = build_backbone("resnet18", norm="bn").eval(), torch.rand(1, 3, 64, 64)
    theirs = tool.Levels("resnet18", ours.state_dict()).eval()
    with torch.no_grad():
        found, expected = theirs(images), ours(images)
    assert list(found) == list(expected)
    assert all(torch.allclose(found[name], expected[name], atol=1e-4) for name in expected)
