"""How runs end: alone in the world, interrupted, on a full disk, with pictures that cannot be drawn, on odd data."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runs import IGNORED_WARNINGS, copy_of, data, invoke, recipe, train
from test_train import weights_of

from backbone import BackboneConfig, build_backbone, inspect_weights
from backbone.features import Preprocessing
from backbone.recipe import DetectorConfig
from backbone.training.callbacks import save_atomically
from backbone.training.coco.annotations import read_annotations, require_same_categories
from backbone.training.facts import RunFacts, read_run, rebuild_detector
from backbone.training.module import DetectionModule
from backbone.weights.metadata import HEADER_KEY, Metadata

pytestmark = [pytest.mark.filterwarnings(each) for each in IGNORED_WARNINGS]
__all__ = ["data"]

ROOT = Path(__file__).parents[2]
NAMES = {1: "vehicle/car", 2: "dog[/old]", 3: "[dog]", 4: "$x_{"}
"""Classes whose names mean something to paths, to rich's markup and to matplotlib's formulas."""


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take longer than these trainings; ``alone``, made before this, has them."""
    for name in ("save_sheet", "save_curves"):
        monkeypatch.setattr(f"backbone.training.train.{name}", lambda *_: None)


def renamed(data: Path, folder: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    """Return a copy of the data with both annotation files edited."""
    copy = copy_of(data, folder)
    for file in (copy / "annotations").iterdir():
        content = json.loads(file.read_text())
        edit(content)
        file.write_text(json.dumps(content))
    return copy


def odd_names(content: dict[str, Any]) -> None:
    for category in content["categories"]:
        category["name"] = NAMES[category["id"]]


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any], str]:
    """Return a finished run whose starting weights are gone: its folder, its data, its recipe, and what it said."""
    folder = tmp_path_factory.mktemp("alone[1]")
    start = folder / "start.pth"
    torch.manual_seed(1)
    body = build_backbone(BackboneConfig(name="resnet18", norm="bn"))
    for module in body.modules():
        if hasattr(module, "running_var"):
            module.eps = 3e-4  # type: ignore[assignment]
    pixels = Preprocessing((100.0, 110.0, 120.0), (50.0, 60.0, 70.0), "bgr", (0.0, 255.0))
    facts = Metadata("a test", known=True, preprocessing=pixels, eps=3e-4, stride_in_1x1=False)
    state = OrderedDict(body.state_dict())
    state._metadata = OrderedDict({HEADER_KEY: facts.to_json()})  # type: ignore[attr-defined]
    save_atomically(state, start)
    settings = recipe("retinanet", norm="bn", train={"epochs": 1, "warmup_steps": 500})
    settings["backbone"]["weights"] = str(start)
    odd = renamed(data, folder / "data", odd_names)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*expect images BGR")
        result = train(settings, odd, folder / "run")
    assert result.exit_code == 0, result.output
    start.unlink()
    return folder / "run", odd, settings, result.output


def test_names_are_printed_letter_by_letter_and_pictures_are_drawn(alone: tuple[Path, Path, Any, str]) -> None:
    run, _, _, said = alone
    for name in NAMES.values():
        assert re.search(rf"{re.escape(name)} +│ +(\d\.\d+|nan)", said)
    assert str(run / "model.pth") in said
    metrics = json.loads((run / "metrics.json").read_text())["metrics"]
    assert [key for key in metrics if key.startswith("AP/")] == [f"AP/{name}" for name in NAMES.values()]
    assert all((run / name).stat().st_size > 10_000 for name in ("curves.png", "sheet.png"))


def test_a_warm_up_longer_than_the_run_is_said(alone: tuple[Path, Path, Any, str]) -> None:
    assert "warmup_steps 500 is longer than the run of 4 steps" in alone[3]
    assert "never passes 0.01 of 0.001" in alone[3]


@pytest.mark.parametrize("name", ["model.pth", "last.ckpt"])
def test_a_finished_run_is_measured_without_what_it_started_from(
    name: str, alone: tuple[Path, Path, Any, str], tmp_path: Path
) -> None:
    run, odd, settings, _ = alone
    result = invoke(
        "evaluate", settings, odd, tmp_path / "e", "--weights", str(run / name), "--json", str(tmp_path / "m.json")
    )
    assert result.exit_code == 0, result.output
    measured = json.loads((tmp_path / "m.json").read_text())
    assert measured == json.loads((run / "metrics.json").read_text())["metrics"]


def test_classes_in_another_order_are_measured_by_their_names(
    alone: tuple[Path, Path, Any, str], tmp_path: Path
) -> None:
    run, odd, settings, _ = alone

    def turn(content: dict[str, Any]) -> None:
        for record, key in [(c, "id") for c in content["categories"]] + [
            (a, "category_id") for a in content["annotations"]
        ]:
            record[key] = 5 - record[key]

    turned = renamed(odd, tmp_path / "turned", turn)
    arguments = ["--weights", str(run / "model.pth"), "--json", str(tmp_path / "m.json")]
    assert invoke("evaluate", settings, turned, tmp_path / "e", *arguments).exit_code == 0
    measured = json.loads((tmp_path / "m.json").read_text())
    before = json.loads((run / "metrics.json").read_text())["metrics"]
    assert measured == pytest.approx(before, nan_ok=True)


