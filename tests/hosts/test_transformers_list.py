"""The page's list of transformers' classes is the library's own, and what it says of them is what the tests show."""

import ast
import re
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers", minversion="5")

from transformers_detectors import DETECTORS  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs" / "transformers.md"
ROWS = re.findall(r"^\| `(\w+)` \| ([✓✗]) \| (.+) \|$", PAGE.read_text(), re.MULTILINE)


def classes_that_take_a_backbone() -> set[str]:
    """Return them by the library's sources: importing all its models takes half a minute."""
    found = set()
    for file in Path(transformers.__file__).parent.glob("models/*/configuration_*.py"):
        text = file.read_text()
        for cls in (
            node for node in ast.parse(text if "backbone_config" in text else "").body if isinstance(node, ast.ClassDef)
        ):
            fields = {
                node.target.id
                for node in cls.body
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
            }
            found |= {cls.name} if "backbone_config" in fields else set()
    return found


@pytest.mark.skipif(not transformers.__version__.startswith("5.23."), reason="the page lists transformers 5.23")
def test_the_list_is_the_librarys() -> None:
    assert {name for name, _, _ in ROWS} ^ classes_that_take_a_backbone() == set()


def test_what_is_said_to_be_equal_is_what_is_compared() -> None:
    assert {name for name, _, word in ROWS if word == "equal"} == {each.config for each in DETECTORS.values()}


def test_every_class_has_a_tick_or_a_reason() -> None:
    assert all(word in ("equal", "runs", "builds") if tick == "✓" else len(word) > 10 for _, tick, word in ROWS)
