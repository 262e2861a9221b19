"""``backbone train``: killed, distributed, refrozen and broken runs, by their bytes and by what they say."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import relative_error
from runs import IGNORED_WARNINGS, TOOLS, data, recipe, train
from torch import Tensor

sys.path.append(str(TOOLS))
import backbone.hosts.torchvision as host
from backbone import BackboneConfig, build_backbone
from backbone.recipe import DetectorConfig
from backbone.training.callbacks import save_atomically
from backbone.training.module import backbone_state
from backbone.training.parameter_groups import backbone_of

pytestmark = [pytest.mark.filterwarnings(each) for each in IGNORED_WARNINGS]
__all__ = ["data"]

PROGRAM = """
import os, signal, sys, torch
sys.path.append({tools!r})
torch.set_num_threads(1)
from backbone.command.app import main
from backbone.training import callbacks
from backbone.training.module import DetectionModule

def die():
    os.kill(os.getpid(), signal.SIGKILL)

{event}
if __name__ == "__main__":
    main()
"""
DIES_IN_STEP = """
step = DetectionModule.training_step
DetectionModule.training_step = lambda self, *batch: die() if self.global_step == {step} else step(self, *batch)
"""
DIES_WHILE_WRITING = """
save, written = torch.save, []
def save_half(content, file):
    written.append(file)
    if len(written) == 2:
        file.write_bytes(b"PK half of it")
        die()
    save(content, file)
torch.save = save_half
"""
DUMPS_EVERY_RANK = """
def dump(self, trainer, module):
    torch.save(module.detector.state_dict(), os.environ["DUMP"] + str(trainer.global_rank))
callbacks.History.on_train_end = dump
"""
KILLS = {
    "in epoch 0, without a checkpoint": DIES_IN_STEP.format(step=2),
    "in epoch 1, after a step of the schedule": DIES_IN_STEP.format(step=6),
    "while the second checkpoint is written": DIES_WHILE_WRITING,
}
THAWING = recipe(
    "faster_rcnn",
    norm="bn",
    train={"epochs": 3, "freeze_schedule": {0: 2, 1: 0}, "ema_decay": 0.8, "scale_jitter": [0.5, 2.0]},
)


def run_program(event: str, settings: dict[str, Any], data: Path, out: Path, *arguments: str, **env: str) -> Any:
    """Run ``backbone train`` as a program of its own, with ``event`` built in."""
    script, file = out.parent / f"{out.name}.py", out.parent / f"{out.name}.yaml"
    script.write_text(PROGRAM.format(tools=str(TOOLS), event=event))
    file.write_text(yaml.safe_dump(settings))
    options = ["--config", str(file), "--data", str(data), "--out", str(out), "--device", "cpu", *arguments]
    path = {"PYTHONPATH": str(TOOLS.parent), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(script), "train", *options], env={**os.environ, **path, **env}, capture_output=True,
        text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take longer than these trainings; ``finished``, made before this, has them."""
    from backbone.training import train as program

    monkeypatch.setattr(program, "save_sheet", lambda *_: None)
    monkeypatch.setattr(program, "save_curves", lambda *_: None)


def weights_of(out: Path) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in torch.load(out / "model.pth").items()}


@pytest.fixture(scope="module")
def never_killed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("never") / "run"
    assert train(THAWING, data, out).exit_code == 0
    return out


