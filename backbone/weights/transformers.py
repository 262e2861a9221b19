"""transformers: ResNetModel, ResNetBackbone and ResNetForImageClassification."""

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


def _sign(checkpoint: Checkpoint, prefix: str) -> str:
    return "its names, such as encoder.stages.0.layers.0.layer.0.convolution.weight"


def _metadata(checkpoint: Checkpoint, state: State) -> Metadata:
    # v1.5 unless the model's config.json has downsample_in_bottleneck: true
    return Metadata("transformers' defaults", preprocessing=Preprocessing(), stride_in_1x1=False)


TRANSFORMERS: Final = Format("transformers", NAMES, _sign, _metadata, beside=("classifier.1.", "fc."))
