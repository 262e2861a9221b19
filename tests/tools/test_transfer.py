"""The tools that tell what pre-trained weights are worth: which runs there are, and what is measured on what."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import transfer_probe as probe  # noqa: E402
import transfer_study as study  # noqa: E402
from shapes.make_shapes_dataset import make_shapes_dataset  # noqa: E402


def test_every_weight_runs_with_every_freeze_and_once_from_scratch() -> None:
    runs = study.plan_runs(["shapes=a.pth", "ImageNet=package://p/b.pth"], [0, 4])
    assert [(run.name, run.weights, run.freeze_at) for run in runs] == [
        ("from scratch", "", None),
        ("shapes, freeze_at 0", "a.pth", 0),
        ("shapes, freeze_at 4", "a.pth", 4),
        ("ImageNet, freeze_at 0", "package://p/b.pth", 0),
        ("ImageNet, freeze_at 4", "package://p/b.pth", 4),
    ]


@pytest.mark.parametrize("source", ["out/x=1/backbone.pth", "backbone.pth", "https://host/f.pth#sha256=00"])
def test_source_without_a_name_is_kept_whole(source: str) -> None:
    assert {run.weights for run in study.plan_runs([source], [2])} == {"", source}


def test_shapes_are_cut_out_whole_with_their_classes(tmp_path: Path) -> None:
    make_shapes_dataset(tmp_path / "data", shapes=probe.SHAPES, num_train=4, num_val=2, seed=0)
    cuts, classes = probe.cut_out(tmp_path / "data", "train")
    assert cuts.shape == (len(classes), 3, probe.CUT, probe.CUT)
    assert 0 <= cuts.min() < cuts.max() <= 1
    assert classes.max() < len(probe.SHAPES)


def test_examples_are_as_many_of_each_class_and_differ_by_seed() -> None:
    classes = torch.arange(len(probe.SHAPES)).repeat(30)
    chosen = probe.examples(classes, 5, seed=0)
    assert torch.bincount(classes[chosen]).tolist() == [5] * len(probe.SHAPES)
    assert not torch.equal(chosen, probe.examples(classes, 5, seed=1))


def test_accuracy_tells_features_that_know_from_those_that_do_not() -> None:
    classes = torch.arange(len(probe.SHAPES)).repeat(50)
    telling = torch.eye(len(probe.SHAPES))[classes] + 0.01 * torch.randn(len(classes), len(probe.SHAPES))
    assert probe.frozen_accuracy((telling, telling), (classes, classes), 5, seed=0) == 1.0
    noise = torch.randn(len(classes), 8), torch.randn(len(classes), 8)
    assert probe.frozen_accuracy(noise, (classes, classes), 5, seed=0) < 0.5
