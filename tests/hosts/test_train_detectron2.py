"""tools/train_detectron2.py from its command line: train, stop, resume, evaluate, predict."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from detectron2_pairs import CHECKOUT, CONFIGS, detector, read_recipe, with_our_name  # skips without detectron2

# isort: split
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.engine import DefaultPredictor

ROOT = Path(__file__).parents[2]
ITERATIONS = 4

YAML = f"""
_BASE_: {CONFIGS}/Base-RCNN-FPN.yaml
MODEL:
  DEVICE: cpu
  BACKBONE: {{FREEZE_AT: 0}}
  RESNETS: {{DEPTH: 18, RES2_OUT_CHANNELS: 64, NORM: BN}}
  ROI_HEADS: {{NUM_CLASSES: 4, BATCH_SIZE_PER_IMAGE: 16}}
DATASETS: {{TRAIN: [shapes_train], TEST: [shapes_val]}}
DATALOADER: {{NUM_WORKERS: 0}}
INPUT: {{MIN_SIZE_TRAIN: [96], MIN_SIZE_TEST: 96}}
SOLVER: {{IMS_PER_BATCH: 2, BASE_LR: 0.001, MAX_ITER: {ITERATIONS}, CHECKPOINT_PERIOD: 2, STEPS: []}}
TEST: {{EVAL_PERIOD: {ITERATIONS}}}
"""

LAZY = f"""
import torch
from detectron2.config import LazyCall as L, LazyConfig
from detectron2.data import DatasetMapper, build_detection_test_loader, build_detection_train_loader
from detectron2.data import get_detection_dataset_dicts
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.evaluation import COCOEvaluator
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import MultiStepParamScheduler

from backbone.hosts.detectron2 import DetectronBackbone, DetectronPyramid

model = LazyConfig.load("{CONFIGS}/common/models/mask_rcnn_fpn.py").model
model.backbone._target_ = DetectronPyramid
model.backbone.bottom_up = L(DetectronBackbone)(
    name="resnet18", norm="BN", out_features=["res2", "res3", "res4", "res5"]
)
model.roi_heads.update(num_classes=4, batch_size_per_image=16, mask_in_features=None, mask_pooler=None, mask_head=None)

mapper = dict(augmentations=[L(ResizeShortestEdge)(short_edge_length=96)], image_format="BGR")
dataloader = dict(
    train=L(build_detection_train_loader)(
        dataset=L(get_detection_dataset_dicts)(names="shapes_train"),
        mapper=L(DatasetMapper)(is_train=True, **mapper), total_batch_size=2, num_workers=0,
    ),
    test=L(build_detection_test_loader)(
        dataset=L(get_detection_dataset_dicts)(names="shapes_val", filter_empty=False),
        mapper=L(DatasetMapper)(is_train=False, **mapper), num_workers=0,
    ),
    evaluator=L(COCOEvaluator)(dataset_name="shapes_val"),
)
optimizer = L(torch.optim.SGD)(params=L(get_default_optimizer_params)(), lr=0.001, momentum=0.9)
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[3, {ITERATIONS}]),
    warmup_length=0.5, warmup_factor=0.1,
)
train = dict(
    output_dir="", init_checkpoint="", device="cpu", max_iter={ITERATIONS}, amp=dict(enabled=False), ddp=dict(),
    checkpointer=dict(period=2, max_to_keep=9), eval_period={ITERATIONS}, log_period=1,
)
"""


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shapes")
    tool = [sys.executable, str(ROOT / "tools" / "make_shapes_dataset.py"), "--out", str(out), "--overwrite"]
    subprocess.run(
        [*tool, "--images-train", "6", "--images-val", "3"], env=environment(), check=True, capture_output=True
    )
    return out


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(CHECKOUT)]), "OMP_NUM_THREADS": "1"}


def train(recipe: Path, shapes: Path, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "tools" / "train_detectron2.py"), "--config-file", str(recipe)]
    for split in ("train", "val"):
        command += ["--register", f"shapes_{split}", str(shapes / "annotations" / f"{split}.json"), str(shapes / split)]
    done = subprocess.run([*command, *arguments], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module", params=["yaml", "py"])
def run(
    request: pytest.FixtureRequest, shapes: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Path]:
    """A recipe trained to its end, stopping half way: the recipe, its output and the shapes."""
    out = tmp_path_factory.mktemp(request.param)
    recipe = out / f"recipe.{request.param}"
    recipe.write_text(YAML if request.param == "yaml" else LAZY)
    output, stop = overrides(recipe, out)
    train(recipe, shapes, "--freeze-schedule", "0:2,3:0", *output, *stop)
    log = train(recipe, shapes, "--freeze-schedule", "0:2,3:0", "--resume", *output)
    assert "Starting training from iteration 2" in log
    return recipe, out, shapes


def overrides(recipe: Path, out: Path) -> tuple[list[str], list[str]]:
    if recipe.suffix == ".yaml":
        return ["OUTPUT_DIR", str(out)], ["SOLVER.MAX_ITER", "2"]
    return [f"train.output_dir={out}"], ["train.max_iter=2"]


def state(path: Path) -> dict[str, torch.Tensor]:
    model: dict[str, torch.Tensor] = torch.load(path, weights_only=False)["model"]
    return model


def test_training_goes_on_where_it_stopped_and_ends(run: tuple[Path, Path, Path]) -> None:
    _, out, _ = run
    saved = {path.name: torch.load(path, weights_only=False)["iteration"] for path in out.glob("model_*.pth")}
    assert saved == {"model_0000001.pth": 1, "model_0000003.pth": 3, "model_final.pth": 3}


def test_checkpoints_are_named_as_its_own_and_the_schedule_froze_and_thawed(run: tuple[Path, Path, Path]) -> None:
    _, out, _ = run
    half_way, end = state(out / "model_0000001.pth"), state(out / "model_final.pth")
    variance = "backbone.bottom_up.res{}.0.conv1.norm.running_var"
    assert torch.equal(half_way[variance.format(2)], torch.ones(64))
    assert not torch.equal(half_way[variance.format(3)], torch.ones(128))
    assert not torch.equal(end[variance.format(2)], torch.ones(64))  # thawed from iteration 3 on


def test_the_result_evaluates(run: tuple[Path, Path, Path]) -> None:
    recipe, out, shapes = run
    weights = str(out / "model_final.pth")
    output, _ = overrides(recipe, out / "evaluation")
    chosen = ["MODEL.WEIGHTS", weights] if recipe.suffix == ".yaml" else [f"train.init_checkpoint={weights}"]
    log = train(recipe, shapes, "--eval-only", *output, *chosen)
    assert re.search(r"copypaste: AP,AP50", log)


@pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")  # detectron2's anchors
def test_its_own_resnet_loads_the_result_and_the_default_predictor_runs_on_ours(run: tuple[Path, Path, Path]) -> None:
    recipe, out, _ = run
    if recipe.suffix == ".py":
        pytest.skip("DefaultPredictor reads YAML recipes")
    cfg: Any = read_recipe(str(recipe), "MODEL.WEIGHTS", str(out / "model_final.pth"), "DATASETS.TEST", ())
    detector(cfg).load_state_dict(state(out / "model_final.pth"), strict=True)
    found = DefaultPredictor(with_our_name(cfg))(np.zeros((96, 128, 3), dtype=np.uint8))
    assert "instances" in found
    assert "shapes_train" not in DatasetCatalog.list()  # the tool registers in its own process