@pytest.mark.parametrize("kill", KILLS)
def test_killed_run_goes_on_to_the_same_bytes(kill: str, data: Path, never_killed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run_program(KILLS[kill], THAWING, data, out).returncode == -signal.SIGKILL
    resumed = train(THAWING, data, out, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert weights_of(out) == weights_of(never_killed)
    epochs = [json.loads((folder / "metrics.json").read_text())["epochs"] for folder in (out, never_killed)]
    losses = [[row["loss"] for row in rows] for rows in epochs]
    assert losses[0] == losses[1]


def test_a_run_repeats_itself_with_processes_that_read(data: Path, never_killed: Path, tmp_path: Path) -> None:
    settings = {**THAWING, "train": {**THAWING["train"], "num_workers": 2}}
    assert train(settings, data, tmp_path / "run").exit_code == 0
    assert weights_of(tmp_path / "run") == weights_of(never_killed)


@pytest.mark.parametrize("freezing", [{"freeze_at": 2}, {"freeze_schedule": {0: 4, 1: 3}}], ids=str)
def test_two_processes_learn_what_one_learns_from_the_doubled_batch(
    freezing: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    """RetinaNet on group norms: its loss is the mean of its images' losses, and it draws no samples."""

    def settings(batch_size: int) -> dict[str, Any]:
        made = recipe("retinanet", train={"batch_size": batch_size, "learning_rate": 0.01, "warmup_steps": 0})
        made["backbone"] |= {key: value for key, value in freezing.items() if key == "freeze_at"}
        made["train"] |= {key: value for key, value in freezing.items() if key != "freeze_at"}
        return made

    two = run_program(DUMPS_EVERY_RANK, settings(2), data, tmp_path / "two", "--devices", "2", DUMP=f"{tmp_path}/rank")
    assert two.returncode == 0, two.stderr
    assert train(settings(4), data, tmp_path / "one").exit_code == 0
    first, second = (torch.load(tmp_path / f"rank{rank}") for rank in range(2))
    one = torch.load(tmp_path / "one" / "model.pth")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert max(relative_error(first[name], one[name]) for name in one) <= 1e-5


class Watched:
    """What the optimizer holds when training starts, by parameter name, and its groups."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.momentum: dict[str, Tensor] = {}
        self.groups: list[dict[str, Any]] = []
        monkeypatch.setattr("backbone.training.callbacks.History.on_train_start", self._look, raising=False)

    def _look(self, trainer: Any, module: Any) -> None:
        names = {parameter: name for name, parameter in module.detector.named_parameters()}
        state = trainer.optimizers[0].state
        self.momentum = {names[p]: value["momentum_buffer"].clone() for p, value in state.items()}
        self.groups = [dict(group) for group in trainer.optimizers[0].param_groups]


@pytest.mark.parametrize(("before", "after"), [(2, 0), (0, 2)])
def test_a_changed_freeze_goes_on_with_the_state_each_parameter_had(
    before: int, after: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def settings(freeze_at: int, rate: float, epochs: int) -> dict[str, Any]:
        made = recipe("retinanet", train={"epochs": epochs, "learning_rate": rate, "warmup_steps": 0})
        made["backbone"]["freeze_at"] = freeze_at
        return made

    ended = {}
    monkeypatch.setattr(
        "backbone.training.callbacks.History.on_train_end", lambda _, trainer, module: ended.update(state_of(module))
    )
    assert train(settings(before, 0.001, 1), data, tmp_path / "run").exit_code == 0
    saved, watched = dict(ended), Watched(monkeypatch)
    resumed = train(settings(after, 0.002, 2), data, tmp_path / "run", "--resume")
    assert f"changed: backbone.freeze_at: {before} -> {after}" in resumed.output
    assert "changed: train.learning_rate: 0.001 -> 0.002" in resumed.output
    assert {group["lr"] for group in watched.groups} == {0.002}
    stages = ("conv1.", "bn1.", "layer1.")
    in_first_two = [name for name in saved if name.removeprefix("backbone.body.").startswith(stages)]
    assert bool(in_first_two) == (before == 0)  # a frozen parameter has no momentum
    assert watched.momentum.keys() == saved.keys()
    assert all(torch.equal(watched.momentum[name], saved[name]) for name in saved)
    moved = [name for name in in_first_two if not torch.equal(ended[name], saved[name])]
    assert not moved
    assert any(name.startswith("backbone.body.layer1.") for name in ended)


def test_the_rate_goes_on_where_it_was_with_another_number_of_steps(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def settings(batch_size: int, epochs: int) -> dict[str, Any]:
        course = {"warmup_steps": 0, "learning_rate_decay": "steps", "decay_epochs": [2]}
        return recipe(train={"batch_size": batch_size, "epochs": epochs, "learning_rate": 0.001, **course})

    assert train(settings(1, 1), data, tmp_path / "run").exit_code == 0  # eight steps, then two an epoch
    rates: list[float] = []
    monkeypatch.setattr(
        "backbone.training.callbacks.History.on_train_batch_start",
        lambda _, trainer, *__: rates.append(trainer.optimizers[0].param_groups[0]["lr"]),
        raising=False,
    )
    assert train(settings(4, 3), data, tmp_path / "run", "--resume").exit_code == 0
    assert rates == pytest.approx([0.001] * 2 + [0.0001] * 2)


def state_of(module: Any) -> dict[str, Tensor]:
    names = {parameter: name for name, parameter in module.detector.named_parameters()}
    state = module.trainer.optimizers[0].state
    return {names[parameter]: value["momentum_buffer"].clone() for parameter, value in state.items()}


REFUSED_AT_RESUME: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "num_classes": (lambda settings: settings["backbone"].update(norm="bn"), "changed in backbone.norm: gn -> bn"),
    "pyramid": (lambda settings: settings.update(pyramid={"out_channels": 16}), "pyramid.out_channels: 8 -> 16"),
    "average": (lambda settings: settings["train"].update(ema_decay=0.9), "train.ema_decay: None -> 0.9"),
    "optimizer": (lambda settings: settings["train"].update(optimizer="adamw"), "train.optimizer: sgd -> adamw"),
}


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    assert train(recipe(train={"epochs": 1}), data, out).exit_code == 0
    return out


@pytest.mark.parametrize("change", REFUSED_AT_RESUME)
def test_another_detector_cannot_go_on(change: str, data: Path, finished: Path) -> None:
    settings, (edit, message) = recipe(train={"epochs": 1}), REFUSED_AT_RESUME[change]
    edit(settings)
    assert message in refusal(settings, data, finished, "--resume")


def refusal(settings: dict[str, Any], data: Path, out: Path, *arguments: str) -> str:
    """Return the one message that a refused run prints."""
    result = train(settings, data, out, *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    return result.stderr


def test_a_folder_that_holds_a_run_is_not_written_over(data: Path, finished: Path) -> None:
    assert "already holds a run; go on with it by --resume" in refusal(recipe(), data, finished)


def test_nothing_to_resume_is_said(data: Path, tmp_path: Path) -> None:
    assert "--resume needs a run in --out" in refusal(recipe(), data, tmp_path / "none", "--resume")


def test_a_refused_recipe_leaves_no_run_behind(data: Path, tmp_path: Path) -> None:
    assert "batch_size must be at most 8" in refusal(recipe(train={"batch_size": 9}), data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_is_named(data: Path, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").write_bytes((finished / "last.ckpt").read_bytes()[:5000])
    assert "last.ckpt: cannot be read as a checkpoint" in refusal(recipe(), data, tmp_path, "--resume")


def test_a_loss_that_is_no_number_stops_with_the_images(data: Path, tmp_path: Path) -> None:
    said = refusal(recipe(train={"learning_rate": 1e30, "warmup_steps": 0}), data, tmp_path / "run")
    assert re.search(
        r"the loss is nan in step \d+ of epoch 0: loss_classification nan, .*: \d{6}.png, \d{6}.png\.", said
    )


def test_results_are_complete_and_the_backbone_starts_another_recipe(
    data: Path, finished: Path, tmp_path: Path
) -> None:
    names = ["backbone.pth", "curves.png", "last.ckpt", "metrics.json", "model.pth", "recipe.yaml", "sheet.png"]
    assert sorted(path.name for path in finished.iterdir() if path.is_file()) == names
    settings = recipe("retinanet")
    settings["backbone"]["weights"] = str(finished / "backbone.pth")
    body = backbone_of(host.build_detector(DetectorConfig.model_validate(settings))).body
    trained = torch.load(finished / "model.pth")
    assert all(torch.equal(value, trained[f"backbone.body.{name}"]) for name, value in body.state_dict().items())


MEASURED = {
    "mask_rcnn": {"AP", "AP/star", "segm/AP50", "segm/AP/circle"},
    "keypoint_rcnn": {"AP", "keypoints/AP", "keypoints/AP75"},
    "fcn": {"mIoU", "IoU/background", "IoU/star"},
}


@pytest.mark.parametrize("detector", MEASURED)
def test_other_heads_train_and_are_measured(detector: str, data: Path, tmp_path: Path) -> None:
    settings = recipe(detector, train={"epochs": 1, "batch_size": 4, "precision": "bf16-mixed"})
    if detector == "keypoint_rcnn":
        settings["num_keypoints"] = 4
    if detector == "fcn":
        settings["aux_classifier"] = True
    result = train(settings, data, tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert MEASURED[detector] <= json.loads((tmp_path / "run" / "metrics.json").read_text())["metrics"].keys()


def test_the_backbones_file_says_which_pixels_it_learned_from(tmp_path: Path) -> None:
    detector, config = c4_detector(image_mean=[0.4, 0.5, 0.6])
    save_atomically(backbone_state(detector, config), tmp_path / "backbone.pth")
    loaded = build_backbone(config.backbone.model_copy(update={"weights": str(tmp_path / "backbone.pth")}))
    assert (loaded.preprocessing.mean, loaded.preprocessing.channel_order) == ((0.4, 0.5, 0.6), "rgb")


def test_the_backbones_file_has_the_c5_that_was_the_head(tmp_path: Path) -> None:
    detector, config = c4_detector()
    save_atomically(backbone_state(detector, config), tmp_path / "backbone.pth")
    backbone = {"name": "resnet18", "norm": "bn", "weights": str(tmp_path / "backbone.pth")}
    loaded = build_backbone(BackboneConfig.model_validate(backbone)).state_dict()
    head = detector.roi_heads.box_head[0].state_dict()
    assert all(torch.equal(loaded[f"layer4.{name}"], value) for name, value in head.items())


def c4_detector(**settings: Any) -> tuple[Any, DetectorConfig]:
    made = {**recipe("faster_rcnn", norm="bn"), "pyramid": None, "box_head": "c5", **settings}
    config = DetectorConfig.model_validate(made)
    return host.build_detector(config), config


def test_the_transfer_study_measures_every_epoch() -> None:
    from transfer_study import fine_tuned

    config = DetectorConfig.model_validate(recipe())
    assert config.train.validate_every == 9
    assert fine_tuned(config, 2, Path("backbone.pth"), 20)["train"]["validate_every"] == 1


def test_training_is_timed_without_validation(finished: Path) -> None:
    (epoch,) = json.loads((finished / "metrics.json").read_text())["epochs"]
    assert 0 < epoch["training_seconds"] < epoch["seconds"]


def test_the_last_epoch_is_measured_whatever_validate_every_says(finished: Path) -> None:
    assert "AP50" in json.loads((finished / "metrics.json").read_text())["epochs"][-1]


def test_a_schedule_that_freezes_random_weights_is_warned_of(data: Path, tmp_path: Path) -> None:
    settings = recipe("retinanet", norm="bn", train={"epochs": 1, "freeze_schedule": {0: 2}})
    with pytest.warns(UserWarning, match="the first 2 stages are frozen at random weights"):
        assert train(settings, data, tmp_path / "run").exit_code == 0


def test_frozen_stages_keep_their_bytes(data: Path, tmp_path: Path) -> None:
    settings = recipe("retinanet", norm="bn", train={"epochs": 1})
    settings["backbone"]["freeze_at"] = 3
    assert train(settings, data, tmp_path / "run").exit_code == 0
    torch.manual_seed(0)
    start = host.build_detector(DetectorConfig.model_validate(settings)).state_dict()
    end = torch.load(tmp_path / "run" / "model.pth")
    moved = {name.split(".")[2] for name in start if ".body." in name and not torch.equal(start[name], end[name])}
    assert moved == {"layer3", "layer4"}
