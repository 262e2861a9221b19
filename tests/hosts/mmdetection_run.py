# ruff: noqa: E402 - nothing of what the libraries warn about while they are imported is of interest
"""A run of mmengine's Runner with EMA, checkpoints and a resume on a PluginBackbone; prints what it found."""

import sys
import warnings
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")

import torch
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch.utils.data import Dataset

import backbone.hosts.mmdetection  # noqa: F401


class Pictures(Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"images": torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(index))}


class Model(BaseModel):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.backbone = MODELS.build({"type": "PluginBackbone", "depth": 18, "frozen_stages": 1})

    def forward(self, images: Any, mode: str = "tensor") -> Any:
        maps = self.backbone(images)
        return {"loss": torch.stack([each.square().mean() for each in maps]).sum()} if mode == "loss" else maps


def run(folder: Path, epochs: int, *, resume: bool) -> Runner:
    runner = Runner(
        model=Model(),
        work_dir=str(folder),
        train_dataloader={
            "batch_size": 2,
            "dataset": Pictures(),
            "sampler": {"type": "DefaultSampler", "shuffle": False},
            "collate_fn": {"type": "default_collate"},
        },
        train_cfg={"by_epoch": True, "max_epochs": epochs},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.01, "momentum": 0.9}},
        default_hooks={"checkpoint": {"type": "CheckpointHook", "interval": 1}},
        custom_hooks=[{"type": "EMAHook", "momentum": 0.5}],
        resume=resume,
        log_level="ERROR",
    )
    runner.train()
    return runner


folder = Path(sys.argv[1])
first = run(folder, 2, resume=False)
saved = torch.load(folder / "epoch_2.pth", weights_only=False)
assert "backbone.layer4.1.conv2.weight" in saved["state_dict"]
assert "module.backbone.layer4.1.conv2.weight" in saved["ema_state_dict"]
second = run(folder, 3, resume=True)
ema, live = second.hooks[-1], second.model.backbone
names = [hook for hook in second.hooks if hasattr(hook, "ema_model")]
averaged = names[0].ema_model.module.backbone.network.layer4[1].conv2.weight
apart = not torch.equal(averaged, live.network.layer4[1].conv2.weight)
print(f"resumed at {second.epoch - 1}, EMA apart from the weights: {apart}")
