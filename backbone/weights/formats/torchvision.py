"""torchvision: its names are ours. Classification, and the backbones of its detectors and segmenters."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch

from backbone.features import Preprocessing
from backbone.weights.metadata import Metadata
from backbone.weights.reading import CHECKPOINT_SUFFIXES, Checkpoint, flatten, unreadable
from backbone.weights.schemes import Format, KeyScheme, State

NAMES: Final = KeyScheme(
    rows=(
        ("conv1.weight", "conv1.weight"),
        ("bn1.{norm}", "bn1.{norm}"),
        ("layer{stage}.{block}.conv{conv}.weight", "layer{stage}.{block}.conv{conv}.weight"),
        ("layer{stage}.{block}.bn{conv}.{norm}", "layer{stage}.{block}.bn{conv}.{norm}"),
        ("layer{stage}.{block}.downsample.0.weight", "layer{stage}.{block}.downsample.0.weight"),
        ("layer{stage}.{block}.downsample.1.{norm}", "layer{stage}.{block}.downsample.1.{norm}"),
        ("fc.{linear}", "fc.{linear}"),
        # timm's of a ResNet-D, whose stem is a sequence and whose shortcuts begin with a pool
        ("conv1.{block}.{norm}", "conv1.{block}.{norm}"),
        ("layer{stage}.{block}.downsample.2.{norm}", "layer{stage}.{block}.downsample.2.{norm}"),
    )
)

EPS_0: Final = (
    "FasterRCNN_ResNet50_FPN_Weights.COCO_V1",
    "MaskRCNN_ResNet50_FPN_Weights.COCO_V1",
    "KeypointRCNN_ResNet50_FPN_Weights.COCO_V1",
    "RetinaNet_ResNet50_FPN_Weights.COCO_V1",
)
"""Detectors whose norms torchvision gives eps 0 after loading (``overwrite_eps``), and only these."""

SEGMENTERS: Final = ("DeepLabV3_", "FCN_")
"""Whose weights were trained dilated, and so in torchvision's convention; those of classification fit any."""


def _sign_of_detector(checkpoint: Checkpoint, prefix: str) -> str | None:
    return f"its names under {prefix}" if prefix.endswith(("backbone.body.", "backbone.0.body.")) else None


def _metadata(checkpoint: Checkpoint, state: State) -> Metadata:
    trained_dilated = any(key.startswith(("classifier.", "aux_classifier.")) for key in checkpoint.tensors)
    return Metadata(
        "torchvision's convention",
        preprocessing=Preprocessing(),
        stride_in_1x1=False,
        dilate_first_block=False if trained_dilated else None,
    )


def _metadata_of_detector(checkpoint: Checkpoint, state: State) -> Metadata:
    from torchvision.models import get_weight

    for weights in map(get_weight, EPS_0):
        if checkpoint.source.endswith(Path(weights.url).name):  # it ends in a hash that only this file has
            return _facts(weights)
    origin = "torchvision's convention; of its detectors COCO_V1 needs eps 0: give that name as the source"
    return replace(_metadata(checkpoint, state), origin=origin)


TORCHVISION: Final = Format(
    "torchvision", NAMES, lambda checkpoint, prefix: "its names, the layer1.0.conv1.weight of classification", _metadata
)
TORCHVISION_DETECTION: Final = Format("torchvision detection", NAMES, _sign_of_detector, _metadata_of_detector)


def download(name: str, weights_name: str) -> Checkpoint:
    """Return the weights that torchvision publishes under ``weights_name``.

    Args:
        name: A network of torchvision, whose weights a bare ``IMAGENET1K_V1`` means.
        weights_name: That, or the full name of any of its weights: ``RetinaNet_ResNet50_FPN_Weights.COCO_V1``.

    Raises:
        OSError: If the download fails.
        ValueError: If torchvision knows no such weights, or its file is damaged.
    """
    weights = _find(name, weights_name)
    cached = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    try:
        # weights_only: hub would run what a pickle carries, and it checks the hash of a new download only
        state = weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except Exception as error:
        if cached.exists():
            raise unreadable(error, f"{weights_name} of {name}, {cached}", "delete it and try again") from None
        kind = OSError if isinstance(error, OSError) else ValueError  # hub keeps no file of a wrong hash
        raise kind(
            f"{weights_name} of {name}: cannot be downloaded from {weights.url}; check the connection or give the path "
            f"of a copy. ({(str(error).strip() or type(error).__name__).splitlines()[0]})"
        ) from None
    checkpoint = flatten(state, str(cached))
    return Checkpoint(checkpoint.source, checkpoint.tensors, facts=_facts(weights))


def _find(name: str, weights_name: str) -> Any:  # noqa: ANN401 - torchvision has no type for it
    from torchvision.models import get_model_weights, get_weight

    if "_Weights." in weights_name:
        try:
            return get_weight(weights_name)
        except (ValueError, KeyError, AttributeError):
            pass
    try:
        known: Any = get_model_weights(name)
    except ValueError:
        known = {}
    choices = [weights.name for weights in known]
    if weights_name not in choices and weights_name not in getattr(known, "__members__", ()):  # its DEFAULT
        raise ValueError(
            f"weights of {name} must be one of {', '.join(choices) or 'no torchvision names'} or a path ending in "
            f"{', '.join(CHECKPOINT_SUFFIXES)}, got {weights_name!r}; or a full name such as {EPS_0[0]}, "
            f"timm/<model>, a URL ending in #sha256=<digest>, hf://org/repo/file, or package://<package>/<path>"
        )
    return known[weights_name]


def _facts(weights: Any) -> Metadata:  # noqa: ANN401
    transforms = weights.transforms()
    preprocessing = Preprocessing()  # detectors normalise inside, by ImageNet's values
    if hasattr(transforms, "mean"):
        preprocessing = Preprocessing(mean=tuple(transforms.mean), std=tuple(transforms.std))
    return Metadata(
        f"torchvision publishes it as {weights}",
        known=True,
        preprocessing=preprocessing,
        stride_in_1x1=False,
        eps=0.0 if str(weights) in EPS_0 else 1e-5,
        dilate_first_block=False if str(weights).startswith(SEGMENTERS) else None,
    )
