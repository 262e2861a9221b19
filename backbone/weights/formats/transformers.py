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
