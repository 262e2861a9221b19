"""What ``backbone.training`` offers, and what it says where a library is absent."""

import importlib
import sys

import pytest

from backbone import training


def test_every_public_name_is_there() -> None:
    assert sorted(training._HOMES) == sorted(training.__all__)
    assert all(getattr(training, name).__name__ == name for name in training.__all__)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Trainer'"):
        _ = training.Trainer


def test_without_lightning_one_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("lightning", "backbone.training."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lightning", None)
    with pytest.raises(ModuleNotFoundError, match=r"training needs lightning.*: pip install 'backbone\[train\]'"):
        _ = training.DetectionModule
    monkeypatch.undo()
    importlib.invalidate_caches()
