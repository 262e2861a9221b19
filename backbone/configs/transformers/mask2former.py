"""Fine-tune Mask2Former on any backbone of this package with transformers' Trainer, on a data set in COCO's format.

    python tools/make_shapes_dataset.py --out out/shapes
    python configs/transformers/mask2former.py --data out/shapes --out out/mask2former

The small model here is for the drawn shapes, from scratch and on a CPU; ``--weights IMAGENET1K_V2`` starts from those
and freezes as the paper does (arXiv:2112.01527). For real work take a published checkpoint:

    Mask2FormerForUniversalSegmentation.from_pretrained("facebook/mask2former-swin-tiny-coco-instance", config=...)

with the checkpoint's own configuration and ``backbone_config`` as below. ``--steps 0`` writes the model untrained, as a
folder that transformers' example scripts take; add ``import backbone.hosts.transformers`` to them.
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
from torchvision.ops import masks_to_boxes
from torchvision.transforms.v2 import functional as F
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from backbone.hosts.transformers import TransformersBackboneConfig, find_backbone
from backbone.training.coco.metrics import CocoMetrics

BACKBONE: dict[str, Any] = {"name": "resnet18", "norm": "bn"}  # from scratch
WITH_WEIGHTS: dict[str, Any] = {"norm": "frozen_bn", "freeze_at": 2}  # the paper's
STAGES = ["stage1", "stage2", "stage3", "stage4"]
SEGMENTER: dict[str, Any] = {
    "feature_size": 64,
    "mask_feature_size": 64,
    "hidden_dim": 64,
    "encoder_feedforward_dim": 128,
    "encoder_layers": 2,
    "decoder_layers": 4,
    "num_attention_heads": 4,
    "dim_feedforward": 128,
    "num_queries": 20,
    "train_num_points": 1024,
}


class Shapes(torch.utils.data.Dataset[dict[str, Any]]):
    """Images and the mask of each object, as Mask2Former takes them.

    Args:
        root: The data set's folder.
        split: ``train`` or ``val``.
        mean: Subtracted from pixels of 0 to 1, by channel.
        std: Then divides them.
    """

    def __init__(self, root: Path, split: str, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.folder, self.train = root / split, split == "train"
        self.coco = COCO(str(root / "annotations" / f"{split}.json"))
        self.ids = sorted(self.coco.imgs)
        self.names = {number: each["name"] for number, (_, each) in enumerate(sorted(self.coco.cats.items()))}
        self.labels = {category: label for label, category in enumerate(sorted(self.coco.cats))}
        self.mean, self.std = list(mean), list(std)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return pixels (3, H, W), masks (objects, H, W) of 0 and 1, and labels (objects,)."""
        image_id = self.ids[index]
        with Image.open(self.folder / self.coco.imgs[image_id]["file_name"]) as file:
            pixels = F.to_dtype(F.pil_to_tensor(file.convert("RGB")), torch.float32, scale=True)
        found = [each for each in self.coco.imgToAnns[image_id] if not each.get("iscrowd")]
        masks = torch.zeros(len(found), *pixels.shape[-2:])
        for mask, each in zip(masks, found, strict=True):
            mask.copy_(torch.from_numpy(self.coco.annToMask(each)))
        if self.train and torch.rand(()) < 0.5:  # noqa: PLR2004 - a coin
            pixels, masks = pixels.flip(-1), masks.flip(-1)
        labels = torch.tensor([self.labels[each["category_id"]] for each in found], dtype=torch.long)
        pixels = F.normalize(pixels, self.mean, self.std)
        return {"pixel_values": pixels, "mask_labels": masks, "class_labels": labels}


class Clock(TrainerCallback):
    """Ends training after so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ANN401
        """Stop when time is up."""
        control.should_training_stop |= time.monotonic() > self.end


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a batch; the images of one data set have one size."""
    lists = {key: [sample[key] for sample in samples] for key in ("mask_labels", "class_labels")}
    return {"pixel_values": torch.stack([sample["pixel_values"] for sample in samples]), **lists}


