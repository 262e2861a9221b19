"""Train, resume and evaluate a detectron2 recipe, YAML or LazyConfig, with a backbone of this package.

    python tools/train_detectron2.py --config-file COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml --num-gpus 8
    python tools/train_detectron2.py --config-file recipe.yaml --resume
    python tools/train_detectron2.py --config-file recipe.py --eval-only train.init_checkpoint=out/model_final.pth
    python tools/train_detectron2.py --config-file recipe.yaml --freeze-schedule 0:2,5000:0 MODEL.BACKBONE.FREEZE_AT 0

Arguments are those of detectron2's own train_net.py and lazyconfig_train_net.py, and two more: a data set in COCO's
format that has no name yet (--register NAME ANNOTATIONS.json IMAGES, repeatable), and the iterations from which so many
stages are frozen. In a YAML recipe detectron2's builder is replaced by ours; MODEL.BACKBONE_PLUGIN may say more. A
LazyConfig names DetectronBackbone and DetectronPyramid itself. Results are printed and lie in OUTPUT_DIR.
"""

import argparse
import os
from collections.abc import Mapping
from typing import Any

from backbone import FreezeSchedule
from backbone.hosts.detectron2 import DROP_IN_BUILDERS, FreezeScheduleHook, add_backbone_config  # says what to install

# isort: split
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import (
    AMPTrainer,
    DefaultTrainer,
    HookBase,
    SimpleTrainer,
    default_argument_parser,
    default_setup,
    default_writers,
    hooks,
    launch,
)
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import COCOEvaluator, inference_on_dataset, print_csv_format
from detectron2.utils import comm


class Trainer(DefaultTrainer):  # type: ignore[misc]
    """detectron2's trainer, evaluating with COCO's metrics."""

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
        """Return the evaluator of one data set."""
        return COCOEvaluator(dataset_name, output_dir=os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name))


def train_yaml(arguments: argparse.Namespace) -> Mapping[str, Any] | None:
    """Run a YAML recipe; return its evaluation, where it has one."""
    cfg = get_cfg()
    add_backbone_config(cfg)
    cfg.merge_from_file(arguments.config_file)
    cfg.merge_from_list(arguments.opts)
    cfg.MODEL.BACKBONE.NAME = DROP_IN_BUILDERS.get(cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.NAME)
    cfg.freeze()
    default_setup(cfg, arguments)
    if arguments.eval_only:
        model = Trainer.build_model(cfg)
        DetectionCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=arguments.resume)
        evaluation: Mapping[str, Any] = Trainer.test(cfg, model)
        return evaluation
    trainer = Trainer(cfg)
    trainer.register_hooks(freeze_hooks(arguments))
    trainer.resume_or_load(resume=arguments.resume)
    trainer.train()
    return getattr(trainer, "_last_eval_results", None)


def train_lazily(arguments: argparse.Namespace) -> Mapping[str, Any] | None:
    """Run a LazyConfig recipe with ``model``, ``dataloader``, ``optimizer``, ``lr_multiplier`` and ``train``."""
    cfg = LazyConfig.apply_overrides(LazyConfig.load(arguments.config_file), arguments.opts)
    default_setup(cfg, arguments)
    model = instantiate(cfg.model).to(cfg.train.device)
    if arguments.eval_only:
        DetectionCheckpointer(model).load(cfg.train.init_checkpoint)
        return evaluate(cfg, model)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    trainer = (AMPTrainer if cfg.train.amp.enabled else SimpleTrainer)(
        create_ddp_model(model, **cfg.train.ddp), instantiate(cfg.dataloader.train), optimizer
    )
    checkpointer = DetectionCheckpointer(model, cfg.train.output_dir, trainer=trainer)
    main_process = comm.is_main_process()
    writers = default_writers(cfg.train.output_dir, cfg.train.max_iter) if main_process else []
    trainer.register_hooks(
        [
            *freeze_hooks(arguments, lambda bare: create_ddp_model(bare, **cfg.train.ddp)),
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer) if main_process else None,
            hooks.EvalHook(cfg.train.eval_period, lambda: evaluate(cfg, trainer.model)),
            hooks.PeriodicWriter(writers, period=cfg.train.log_period) if main_process else None,
        ]
    )
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=arguments.resume)
    resumed = arguments.resume and checkpointer.has_checkpoint()
    trainer.train(trainer.iter + 1 if resumed else 0, cfg.train.max_iter)
    return evaluate(cfg, trainer.model)


def evaluate(cfg: Any, model: torch.nn.Module) -> Mapping[str, Any] | None:  # noqa: ANN401 - an omegaconf node
    """Return and print what the recipe's evaluator says of ``model``; None where it has none."""
    if "evaluator" not in cfg.dataloader:
        return None
    evaluator = instantiate(cfg.dataloader.evaluator)
    results: Mapping[str, Any] = inference_on_dataset(model, instantiate(cfg.dataloader.test), evaluator)
    if comm.is_main_process():
        print_csv_format(results)
    return results


def freeze_hooks(arguments: argparse.Namespace, wrap: Any = None) -> list[HookBase]:  # noqa: ANN401
    """Return the hook that --freeze-schedule asks for, in a list; none without."""
    if arguments.freeze_schedule is None:
        return []
    return [FreezeScheduleHook(arguments.freeze_schedule, **({"wrap": wrap} if wrap else {}))]


def freeze_schedule(text: str) -> FreezeSchedule:
    """Read ``0:2,5000:0``: two stages are frozen from iteration 0 on, none from 5000 on."""
    try:
        return FreezeSchedule({int(start): int(frozen) for start, frozen in (p.split(":") for p in text.split(","))})
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must read ITERATION:STAGES,..., such as 0:2,5000:0; {error}") from None


def main(arguments: argparse.Namespace) -> Mapping[str, Any] | None:
    """Register the data sets and run the recipe, in each process."""
    for name, annotations, images in arguments.register:
        register_coco_instances(name, {}, annotations, images)
    run = train_lazily if arguments.config_file.endswith(".py") else train_yaml
    return run(arguments)


def parser() -> argparse.ArgumentParser:
    """Return detectron2's argument parser with our arguments."""
    arguments: argparse.ArgumentParser = default_argument_parser(epilog=__doc__)
    arguments.add_argument(
        "--register", nargs=3, action="append", default=[], metavar=("NAME", "ANNOTATIONS", "IMAGES"),
        help="a data set in COCO's format",
    )  # fmt: skip
    arguments.add_argument(
        "--freeze-schedule", type=freeze_schedule, metavar="ITERATION:STAGES,...", help="such as 0:2,5000:0"
    )
    return arguments


if __name__ == "__main__":
    given = parser().parse_args()
    launch(
        main, given.num_gpus, num_machines=given.num_machines, machine_rank=given.machine_rank,
        dist_url=given.dist_url, args=(given,),
    )  # fmt: skip
