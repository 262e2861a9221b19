"""transformers: its ResNet, RT-DETR's ResNet-D, and timm's ResNets inside DETR and its kin."""

import json
from pathlib import Path
from typing import Any, Final

from backbone.features import Preprocessing
from backbone.weights.formats.torchvision import NAMES as TORCHVISION_NAMES
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
    config = _beside(checkpoint, "config.json")
    pixels = _pixels(checkpoint) or Preprocessing()
    v1 = config.get("backbone_config", config).get("downsample_in_bottleneck")  # a detector's holds its backbone's
    if v1 is None:
        return Metadata("transformers' defaults", preprocessing=pixels, stride_in_1x1=False)
    bottlenecks = "layer1.0.conv3.weight" in state
    return Metadata(
        "downsample_in_bottleneck in the config.json beside it", True, pixels, bool(v1) if bottlenecks else None
    )


def _metadata_of_rt_detr(checkpoint: Checkpoint, state: State) -> Metadata:
    assumed = Preprocessing(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))  # RTDetrImageProcessor scales, and no more
    return Metadata("RT-DETR's image processor", preprocessing=_pixels(checkpoint) or assumed, stride_in_1x1=False)


def _metadata_of_detr(checkpoint: Checkpoint, state: State) -> Metadata:
    return Metadata(
        "torchvision's convention", preprocessing=_pixels(checkpoint) or Preprocessing(), stride_in_1x1=False
    )


def _pixels(checkpoint: Checkpoint) -> Preprocessing | None:
    """Return what the image processor's configuration, saved beside the weights, says; None without it."""
    told = _beside(checkpoint, "preprocessor_config.json")
    try:
        if not told.get("do_normalize", bool(told)):
            return Preprocessing((0.0,) * 3, (1.0,) * 3) if told else None
        mean, std = (tuple(map(float, told[key])) for key in ("image_mean", "image_std"))
    except (KeyError, TypeError, ValueError):
        return None
    return Preprocessing(mean, std)


def _beside(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """Return a JSON file that save_pretrained writes beside model.safetensors; {} where there is none to read."""
    try:
        content = json.loads(Path(checkpoint.source).with_name(name).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _sign_of_detr(checkpoint: Checkpoint, prefix: str) -> str | None:
    return (
        f"timm's names under {prefix}"
        if prefix.endswith(("backbone.model.", "conv_encoder.model.", "_backbone."))
        else None
    )


TRANSFORMERS: Final = Format(
    "transformers",
    NAMES,
    lambda checkpoint, prefix: "its names, such as encoder.stages.0.layers.0.layer.0.convolution.weight",
    _metadata,
    beside=("classifier.1.", "fc."),
)
RT_DETR: Final = Format(
    "transformers RT-DETR",
    RT_DETR_NAMES,
    lambda checkpoint, prefix: "its names, such as embedder.embedder.0.convolution.weight",
    _metadata_of_rt_detr,
)
TRANSFORMERS_DETR: Final = Format("transformers DETR", TORCHVISION_NAMES, _sign_of_detr, _metadata_of_detr)
