"""Tiny detectors and segmenters of transformers, each around any backbone, with images and labels for a loss."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

SIZE = 64
BOXES = torch.tensor([[0.4, 0.4, 0.3, 0.5], [0.7, 0.6, 0.2, 0.2]])
CLASSES = torch.tensor([1, 2])

DETR: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "num_queries": 5,
    "num_labels": 3,
    "dropout": 0.0,
}
RT_DETR: dict[str, Any] = {
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [128, 256, 512],
    "encoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "d_model": 32,
    "decoder_in_channels": [32, 32, 32],
    "decoder_ffn_dim": 32,
    "decoder_attention_heads": 2,
    "decoder_layers": 2,
    "num_queries": 5,
    "num_denoising": 2,
    "num_labels": 3,
    "hidden_expansion": 1.0,
}
MASKS: dict[str, Any] = {"num_labels": 3, "num_queries": 5, "dropout": 0.0}
RESNET_18: dict[str, Any] = {"depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512], "layer_type": "basic"}
LAST = ["stage4"]
THREE = ["stage2", "stage3", "stage4"]
FOUR = ["stage1", "stage2", "stage3", "stage4"]


@dataclass(frozen=True)
class Detector:
    """A class of transformers.

    Attributes:
        model: Its name.
        config: Its configuration's name.
        features: Stages it reads.
        settings: What makes it tiny.
        frozen: Whether it replaces the backbone's batch norms by a frozen class of its own.
        labels: What its loss wants.
        in_single: Whether its loss computes in float32 whatever the model does.
    """

    model: str
    config: str
    features: list[str]
    settings: dict[str, Any]
    frozen: bool
    labels: Callable[[], dict[str, Any]]
    in_single: bool = False

    def make_config(self, body: Any) -> Any:
        return getattr(transformers, self.config)(backbone_config=body, **self.settings)

    def make(self, body: Any) -> Any:
        return getattr(transformers, self.model)(self.make_config(body))

    @property
    def model_class(self) -> Any:
        return getattr(transformers, self.model)

    @property
    def norm(self) -> str:
        return "frozen_bn" if self.frozen else "bn"


def images() -> Tensor:
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def boxes() -> dict[str, Any]:
    return {"labels": [{"class_labels": CLASSES, "boxes": BOXES.to(torch.get_default_dtype())} for _ in range(2)]}


def _masks() -> Tensor:
    masks = torch.zeros(2, SIZE, SIZE, dtype=torch.get_default_dtype())
    masks[0, 10:40, 10:30] = masks[1, 30:60, 35:60] = 1
    return masks


def masks() -> dict[str, Any]:
    return {"mask_labels": [_masks()] * 2, "class_labels": [CLASSES] * 2}


def tasks() -> dict[str, Any]:
    text = torch.randint(0, 50, (2, 3, 8), generator=torch.Generator().manual_seed(1))
    return {
        **masks(),
        "task_inputs": torch.randint(0, 50, (2, 8), generator=torch.Generator().manual_seed(2)),
        "text_inputs": text,
    }


def segmentation() -> dict[str, Any]:
    return {"labels": torch.randint(0, 3, (2, SIZE, SIZE), generator=torch.Generator().manual_seed(1))}


DETECTORS = {
    "detr": Detector("DetrForObjectDetection", "DetrConfig", LAST, DETR, True, boxes),
    "conditional_detr": Detector("ConditionalDetrForObjectDetection", "ConditionalDetrConfig", LAST, DETR, True, boxes),
    "deformable_detr": Detector(
        "DeformableDetrForObjectDetection",
        "DeformableDetrConfig",
        THREE,
        {**DETR, "decoder_layers": 2, "num_feature_levels": 3},
        True,
        boxes,
    ),
    "dab_detr": Detector(
        "DabDetrForObjectDetection",
        "DabDetrConfig",
        LAST,
        {**{k: v for k, v in DETR.items() if k != "d_model"}, "hidden_size": 32},
        True,
        boxes,
    ),
    "table_transformer": Detector(
        "TableTransformerForObjectDetection", "TableTransformerConfig", LAST, DETR, True, boxes
    ),
    "rt_detr": Detector("RTDetrForObjectDetection", "RTDetrConfig", THREE, RT_DETR, True, boxes),
    "rt_detr_v2": Detector("RTDetrV2ForObjectDetection", "RTDetrV2Config", THREE, RT_DETR, True, boxes),
    "d_fine": Detector("DFineForObjectDetection", "DFineConfig", THREE, RT_DETR, True, boxes, True),
    "mask2former": Detector(
        "Mask2FormerForUniversalSegmentation",
        "Mask2FormerConfig",
        FOUR,
        {
            **MASKS,
            "feature_size": 32,
            "mask_feature_size": 32,
            "hidden_dim": 32,
            "encoder_feedforward_dim": 32,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "num_attention_heads": 2,
            "dim_feedforward": 32,
            "train_num_points": 64,
        },
        False,
        masks,
    ),
    "maskformer": Detector(
        "MaskFormerForInstanceSegmentation",
        "MaskFormerConfig",
        FOUR,
        {
            "num_labels": 3,
            "fpn_feature_size": 32,
            "mask_feature_size": 32,
            "decoder_config": transformers.MaskFormerDetrConfig(**DETR),
        },
        False,
        masks,
    ),
    "oneformer": Detector(
        "OneFormerForUniversalSegmentation",
        "OneFormerConfig",
        FOUR,
        {
            "num_labels": 3,
            "num_queries": 5,
            "dropout": 0.0,
            "hidden_dim": 64,
            "mask_dim": 64,
            "conv_dim": 64,
            "encoder_feedforward_dim": 32,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "num_attention_heads": 2,
            "dim_feedforward": 32,
            "train_num_points": 64,
            "is_training": True,
            "task_seq_len": 8,
            "text_encoder_width": 64,
            "text_encoder_context_length": 8,
            "text_encoder_num_layers": 1,
            "text_encoder_vocab_size": 50,
            "text_encoder_n_ctx": 2,
            "query_dec_layers": 1,
        },
        False,
        tasks,
        True,
    ),
    "upernet": Detector(
        "UperNetForSemanticSegmentation",
        "UperNetConfig",
        FOUR,
        {"num_labels": 3, "hidden_size": 32, "auxiliary_channels": 32, "auxiliary_in_channels": 256},
        False,
        segmentation,
    ),
}
