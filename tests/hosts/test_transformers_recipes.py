"""The recipes for transformers' Trainer: they build, learn from drawn shapes, and measure what they find."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5")
pytest.importorskip("pycocotools", reason="pycocotools is an extra: train")
pytest.importorskip("scipy", reason="transformers' losses match by scipy")

from backbone import freeze_report, freeze_stages
from backbone.hosts.transformers import find_backbone

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword"),  # pycocotools' masks
]


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / "transformers" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        from shapes.make_shapes_dataset import make_shapes_dataset
    finally:
        sys.path.remove(str(ROOT / "tools"))
    folder = tmp_path_factory.mktemp("data") / "shapes"
    make_shapes_dataset(folder, num_train=4, num_val=2, image_size=(64, 96), min_scale=0.3)
    return folder


def data_of(recipe: Any, shapes: Path, split: str) -> Any:
    has_statistics = recipe.__name__ == "mask2former"
    return recipe.Shapes(shapes, split, *([(0.5,) * 3, (0.25,) * 3] if has_statistics else []))


@pytest.mark.parametrize("name", ["mask2former", "rt_detr"])
def test_a_step_lowers_the_loss_of_its_own_batch(name: str, shapes: Path) -> None:
    recipe = load(name)
    data = data_of(recipe, shapes, "train")
    torch.manual_seed(0)
    model = recipe.build(len(data.names)).train()
    batch = recipe.collate([data[index] for index in range(2)])
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    losses = []
    for _ in range(3):
        torch.manual_seed(0)  # of the points and the noise that the losses draw
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    network = find_backbone(model).network
    assert network.get_parameter("conv1.weight").grad is not None


def test_masks_are_those_of_the_annotations(shapes: Path) -> None:
    recipe = load("mask2former")
    data = data_of(recipe, shapes, "val")
    for index, image_id in enumerate(data.ids):
        found = data.coco.imgToAnns[image_id]
        assert data[index]["mask_labels"].sum((1, 2)).tolist() == [each["area"] for each in found]
        assert data[index]["class_labels"].tolist() == [each["category_id"] - 1 for each in found]


def test_perfect_masks_are_measured_as_perfect(shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load("mask2former")
    data = data_of(recipe, shapes, "val")
    model = recipe.build(len(data.names))

    def answer(pixels: torch.Tensor) -> Any:
        index = next(i for i in range(len(data)) if torch.equal(data[i]["pixel_values"], pixels[0]))
        masks, labels = data[index]["mask_labels"], data[index]["class_labels"]
        classes = torch.full((len(labels), len(data.names) + 1), -9.0)
        classes[range(len(labels)), labels] = 9.0
        logits = {"class_queries_logits": classes[None], "masks_queries_logits": 40 * masks[None] - 20}
        return type("Answer", (), logits)

    monkeypatch.setattr(model, "forward", answer)
    found = recipe.evaluate(model, data)
    assert found["segm/AP50"] == found["segm/AP"] == found["AP50"] == 1.0


def test_weights_bring_the_papers_freezing(tmp_path: Path) -> None:
    recipe = load("mask2former")
    scratch = find_backbone(recipe.build(3)).network
    torch.save(scratch.state_dict(), tmp_path / "weights.pth")
    freeze_stages(scratch, 0)
    model = recipe.build(3, str(tmp_path / "weights.pth"))
    report = freeze_report(find_backbone(model).network)
    assert [stage.frozen for stage in report.values()] == [True, True, False, False, False]
    assert {stage.norm for stage in report.values()} == {"frozen_bn"}


@pytest.mark.parametrize("name", ["mask2former", "rt_detr"])
def test_the_trainer_trains_measures_and_saves(name: str, shapes: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs it")
    recipe = load(name)
    recipe.main(shapes, tmp_path, steps=1, batch_size=2)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["steps"] == 1
    assert 0 <= result["AP50"] <= 1
    again = type(recipe.build(4)).from_pretrained(tmp_path)
    assert find_backbone(again).config.backbone == recipe.BACKBONE