def test_weights_of_other_classes_are_refused_with_both_names(
    alone: tuple[Path, Path, Any, str], data: Path, tmp_path: Path
) -> None:
    run, _, settings, _ = alone
    result = invoke("evaluate", settings, data, tmp_path / "e", "--weights", str(run / "model.pth"))
    assert result.exit_code == 2
    assert "trained on, vehicle/car, dog[/old], [dog], $x_{; it has circle, square, triangle, star" in result.stderr


def test_a_rebuilt_detector_keeps_preprocessing_and_eps(alone: tuple[Path, Path, Any, str]) -> None:
    run, odd, settings, _ = alone
    state, facts = read_run(run / "model.pth")
    assert isinstance(facts, RunFacts)
    config = DetectorConfig.model_validate(settings)
    detector = rebuild_detector(config, facts)
    detector.load_state_dict(state)
    body = detector.backbone.body  # type: ignore[union-attr]
    assert body.preprocessing.channel_order == "bgr"  # type: ignore[union-attr]
    assert {module.eps for module in body.modules() if hasattr(module, "running_var")} == {3e-4}  # type: ignore[union-attr]
    assert detector.transform.image_mean == pytest.approx([100 / 255, 110 / 255, 120 / 255])  # type: ignore[union-attr]
    pixels = torch.rand(3, 4, 4)
    flipped = detector.transform.normalize(pixels)  # type: ignore[union-attr,operator]
    assert flipped[0, 0, 0] == pytest.approx(float((pixels[2, 0, 0] - 100 / 255) / (50 / 255)), abs=1e-5)
    assert facts.class_names == NAMES
    assert facts.labels == {1: 1, 2: 2, 3: 3, 4: 4}
    assert facts.fingerprints["val"] == read_annotations(odd, "val", config).fingerprint
    assert "3e-04 in the norms" in str(inspect_weights(str(run / "model.pth")).training) or facts.eps


def test_a_run_goes_on_without_what_it_started_from(alone: tuple[Path, Path, Any, str], tmp_path: Path) -> None:
    run, odd, settings, _ = alone
    copy = copy_of(run, tmp_path / "run")
    longer = {**settings, "train": {**settings["train"], "epochs": 2}}
    result = train(longer, odd, copy, "--resume")
    assert result.exit_code == 0, result.output
    _, facts = read_run(copy / "model.pth")
    assert facts is not None
    assert facts.preprocessing.channel_order == "bgr"
    assert set(facts.eps.values()) == {3e-4}


def test_a_run_does_not_go_on_with_other_classes_and_tells_of_other_data(
    alone: tuple[Path, Path, Any, str], data: Path, tmp_path: Path
) -> None:
    run, odd, settings, _ = alone
    copy = copy_of(run, tmp_path / "run")
    refused = train(settings, data, copy, "--resume")
    assert refused.exit_code == 2
    assert "the run learned 1 vehicle/car, 2 dog[/old]" in refused.stderr
    fewer = renamed(odd, tmp_path / "fewer", lambda content: content["annotations"].pop())
    told = train(settings, fewer, copy, "--resume")
    assert told.exit_code == 0, told.output
    assert f"note: {fewer / 'annotations' / 'train.json'} is not as it was when the run began" in told.stdout


def test_the_backbone_alone_given_as_weights_is_named(alone: tuple[Path, Path, Any, str], tmp_path: Path) -> None:
    run, odd, settings, _ = alone
    result = invoke("evaluate", settings, odd, tmp_path / "e", "--weights", str(run / "backbone.pth"))
    assert result.exit_code == 2
    assert "is a backbone without its detector; give model.pth beside it" in result.stderr


def test_weights_that_do_not_fit_take_no_page_to_say_so(alone: tuple[Path, Path, Any, str], tmp_path: Path) -> None:
    run, odd, settings, _ = alone
    weights = ["--weights", str(run / "last.ckpt")]
    result = invoke("evaluate", {**settings, "num_classes": 9}, odd, tmp_path / "e", *weights)
    assert result.exit_code == 2
    assert "last.ckpt: does not fit the recipe's detector" in result.stderr
    assert len(result.stderr) < 900