def build(num_classes: int, weights: str | None = None) -> Mask2FormerForUniversalSegmentation:
    """Return the segmenter, untrained but for the backbone's ``weights``.

    Args:
        num_classes: Classes of things.
        weights: What ``weights:`` takes in a backbone's YAML; None starts from scratch.
    """
    keys = BACKBONE if weights is None else {**BACKBONE, **WITH_WEIGHTS, "weights": weights}
    body = TransformersBackboneConfig(keys, out_features=STAGES)
    settings: dict[str, Any] = {"backbone_config": body, "num_labels": num_classes, **SEGMENTER}
    return Mask2FormerForUniversalSegmentation(Mask2FormerConfig(**settings))


def instances(classes: Tensor, masks: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
    """Return what the queries found in one image, best first, as torchvision's detectors do.

    Args:
        classes: Logits (queries, classes + 1), the last one for no object.
        masks: Logits (queries, H / 4, W / 4).
        size: Height and width of the image, in pixels.

    Returns:
        boxes (N, 4), labels (N,) from 1, scores (N,), masks (N, 1, H, W) of 0 and 1.
    """
    scores, labels = classes.softmax(-1)[:, :-1].max(-1)
    likely = F.resize(masks.sigmoid(), list(size))
    binary = (likely > 0.5).float()  # noqa: PLR2004 - as likely as not
    area = binary.sum((1, 2))
    scores = scores * (likely * binary).sum((1, 2)) / area.clamp(min=1)  # how sure it is of the mask, too
    order = scores.argsort(descending=True)
    order = order[area[order] > 0]
    found = {"labels": labels[order] + 1, "scores": scores[order], "masks": binary[order][:, None]}
    return {**found, "boxes": masks_to_boxes(binary[order])}


@torch.no_grad()
def evaluate(model: Mask2FormerForUniversalSegmentation, data: Shapes) -> dict[str, float]:
    """Return COCO's AP, AP50 and AP75 of boxes and, under ``segm/``, of masks."""
    metrics = CocoMetrics(data.coco, {label + 1: name for label, name in data.names.items()}, "mask_rcnn")
    model.train(False)
    for index, image_id in enumerate(data.ids):
        pixels: Tensor = data[index]["pixel_values"]
        answer: Any = model(pixels[None].to(model.device))
        size = (pixels.shape[-2], pixels.shape[-1])
        metrics.add(image_id, instances(answer.class_queries_logits[0], answer.masks_queries_logits[0], size))
    return {name: value for name, value in metrics.compute().items() if "AP/" not in name}


def main(
    data: Annotated[Path, typer.Option(help="Folder with train, val and annotations.")],
    out: Annotated[Path, typer.Option(help="Folder for the trained model.")],
    weights: Annotated[str | None, typer.Option(help="The backbone's weights, as in its YAML.")] = None,
    steps: Annotated[int, typer.Option(help="Training steps at most; 0 writes the model untrained.")] = 2000,
    minutes: Annotated[float, typer.Option(help="Minutes at most.")] = 20.0,
    batch_size: int = 8,
    learning_rate: float = 5e-4,
) -> None:
    """Train, measure and save."""
    torch.manual_seed(0)
    annotations = COCO(str(data / "annotations" / "train.json"))
    model = build(len(annotations.cats), weights)
    if steps == 0:
        model.save_pretrained(out)
        return
    mean, std = find_backbone(model).network.preprocessing.unit_statistics(3)
    train, val = (Shapes(data, split, mean, std) for split in ("train", "val"))
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(100, steps // 10),
        weight_decay=0.05,
        max_grad_norm=0.1,
        logging_steps=min(50, steps),
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, collate, train, callbacks=[Clock(60 * minutes)])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trainer.save_model(str(out))
    result = {"steps": trainer.state.global_step, "loss": [*losses[:1], *losses[-1:]], **evaluate(model, val)}
    (out / "result.json").write_text(json.dumps(result, indent=2))
    typer.echo(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
