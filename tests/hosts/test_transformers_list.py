"""The page's list of transformers' classes is the library's own, and what it says of them is what the tests show."""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers", minversion="5")

from transformers_detectors import DETECTORS  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs" / "transformers.md"
ROWS = re.findall(r"^\| `(\w+)` \| ([✓✗]) \| (.+) \|$", PAGE.read_text(), re.MULTILINE)


def classes_that_take_a_backbone() -> set[str]:
    found = set()
    for package in pkgutil.iter_modules(transformers.models.__path__):
        try:
            module = importlib.import_module(f"transformers.models.{package.name}.configuration_{package.name}")
        except ModuleNotFoundError:
            continue
        for name, cls in vars(module).items():
            if inspect.isclass(cls) and cls.__module__ == module.__name__:
                found |= {name} if "backbone_config" in inspect.signature(cls.__init__).parameters else set()
    return found


@pytest.mark.skipif(not transformers.__version__.startswith("5.23."), reason="the page lists transformers 5.23")
def test_the_list_is_the_librarys() -> None:
    assert {name for name, _, _ in ROWS} ^ classes_that_take_a_backbone() == set()


def test_what_is_said_to_be_equal_is_what_is_compared() -> None:
    assert {name for name, _, word in ROWS if word == "equal"} == {each.config for each in DETECTORS.values()}


def test_every_class_has_a_tick_or_a_reason() -> None:
    assert all(word in ("equal", "runs", "builds") if tick == "✓" else len(word) > 10 for _, tick, word in ROWS)
