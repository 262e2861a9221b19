"""The average of the weights, against the one computed by hand from every step's weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import IGNORED_WARNINGS, data, recipe, train
from torch import Tensor

pytestmark = [pytest.mark.filterwarnings(each) for each in IGNORED_WARNINGS]
__all__ = ["data"]
DECAY = 0.7


@pytest.fixture
def averaged(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[dict[str, Tensor]], Any]:
    """The weights after each step, and what the run wrote."""
    steps: list[dict[str, Tensor]] = []

    def keep(_: Any, trainer: Any, module: Any, *__: Any) -> None:
        steps.append({name: value.clone() for name, value in module.detector.state_dict().items()})

    monkeypatch.setattr("backbone.training.callbacks.History.on_train_batch_end", keep)
    for name in ("save_sheet", "save_curves"):
        monkeypatch.setattr(f"backbone.training.train.{name}", lambda *_: None)
    settings = recipe("retinanet", norm="bn", train={"ema_decay": DECAY, "learning_rate": 0.01, "validate_every": 1})
    settings["train"]["freeze_schedule"] = {0: 3, 1: 2}  # C3 thaws on the way
    assert train(settings, data, tmp_path / "run").exit_code == 0
    return steps, torch.load(tmp_path / "run" / "model.pth")


def test_the_written_weights_are_the_average_of_all_steps_and_frozen_ones_keep_their_bytes(averaged: Any) -> None:
    """Validation after each epoch runs on the average, and must leave the trained weights where they were."""
    steps, written = averaged
    assert len(steps) == 8
    names = [name for name, value in steps[0].items() if value.is_floating_point()]
    for name in names:
        by_hand = steps[0][name].double()
        for step in steps[1:]:
            by_hand = DECAY * by_hand + (1 - DECAY) * step[name].double()
        torch.testing.assert_close(written[name].double(), by_hand, rtol=1e-5, atol=1e-6)
    frozen = [name for name in names if ".layer1." in name]
    assert all(torch.equal(written[name], steps[0][name]) for name in frozen)
    assert any(not torch.equal(written[name], steps[-1][name]) for name in names)