def test_a_picture_that_cannot_be_drawn_costs_itself(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no such [font]")

    monkeypatch.setattr("backbone.training.train.save_curves", fail)
    monkeypatch.setattr("backbone.training.train.save_sheet", lambda *_: (tmp_path / "run" / "sheet.png").touch())
    result = train(recipe(train={"epochs": 1}), data, tmp_path / "run")
    assert result.exit_code == 1
    assert "error: curves.png could not be made (RuntimeError: no such [font])" in result.stderr
    names = {"model.pth", "backbone.pth", "metrics.json", "sheet.png"}
    assert names <= {path.name for path in (tmp_path / "run").iterdir()}
    assert str(tmp_path / "run" / "model.pth") in result.stdout
    assert str(tmp_path / "run" / "curves.png") not in result.stdout


def test_weights_are_there_when_the_last_measuring_fails(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: DetectionModule) -> None:
        raise FloatingPointError("measured too much")

    monkeypatch.setattr(DetectionModule, "on_validation_epoch_end", fail)
    assert train(recipe(train={"epochs": 1}), data, tmp_path / "run").exit_code == 2
    assert (tmp_path / "run" / "model.pth").exists()


def test_a_full_disk_leaves_the_old_file_and_says_so(tmp_path: Path) -> None:
    """The limit on the size of a file fails a write in the same place as a full disk does."""
    file = tmp_path / "last.ckpt"
    save_atomically({"weight": torch.zeros(10)}, file)
    before = file.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"last\.ckpt could not be written \(.*\), the old file is as it was"):
            save_atomically({"weight": torch.zeros(100_000)}, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_run_on_a_full_disk_names_its_last_checkpoint_and_resume(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, written = torch.save, []

    def save_twice_no_more(content: Any, file: Path) -> None:
        written.append(file)
        if len(written) == 2:
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
        save(content, file)

    monkeypatch.setattr(torch, "save", save_twice_no_more)
    result = train(recipe(), data, tmp_path / "run")
    assert result.exit_code == 2
    said = " ".join(result.stderr.split())
    assert "last.ckpt could not be written" in said
    assert "last.ckpt holds the last finished epoch; free some space and go on with --resume" in said
    monkeypatch.setattr(torch, "save", save)
    assert train(recipe(), data, tmp_path / "run", "--resume").exit_code == 0


def test_ctrl_c_ends_with_a_message_that_names_resume(data: Path, tmp_path: Path) -> None:
    settings, out = recipe(train={"epochs": 500}), tmp_path / "run"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    program = [sys.executable, "-m", "backbone", "train", "--config", str(tmp_path / "recipe.yaml")]
    program += ["--data", str(data), "--out", str(out), "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (out / "last.ckpt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    last_line = " ".join(said.split())
    assert f"interrupted: {out}/last.ckpt holds the last finished epoch; go on with --resume" in last_line
    assert "Traceback" not in said


def test_odd_records_leave_the_bytes_of_the_weights_alone(data: Path, tmp_path: Path) -> None:
    def spoil(content: dict[str, Any]) -> None:
        first = content["annotations"][0]
        content["annotations"] += [
            None,
            {**first, "id": 1000, "bbox": [0, 0, float("nan"), 1]},
            {**first, "id": 1001, "iscrowd": None},
            {**first, "id": 1002, "category_id": "circle"},
            {**first, "id": None, "image_id": 77},
        ]
        content["images"].append({"id": 99, "file_name": "gone.png"})

    settings = recipe("retinanet", train={"epochs": 1})
    assert train(settings, data, tmp_path / "clean").exit_code == 0
    result = train(settings, renamed(data, tmp_path / "data", spoil), tmp_path / "odd")
    assert result.exit_code == 0, result.output
    assert weights_of(tmp_path / "odd") == weights_of(tmp_path / "clean")
    assert len((tmp_path / "odd" / "skipped.csv").read_text().splitlines()) == 1 + 2 * 6
    assert not (tmp_path / "clean" / "skipped.csv").exists()


def test_strict_refuses_odd_data_before_anything_is_written(data: Path, tmp_path: Path) -> None:
    odd = renamed(data, tmp_path / "data", lambda content: content["annotations"][0].update(bbox=None))
    result = train(recipe(), odd, tmp_path / "run", "--strict")
    assert result.exit_code == 2
    assert "--strict refuses 1 records that would be skipped" in result.stderr
    assert not (tmp_path / "run").exists()


def test_other_classes_in_validation_are_refused_and_another_order_is_not(data: Path, tmp_path: Path) -> None:
    def of(edit: Callable[[dict[str, Any]], Any], name: str) -> dict[str, Any]:
        copy = copy_of(data, tmp_path / name)
        content = json.loads((copy / "annotations" / "val.json").read_text())
        edit(content)
        (copy / "annotations" / "val.json").write_text(json.dumps(content))
        config = DetectorConfig.model_validate(recipe())
        return {split: read_annotations(copy, split, config) for split in ("train", "val")}

    with pytest.raises(ValueError, match=r"train and val must have the same categories, got .*circle.* and .*disc"):
        require_same_categories(of(lambda content: content["categories"][0].update(name="disc"), "other"))

    def turn(content: dict[str, Any]) -> None:
        for category in content["categories"]:
            category["id"] = 5 - category["id"]

    splits = of(turn, "turned")
    require_same_categories(splits)
    assert splits["val"].labels == {1: 4, 2: 3, 3: 2, 4: 1}
