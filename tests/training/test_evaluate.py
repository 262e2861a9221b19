"""``backbone evaluate`` and the metrics: against torchmetrics, and from saved weights as after training."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import IGNORED_WARNINGS, TOOLS, copy_of, data, invoke, recipe, train
from torchmetrics.detection import MeanAveragePrecision

sys.path.append(str(TOOLS))
from backbone.recipe import DetectorConfig
from backbone.training.coco.annotations import Annotations, read_annotations
from backbone.training.coco.data import CocoImages
from backbone.training.coco.metrics import CocoMetrics
from backbone.training.module import DetectionModule
from backbone.training.reports import save_metrics

pytestmark = [pytest.mark.filterwarnings(each) for each in IGNORED_WARNINGS]
__all__ = ["data"]


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    assert train(recipe("mask_rcnn", train={"epochs": 1}), data, out).exit_code == 0
    return out


def test_saved_weights_measure_what_training_ended_with(run: Path, data: Path, tmp_path: Path) -> None:
    arguments = ["--weights", str(run / "model.pth"), "--json", f"{tmp_path}/m.json", "--sheet", f"{tmp_path}/s.png"]
    result = invoke("evaluate", recipe("mask_rcnn"), data, tmp_path / "evaluation", *arguments)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "m.json").read_text()) == json.loads((run / "metrics.json").read_text())["metrics"]
    assert (tmp_path / "s.png").stat().st_size > 10_000


def test_an_inference_copy_is_measured_in_its_dtype(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    autocast, step = [], DetectionModule.validation_step

    def seen_step(module: DetectionModule, *batch: Any) -> None:
        autocast.append(torch.is_autocast_enabled("cpu"))
        step(module, *batch)

    monkeypatch.setattr(DetectionModule, "validation_step", seen_step)
    settings = recipe("retinanet", norm="bn", train={"epochs": 1})
    assert train(settings, data, tmp_path / "run").exit_code == 0
    settings["train"]["precision"] = "bf16-mixed"
    options = ["--weights", f"{tmp_path}/run/model.pth"]
    assert invoke("evaluate", settings, data, tmp_path / "plain", *options).exit_code == 0
    assert autocast[-1]
    autocast.clear()
    options = ["--weights", f"{tmp_path}/run/model.pth", "--json", f"{tmp_path}/m.json"]
    for given, told in {
        ("--dtype", "float32"): "folded 20 norms",
        ("--dtype", "int8", "--calibration", "2"): "computes in int8 in 28 of 28 layers",
    }.items():
        result = invoke("evaluate", settings, data, tmp_path / "evaluation", *options, *given)
        assert result.exit_code == 0, result.output
        assert told in result.output
        measured = json.loads((tmp_path / "m.json").read_text())
        assert measured.keys() == json.loads((tmp_path / "run" / "metrics.json").read_text())["metrics"].keys()
    assert autocast
    assert not any(autocast)
    refused = invoke(
        "evaluate", settings, data, tmp_path / "other", *options, "--dtype", "int8", "--calibration", "100"
    )
    assert refused.exit_code == 2
    assert "calibration must be 1 to the 8 images of the split train, got 100" in refused.stderr


BAD_WEIGHTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "absent": (lambda file: None, "must be an existing file"),
    "damaged": (lambda file: file.write_bytes(b"PK no checkpoint"), "cannot be read as a checkpoint"),
    "other": (lambda file: torch.save({"weight": torch.ones(1)}, file), "does not fit the recipe's detector"),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_weights_that_cannot_be_loaded_are_named(case: str, data: Path, tmp_path: Path) -> None:
    prepare, message = BAD_WEIGHTS[case]
    file = tmp_path / "model.pth"
    prepare(file)
    result = invoke("evaluate", recipe(), data, tmp_path / "evaluation", "--weights", str(file))
    assert result.exit_code == 2
    assert str(file) in result.stderr
    assert message in result.stderr


# torchvision's data set leaves the file of a picture that it cannot decode to the garbage collector
@pytest.mark.filterwarnings("ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_cut_short_ends_in_one_line(num_workers: int, data: Path, run: Path, tmp_path: Path) -> None:
    file = copy_of(data, tmp_path / "copy") / "val" / "000001.png"
    file.write_bytes(file.read_bytes()[:2000])
    settings = recipe("mask_rcnn", train={"num_workers": num_workers})
    result = invoke("evaluate", settings, tmp_path / "copy", tmp_path / "out", "--weights", str(run / "model.pth"))
    assert result.exit_code == 2
    assert result.stderr.startswith("error: 000001.png cannot be read")
    assert "Traceback" not in result.stderr


def annotations_of(data: Path) -> Annotations:
    return read_annotations(data, "train", DetectorConfig.model_validate(recipe("mask_rcnn")))


def noisy_predictions(images: CocoImages, noise: float) -> dict[int, dict[str, torch.Tensor]]:
    """Return the truth moved by some pixels, with some labels wrong and random scores."""
    predictions = {}
    for index, image_id in enumerate(images.ids):
        target = images[0, index][1]
        count = len(target["labels"])
        wrong = torch.rand(count) < noise / 10
        predictions[image_id] = {
            "boxes": target["boxes"] + noise * torch.randn(count, 4).clamp(-1, 1),
            "labels": torch.where(wrong, target["labels"] % 4 + 1, target["labels"]),
            "scores": torch.rand(count),
            "masks": target["masks"][:, None].float(),
        }
    return predictions


@pytest.mark.parametrize("noise", [0.0, 3.0])
def test_average_precision_is_that_of_torchmetrics(noise: float, data: Path) -> None:
    annotations, config = annotations_of(data), DetectorConfig.model_validate(recipe("mask_rcnn"))
    images = CocoImages(annotations, config, train=False)
    ours = CocoMetrics(images.coco, annotations.class_names, "mask_rcnn")
    theirs = MeanAveragePrecision(iou_type="bbox", class_metrics=True)
    for index, (image_id, prediction) in enumerate(noisy_predictions(images, noise).items()):
        ours.add(image_id, prediction)
        theirs.update([prediction], [images[0, index][1]])
    found, expected = ours.compute(), theirs.compute()
    assert found["AP"] == pytest.approx(float(expected["map"]), abs=1e-6)
    assert found["AP50"] == pytest.approx(float(expected["map_50"]), abs=1e-6)
    classes = [found[f"AP/{name}"] for name in annotations.class_names.values()]
    assert classes == pytest.approx(expected["map_per_class"].tolist(), abs=1e-6)
    assert (found["AP"] == pytest.approx(1.0)) == (noise == 0)
    assert found["segm/AP"] == pytest.approx(1.0) or noise > 0


def test_a_detector_that_finds_nothing_has_no_precision(data: Path) -> None:
    annotations = annotations_of(data)
    images = CocoImages(annotations, DetectorConfig.model_validate(recipe("mask_rcnn")), train=False)
    assert CocoMetrics(images.coco, annotations.class_names, "mask_rcnn").compute()["AP50"] == 0


def test_a_class_without_annotations_is_null_in_the_file(data: Path, tmp_path: Path) -> None:
    file = copy_of(data, tmp_path / "copy") / "annotations" / "train.json"
    content = json.loads(file.read_text())
    content["annotations"] = [each for each in content["annotations"] if each["category_id"] != 2]
    file.write_text(json.dumps(content))
    annotations = annotations_of(tmp_path / "copy")
    images = CocoImages(annotations, DetectorConfig.model_validate(recipe("mask_rcnn")), train=False)
    metrics = CocoMetrics(images.coco, annotations.class_names, "faster_rcnn").compute()
    assert math.isnan(metrics["AP/square"])
    save_metrics(metrics, tmp_path / "metrics.json")
    assert json.loads((tmp_path / "metrics.json").read_text())["AP/square"] is None


def test_ids_kept_as_labels_measure_the_same_and_other_labels_count_for_nothing(data: Path, tmp_path: Path) -> None:
    file = copy_of(data, tmp_path / "copy") / "annotations" / "train.json"
    content = json.loads(file.read_text())
    for record, key in [*((each, "id") for each in content["categories"])] + [
        (each, "category_id") for each in content["annotations"]
    ]:
        record[key] += 30
    file.write_text(json.dumps(content))
    config = DetectorConfig.model_validate({**recipe("mask_rcnn"), "num_classes": 91})
    annotations = read_annotations(tmp_path / "copy", "train", config)
    images = CocoImages(annotations, config, train=False)
    metrics = CocoMetrics(images.coco, annotations.class_names, "faster_rcnn")
    for index, image_id in enumerate(images.ids):
        target = images[0, index][1]
        boxes, labels = target["boxes"].repeat(3, 1), target["labels"]
        labels = torch.cat((labels, torch.zeros_like(labels), torch.full_like(labels, 90)))
        metrics.add(image_id, {"boxes": boxes, "labels": labels, "scores": torch.ones(len(labels))})
    assert metrics.compute()["AP"] == pytest.approx(1.0)


def test_the_mean_overlap_is_that_of_the_classes_that_are_there(data: Path) -> None:
    config = DetectorConfig.model_validate(recipe("fcn"))
    annotations = read_annotations(data, "val", config)
    module = DetectionModule(config, CocoImages(annotations, config, train=False), annotations.class_names)
    module.log_dict = lambda *_, **__: None  # type: ignore[method-assign] # there is no trainer
    module.overlap.update(torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 0, 1, 2]]))
    module.on_validation_epoch_end()
    assert module.metrics["mIoU"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert math.isnan(module.metrics["IoU/star"])
