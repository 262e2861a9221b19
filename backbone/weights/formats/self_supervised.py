"""MoCo, DINO, SwAV and their like: a torchvision ResNet beside its twin, a queue and projection heads."""

import re
from typing import Final

from backbone.features import Preprocessing
from backbone.weights.formats.torchvision import NAMES
from backbone.weights.metadata import Metadata
from backbone.weights.reading import Checkpoint
from backbone.weights.schemes import Format, State

HEADS: Final = {r"(projection_head|prototypes|projector|predictor)\..*|fc\.[0-9]\..*": "projection head"}

_SIGNS: Final = {
    r"(^|\.)(encoder_q|encoder_k|base_encoder|momentum_encoder)\.$": "MoCo",
    r"(^|\.)(teacher|student)\.": "DINO",
    r"(^|\.)(online_encoder|target_encoder)\.": "BYOL",
}


def _sign(checkpoint: Checkpoint, prefix: str) -> str | None:
    for pattern, method in _SIGNS.items():
        if re.search(pattern, prefix):
            return f"torchvision's names under {method}'s {prefix}"
    heads = [key for key in checkpoint.tensors if re.fullmatch(re.escape(prefix) + f"({next(iter(HEADS))})", key)]
    return f"torchvision's names beside {heads[0]}" if heads else None


def _metadata(checkpoint: Checkpoint, state: State) -> Metadata:
    return Metadata("built on torchvision's ResNet", preprocessing=Preprocessing(), stride_in_1x1=False)


SELF_SUPERVISED: Final = Format("self-supervised", NAMES, _sign, _metadata, heads=HEADS)
