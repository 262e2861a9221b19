"""Mask2Former on a backbone of this package, written as a folder that ``from_pretrained`` takes.

    python configs/transformers/mask2former.py --out out/mask2former --weights IMAGENET1K_V2 --num-classes 80

Train it by transformers' examples/pytorch/instance-segmentation/run_instance_segmentation.py with
``--model_name_or_path out/mask2former``, adding ``import backbone.hosts.transformers`` to the script.
Needs: pip install 'backbone[transformers]'
"""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

from backbone.hosts.transformers import TransformersBackboneConfig

BACKBONE: dict[str, Any] = {"name": "resnet50", "norm": "frozen_bn", "freeze_at": 2}  # the paper's, arXiv:2112.01527
STAGES = ["stage1", "stage2", "stage3", "stage4"]


def build(num_classes: int, **keys: object) -> Mask2FormerForUniversalSegmentation:
    """Return the segmenter, untrained but for the backbone's weights.

    Args:
        num_classes: Classes of things.
        keys: Keys of the backbone besides those of ``BACKBONE``, or in place of them.
    """
    body = TransformersBackboneConfig({**BACKBONE, **keys}, out_features=STAGES)
    settings: dict[str, Any] = {"backbone_config": body, "num_labels": num_classes}
    return Mask2FormerForUniversalSegmentation(Mask2FormerConfig(**settings))


def main(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    weights: Annotated[str, typer.Option(help="The backbone's weights, as in its YAML.")] = "IMAGENET1K_V2",
    num_classes: Annotated[int, typer.Option(help="Classes of things.")] = 80,
) -> None:
    """Write the model."""
    torch.manual_seed(0)
    build(num_classes, weights=weights).save_pretrained(out)


if __name__ == "__main__":
    typer.run(main)
