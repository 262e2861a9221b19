"""What a file says of itself, as text by key: every format has room for that."""

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from backbone.export.affine import PixelAffine
from backbone.export.network import Network
from backbone.export.request import Request
from backbone.export.tracing import Traced
from backbone.features import Backbone, FeatureSpec

PREFIX = "backbone_"
"""Of every key, so that none is taken for another tool's."""


def describe(model: nn.Module, network: Network, traced: Traced, request: Request) -> dict[str, str]:
    """Return the metadata of a file; values that are not text are JSON."""
    facts: dict[str, Any] = {
        "version": _version(),
        "torch": torch.__version__,
        "model": type(model).__name__,
        "weights_sha256": weights_sha256(model),
        "dtype": request.dtype,
        "outputs": list(network.outputs),
        "levels": _levels(model),
        "image_size": request.image_size if network.resizes_to is None else None,
        "smallest_image": traced.smallest,
        "batch": request.batch,
        "class_names": list(request.class_names),
        "norms_folded": traced.folded,
        **_preprocessing(network),
    }
    return {PREFIX + key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()}


def _preprocessing(network: Network) -> dict[str, Any]:
    """Say what goes into the file, and what it does itself."""
    facts: dict[str, Any] = {
        "input": "uint8 0-255 RGB (batch, channels, height, width)"
        if network.takes_bytes
        else "float32 (batch, channels, height, width)",
        "preprocessing_inside": network.takes_bytes or network.detector is not None,
        "resizes_to": network.resizes_to,
    }
    if network.detector is not None:
        transform: Any = network.detector.transform
        affine = PixelAffine.of(transform.normalize, network.channels)
        facts |= {
            "input": facts["input"] if network.takes_bytes else "float32 0-1 RGB (batch, channels, height, width)",
            "mean": list(transform.image_mean),
            "std": list(transform.image_std),
            "value_range": (0.0, 1.0),
            "channel_order": "rgb" if affine.order == tuple(range(network.channels)) else "bgr",
            "min_size": transform.min_size[-1],
            "max_size": transform.max_size,
        }
    elif network.preprocessing is not None:
        known = network.preprocessing
        facts |= {
            "mean": known.mean,
            "std": known.std,
            "value_range": known.value_range,
            "channel_order": known.channel_order,
            "interpolation": known.interpolation,
        }
    return facts


def _levels(model: nn.Module) -> dict[str, dict[str, int]]:
    """Channels and stride of each feature map, of a backbone or of the one inside a detector."""
    backbone = model if isinstance(model, Backbone) else getattr(model, "backbone", None)
    specs: Mapping[str, FeatureSpec] = backbone.feature_specs if isinstance(backbone, Backbone) else {}
    return {name: {"channels": spec.channels, "stride": spec.stride} for name, spec in specs.items()}


def weights_sha256(model: nn.Module) -> str:
    """Return the digest of every tensor of the state dict with its name, dtype and shape, in the order of names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _version() -> str:
    try:
        return version("backbone")
    except PackageNotFoundError:
        return "unknown"
