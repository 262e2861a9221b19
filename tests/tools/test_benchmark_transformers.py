"""tools/benchmark_transformers.py: a small run, and who computes something else is not timed."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5")
TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def tool() -> Iterator[Any]:
    sys.path.insert(0, str(TOOLS))
    yield importlib.import_module("benchmark_transformers")
    sys.path.remove(str(TOOLS))


def test_a_small_run_times_all_that_agree(tool: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("backbone.command.timing.TIMED_SECONDS", 1e-4)
    tool.main([tool.Model.DETR], (128, 128), 1, 1, tmp_path / "results.json")
    backbone, detector = json.loads((tmp_path / "results.json").read_text())
    assert (backbone["title"], detector["title"]) == ("DETR-R50, backbone", "DETR-R50, detector")
    for record in (backbone, detector):
        first, *others = record["rows"]
        assert first["name"] == "transformers"
        assert first["error"] == 0
        assert [row["name"] for row in others if "bfloat16" not in row["name"]] == ["ours", "ours, optimised"]
        assert all(row["error"] <= (5e-2 if "bfloat16" in row["name"] else 1e-4) for row in others)
        assert all(row["median"] > 0 for row in others)


def test_who_computes_something_else_is_not_timed(tool: Any) -> None:
    calls = {"transformers": lambda: [torch.ones(2)], "ours": lambda: [torch.ones(2) * 1.001]}
    with pytest.raises(RuntimeError, match=r"ours must agree to 1e-04 before it is timed, got 1\.0e-03"):
        tool.errors(calls)
