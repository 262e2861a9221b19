"""A detector that starts from another one's weights: which rows of its heads are kept."""

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import IGNORED_WARNINGS, data, recipe, train
from torch import Tensor, nn

from backbone.hosts.torchvision import build_detector
from backbone.recipe import DetectorConfig
from backbone.training.facts import facts_of, metadata_of, with_facts
from backbone.training.fine_tuning import start_from
from backbone.training.module import portable_state
from backbone.training.parameter_groups import backbone_of

pytestmark = [pytest.mark.filterwarnings(each) for each in IGNORED_WARNINGS]
__all__ = ["data"]

OLD = {1: "circle", 2: "square", 3: "triangle", 4: "star"}
NEW = {1: "star", 2: "heart", 3: "circle"}
"""The old label of each new one: star 4, heart none, circle 1."""
SAME = {0: 0, 1: 4, 3: 1}
HEADS = {
    "mask_rcnn": {
        "roi_heads.box_predictor.cls_score.weight": (1, 1),
        "roi_heads.box_predictor.bbox_pred.bias": (1, 4),
        "roi_heads.mask_predictor.mask_fcn_logits.weight": (1, 1),
    },
    "retinanet": {"head.classification_head.cls_logits.weight": (9, 1)},
    "fcos": {"head.classification_head.cls_logits.bias": (1, 1)},
    "deeplabv3": {"classifier.4.weight": (1, 1)},
}
"""Detector -> parameters whose rows are classes -> groups of classes, and rows of each class."""


def config_of(detector: str, names: dict[int, str], **settings: Any) -> DetectorConfig:
    made = {**recipe(detector, norm="bn"), "num_classes": len(names) + 1, **settings}
    if detector == "fcos":  # its head has groups of 32 channels
        made["pyramid"] = {"out_channels": 32}
    return DetectorConfig.model_validate(made)


def saved(config: DetectorConfig, names: dict[int, str] | None, path: Path) -> nn.Module:
    """Write a random detector as a run does, without facts where ``names`` is None; return it."""
    torch.manual_seed(1)
    detector = build_detector(config)
    for parameter in detector.parameters():  # biases of 0 would hide which row they come from
        nn.init.normal_(parameter)
    state: Any = portable_state(detector)
    if names is not None:
        facts = facts_of(detector, config, names, {label: label for label in names}, {})
        state = with_facts(state, facts, metadata_of(backbone_of(detector).body, config))
    torch.save(state, path)
    return detector


def rows_of(tensor: Tensor, groups: int, rows: int) -> Tensor:
    """The parameter as (groups, classes, rows, ...)."""
    return tensor.reshape(groups, -1, rows, *tensor.shape[1:])


@pytest.mark.parametrize("detector", HEADS)
def test_classes_of_the_same_name_keep_their_rows_and_the_others_are_fresh(detector: str, tmp_path: Path) -> None:
    old = saved(config_of(detector, OLD), OLD, tmp_path / "model.pth").state_dict()
    config = config_of(detector, NEW)
    new = build_detector(config)
    fresh = {name: value.clone() for name, value in new.state_dict().items()}
    report = start_from(new, tmp_path / "model.pth", config, NEW)
    for name, (groups, rows) in HEADS[detector].items():
        before, after = rows_of(old[name], groups, rows), rows_of(new.state_dict()[name], groups, rows)
        assert all(torch.equal(after[:, label], before[:, source]) for label, source in SAME.items())
        assert torch.equal(after[:, 2], rows_of(fresh[name], groups, rows)[:, 2])
        assert report.classes[name] == "3 of 4 classes taken over, the others fresh"
    others = [name for name in old if name not in report.classes]
    assert len(others) == report.whole
    assert all(torch.equal(new.state_dict()[name], old[name]) for name in others)


def test_without_names_classes_of_the_same_number_keep_their_rows(tmp_path: Path) -> None:
    name = "roi_heads.box_predictor.cls_score.weight"
    old = saved(config_of("faster_rcnn", OLD), None, tmp_path / "model.pth").state_dict()
    config = config_of("faster_rcnn", NEW)
    new = build_detector(config)
    start_from(new, tmp_path / "model.pth", config, NEW)
    assert torch.equal(new.state_dict()[name], old[name][:4])


def test_other_classes_in_another_order_are_not_taken_for_the_same(tmp_path: Path) -> None:
    names = {1: "star", 2: "triangle", 3: "square", 4: "circle"}
    old = saved(config_of("fcos", OLD), OLD, tmp_path / "model.pth").state_dict()
    config = config_of("fcos", names)
    new = build_detector(config)
    assert not start_from(new, tmp_path / "model.pth", config, names).classes
    bias = "head.classification_head.cls_logits.bias"
    assert torch.equal(new.state_dict()[bias], old[bias][[0, 4, 3, 2, 1]])


def test_what_does_not_fit_is_named_with_both_shapes(tmp_path: Path) -> None:
    saved(config_of("retinanet", OLD), OLD, tmp_path / "model.pth")
    config = config_of("retinanet", OLD, pyramid={"out_channels": 16})
    said = start_from(build_detector(config), tmp_path / "model.pth", config, OLD)
    assert "backbone.fpn.inner_blocks.0.0.bias (8 there, 16 here)" in said.fresh
    assert "in all)" in str(said)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "start_from must be an existing file"),
        ({"weight": torch.ones(1)}, "nothing of .* fits this detector; give model.pth"),
    ],
)
def test_a_file_that_gives_nothing_is_refused(content: object, message: str, tmp_path: Path) -> None:
    if content is not None:
        torch.save(content, tmp_path / "model.pth")
    config = config_of("fcos", NEW)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        start_from(build_detector(config), tmp_path / "model.pth", config, NEW)


def test_a_run_starts_from_the_last_one(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("save_sheet", "save_curves"):
        monkeypatch.setattr(f"backbone.training.train.{name}", lambda *_: None)
    assert train(recipe("retinanet", train={"epochs": 1}), data, tmp_path / "first").exit_code == 0
    start = str(tmp_path / "first" / "model.pth")
    still = {"epochs": 1, "start_from": start, "learning_rate": 0.0}  # so that what it ends with is what it began with
    result = train(recipe("retinanet", train=still), data, tmp_path / "second")
    assert f"started from {start}" in result.output, result.output
    first, second = (torch.load(tmp_path / run / "model.pth") for run in ("first", "second"))
    assert all(torch.equal(first[name], value) for name, value in second.items())
