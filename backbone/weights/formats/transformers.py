"""transformers: ResNetModel, ResNetBackbone and ResNetForImageClassification."""

import json
from pathlib import Path
from typing import Final

from backbone.features import Preprocessing
from backbone.weights.metadata import Metadata
from backbone.weights.reading import Checkpoint
from backbone.weights.schemes import Format, KeyScheme, State

_LAYER: Final = "encoder.stages.{stage}.layers.{block}"
NAMES: Final = KeyScheme(
    rows=(
        ("conv1.weight", "embedder.embedder.convolution.weight"),
        ("bn1.{norm}", "embedder.embedder.normalization.{norm}"),
        ("layer{stage}.{block}.conv{conv}.weight", _LAYER + ".layer.{conv}.convolution.weight"),
        ("layer{stage}.{block}.bn{conv}.{norm}", _LAYER + ".layer.{conv}.normalization.{norm}"),
        ("layer{stage}.{block}.downsample.0.weight", _LAYER + ".shortcut.convolution.weight"),
        ("layer{stage}.{block}.downsample.1.{norm}", _LAYER + ".shortcut.normalization.{norm}"),
    ),
    words={"stage": ("0", "1", "2", "3"), "conv": ("0", "1", "2")},
)

RT_DETR_NAMES: Final = KeyScheme(
    rows=(
        ("conv1.0.weight", "embedder.embedder.0.convolution.weight"),
        ("conv1.1.{norm}", "embedder.embedder.0.normalization.{norm}"),
        ("conv1.3.weight", "embedder.embedder.1.convolution.weight"),
        ("conv1.4.{norm}", "embedder.embedder.1.normalization.{norm}"),
        ("conv1.6.weight", "embedder.embedder.2.convolution.weight"),
        ("bn1.{norm}", "embedder.embedder.2.normalization.{norm}"),
        ("layer{stage}.{block}.conv{conv}.weight", _LAYER + ".layer.{conv}.convolution.weight"),
        ("layer{stage}.{block}.bn{conv}.{norm}", _LAYER + ".layer.{conv}.normalization.{norm}"),
        # the first stage pools nothing, so its shortcut is no sequence
        ("layer1.{block}.downsample.1.weight", "encoder.stages.0.layers.{block}.shortcut.convolution.weight"),
        ("layer1.{block}.downsample.2.{norm}", "encoder.stages.0.layers.{block}.shortcut.normalization.{norm}"),
        ("layer{stage}.{block}.downsample.1.weight", _LAYER + ".shortcut.1.convolution.weight"),
        ("layer{stage}.{block}.downsample.2.{norm}", _LAYER + ".shortcut.1.normalization.{norm}"),
    ),
    words=NAMES.words,
)
"""RTDetrResNet: a ResNet-D, under timm's names here."""


def _metadata(checkpoint: Checkpoint, state: State) -> Metadata:
    config = Path(checkpoint.source).with_name("config.json")  # save_pretrained writes it beside model.safetensors
    try:
        v1 = json.loads(config.read_bytes())["downsample_in_bottleneck"]
    except (OSError, ValueError, KeyError, TypeError):
        return Metadata("transformers' defaults", preprocessing=Preprocessing(), stride_in_1x1=False)
    origin = f"downsample_in_bottleneck in the {config.name} beside it"
    bottlenecks = "layer1.0.conv3.weight" in state
    return Metadata(origin, True, Preprocessing(), stride_in_1x1=bool(v1) if bottlenecks else None)


TRANSFORMERS: Final = Format(
    "transformers",
    NAMES,
    lambda checkpoint, prefix: "its names, such as encoder.stages.0.layers.0.layer.0.convolution.weight",
    _metadata,
    beside=("classifier.1.", "fc."),
)
