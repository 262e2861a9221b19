"""Fine-tune RT-DETR on any backbone of this package with transformers' Trainer, on a data set in COCO's format.

    python tools/make_shapes_dataset.py --out out/shapes
    python configs/transformers/rt_detr.py --data out/shapes --out out/rt_detr --weights out/train-demo/backbone.pth

The small model here is for the drawn shapes and a CPU; without --weights its backbone starts from scratch. For real
work take a published checkpoint:

    RTDetrForObjectDetection.from_pretrained("PekingU/rtdetr_r50vd", config=...)

with the checkpoint's own configuration and ``backbone_config`` as below.
Needs: pip install 'backbone[train,transformers]' accelerate
"""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from pycocotools.coco import COCO
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from transformers import (
    RTDetrConfig,
    RTDetrForObjectDetection,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from backbone import load_weights
from backbone.hosts.transformers import TransformersBackboneConfig
from backbone.training.coco.metrics import CocoMetrics

BACKBONE: dict[str, Any] = {"name": "resnet18", "norm": "bn"}
DETECTOR: dict[str, Any] = {
    "encoder_hidden_dim": 64,
    "encoder_ffn_dim": 128,
    "encoder_in_channels": [64, 128, 256],
    "feat_strides": [4, 8, 16],  # the images are small
    "encoder_attention_heads": 4,
    "d_model": 64,
    "decoder_in_channels": [64, 64, 64],
    "decoder_ffn_dim": 128,
    "decoder_attention_heads": 4,
    "decoder_layers": 3,
    "hidden_expansion": 0.5,
    "num_queries": 30,
    "num_denoising": 20,
    "freeze_backbone_batch_norms": False,
}


class Shapes(torch.utils.data.Dataset[dict[str, Any]]):
    """Images and targets as RT-DETR takes them: boxes as centre, width and height in units of the image.

    Args:
        root: The data set's folder.
        split: ``train`` or ``val``.
    """

    def __init__(self, root: Path, split: str) -> None:
        self.folder, self.train = root / split, split == "train"
        self.coco = COCO(str(root / "annotations" / f"{split}.json"))
        self.ids = sorted(self.coco.imgs)
        self.names = {number: each["name"] for number, (_, each) in enumerate(sorted(self.coco.cats.items()))}
        self.labels = {category: label for label, category in enumerate(sorted(self.coco.cats))}

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return pixels (3, H, W) of 0 to 1, and labels."""
        image_id = self.ids[index]
        with Image.open(self.folder / self.coco.imgs[image_id]["file_name"]) as file:
            pixels = F.to_dtype(F.pil_to_tensor(file.convert("RGB")), torch.float32, scale=True)
        height, width = pixels.shape[-2:]
        found = self.coco.imgToAnns[image_id]
        corner, size = torch.tensor([each["bbox"] for each in found]).reshape(-1, 4).tensor_split(2, dim=1)
        boxes = torch.cat([corner + size / 2, size], 1) / torch.tensor([width, height, width, height])
        if self.train and torch.rand(()) < 0.5:  # noqa: PLR2004 - a coin
            pixels, boxes = pixels.flip(-1), torch.cat([1 - boxes[:, :1], boxes[:, 1:]], 1)
        labels = torch.tensor([self.labels[each["category_id"]] for each in found], dtype=torch.long)
        return {"pixel_values": pixels, "labels": {"class_labels": labels, "boxes": boxes}}


class Clock(TrainerCallback):
    """Ends training after so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ANN401
        """Stop when time is up."""
        control.should_training_stop |= time.monotonic() > self.end


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a batch; the images of one data set have one size."""
    pixels = torch.stack([sample["pixel_values"] for sample in samples])
    return {"pixel_values": pixels, "labels": [sample["labels"] for sample in samples]}


def build(num_classes: int, weights: str | None = None) -> RTDetrForObjectDetection:
    """Return the detector; but for its backbone's ``weights`` it is untrained."""
    body = TransformersBackboneConfig(BACKBONE, out_features=["stage1", "stage2", "stage3"])
    settings: dict[str, Any] = {"backbone_config": body, "num_labels": num_classes, **DETECTOR}
    model = RTDetrForObjectDetection(RTDetrConfig(**settings))
    if weights:
        load_weights(model, weights)
    return model


@torch.no_grad()
def evaluate(model: RTDetrForObjectDetection, data: Shapes) -> dict[str, float]:
    """Return COCO's AP, AP50 and AP75."""
    metrics = CocoMetrics(data.coco, {label + 1: name for label, name in data.names.items()}, "retinanet")
    model.train(False)
    for index, image_id in enumerate(data.ids):
        pixels: Tensor = data[index]["pixel_values"]
        answer = model(pixels[None].to(model.device))
        scores, places = answer.logits[0].sigmoid().flatten().topk(DETECTOR["num_queries"])
        centre, size = answer.pred_boxes[0][places // len(data.names)].tensor_split(2, dim=1)
        scale = torch.tensor([pixels.shape[-1], pixels.shape[-2]] * 2, device=model.device)
        boxes = torch.cat([centre - size / 2, centre + size / 2], 1) * scale
        metrics.add(image_id, {"boxes": boxes, "labels": places % len(data.names) + 1, "scores": scores})
    return {name: value for name, value in metrics.compute().items() if "/" not in name}


def main(
    data: Annotated[Path, typer.Option(help="Folder with train, val and annotations.")],
    out: Annotated[Path, typer.Option(help="Folder for the trained model.")],
    weights: Annotated[str | None, typer.Option(help="Weights of the backbone, as in a recipe.")] = None,
    steps: Annotated[int, typer.Option(help="Training steps at most.")] = 3000,
    minutes: Annotated[float, typer.Option(help="Minutes at most.")] = 20.0,
    batch_size: int = 8,
    learning_rate: float = 5e-4,
) -> None:
    """Train, measure and save."""
    torch.manual_seed(0)
    train, val = Shapes(data, "train"), Shapes(data, "val")
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=100,
        weight_decay=1e-4,
        max_grad_norm=0.1,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    model = build(len(train.names), weights)
    trainer = Trainer(model, arguments, collate, train, callbacks=[Clock(60 * minutes)])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trainer.save_model(str(out))
    result = {"steps": trainer.state.global_step, "loss": [*losses[:1], *losses[-1:]], **evaluate(model, val)}
    (out / "result.json").write_text(json.dumps(result, indent=2))
    typer.echo(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
