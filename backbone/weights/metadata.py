"""How weights were trained, as far as it is known, and whether that fits the network they are loaded into."""

import json
import warnings
from dataclasses import asdict, dataclass
from typing import Any, Final

from torch import nn

from backbone.features import Backbone, Preprocessing
from backbone.providers.resnet.blocks import Bottleneck

HEADER_KEY: Final = "backbone_metadata"
"""Where our own files carry their metadata, as JSON."""

SAME: Final = "same"
"""TensorFlow's padding: what a stride leaves over is split, and the odd pixel goes to the right and the bottom."""

BGR_255: Final = Preprocessing((103.53, 116.28, 123.675), (1.0, 1.0, 1.0), "bgr", (0.0, 255.0))
"""What MSRA's and Caffe2's ResNets expect, and so detectron2's and mmdetection's ``caffe`` style by default."""


@dataclass(frozen=True)
class Metadata:
    """What a checkpoint's training decided and its tensors do not show; None where nothing is known.

    Attributes:
        origin: By what all this is known, for reports.
        known: Whether the checkpoint or its publisher says so; if not it is the format's convention, an assumption.
        preprocessing: How images must be prepared.
        stride_in_1x1: Whether bottlenecks stride in the first 1x1 (v1) rather than the 3x3 (v1.5).
        eps: Of the batch norms.
        dilate_first_block: Dilation convention of a network that was trained dilated, see ``plan_stages``.
        padding: ``same`` where strided convolutions pad as TensorFlow does, by the image's size and more at its end.
        network: Registered name of the network, where its tensors alone may not tell.
    """

    origin: str
    known: bool = False
    preprocessing: Preprocessing | None = None
    stride_in_1x1: bool | None = None
    eps: float | None = None
    dilate_first_block: bool | None = None
    padding: str | None = None
    network: str | None = None

    def to_json(self) -> str:
        """Return it for a file's header."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Metadata":
        """Read what ``to_json`` wrote.

        Raises:
            ValueError: If it is anything else.
        """
        kinds: dict[str, Any] = {
            "origin": str,
            "known": bool,
            "stride_in_1x1": bool,
            "eps": float,
            "dilate_first_block": bool,
            "padding": str,
            "network": str,
        }
        try:
            fields = {"padding": None, "network": None, **json.loads(text)}  # absent from our first files
            if not all(fields[name] is None or type(fields[name]) is kind for name, kind in kinds.items()):
                raise TypeError
            pixels = fields.pop("preprocessing")
            if pixels is not None:
                mean, std, (low, high) = (tuple(map(float, pixels[name])) for name in ("mean", "std", "value_range"))
                order = {"rgb": "rgb", "bgr": "bgr"}[pixels["channel_order"]]
                interpolation = str(pixels.get("interpolation", "bilinear"))  # absent from our first files
                pixels = Preprocessing(mean, std, order, (low, high), interpolation)  # type: ignore[arg-type]
            return cls(**fields, preprocessing=pixels)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
            raise ValueError(
                f"its {HEADER_KEY!r} header must be what `backbone convert` writes, got {text[:80]!r}"
            ) from None

    def lines(self) -> list[str]:
        """Return one readable line for each thing that is known or assumed."""
        found = []
        if self.stride_in_1x1 is not None:
            found.append(f"stride in the {'1x1 (v1)' if self.stride_in_1x1 else '3x3 (v1.5)'}")
        if self.preprocessing is not None:
            found.append(f"images {describe(self.preprocessing)}")
        if self.eps is not None:
            found.append(f"eps {self.eps:g} in the norms")
        if self.dilate_first_block is not None:
            found.append(f"dilated, {'new' if self.dilate_first_block else 'previous'} dilation in the first block")
        if self.padding is not None:
            found.append(
                f"padding {self.padding!r}, TensorFlow's" if self.padding == SAME else f"padding {self.padding!r}"
            )
        return [f"{line} ({'known' if self.known else 'assumed'}: {self.origin})" for line in found]


def describe(preprocessing: Preprocessing) -> str:
    """Return the pixel order, range and normalisation in words."""
    low, high = preprocessing.value_range
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (preprocessing.mean, preprocessing.std))
    return f"{preprocessing.channel_order.upper()}, {low:g} to {high:g}, mean ({mean}), std ({std})"


def cross_check(backbone: Backbone, metadata: Metadata, source: str) -> None:
    """Hold what is known of the weights against the network.

    Raises:
        ValueError: If something known contradicts it; something assumed warns.
    """
    _check_padding(backbone, metadata, source)
    pairs = {
        "stride_in_1x1": (metadata.stride_in_1x1, _stride_in_1x1(backbone)),
        "dilate_first_block": (metadata.dilate_first_block, _dilates_first_block(backbone)),
    }
    for key, (weights, network) in pairs.items():
        if weights is None or network is None or weights == network:
            continue
        message = (
            f"{source}: its weights have {key}: {_yaml(weights)} ({'known' if metadata.known else 'assumed'}: "
            f"{metadata.origin}), this network has {key}: {_yaml(network)}; they fit, and give other features than "
            f"they were trained to: set {key}: {_yaml(weights)}"
        )
        if metadata.known:
            raise ValueError(message)
        warnings.warn(message + ", or ignore this if you know better", stacklevel=4)


def _check_padding(backbone: Backbone, metadata: Metadata, source: str) -> None:
    """Warn, or raise where it is known, that a network pads otherwise than its weights were trained to."""
    strided = [m for m in backbone.modules() if isinstance(m, nn.Conv2d) and m.kernel_size[0] > 1 and m.stride[0] > 1]
    # timm's Conv2dSame computes its padding in every call; it is known by name, for timm may be absent
    if metadata.padding != SAME or not strided or any(type(m).__name__ == "Conv2dSame" for m in strided):
        return
    message = (
        f"{source}: its weights have padding {SAME!r}, TensorFlow's ({'known' if metadata.known else 'assumed'}: "
        f"{metadata.origin}), this network pads both sides alike; they fit, and give other features than they were "
        f"trained to: take {metadata.network or 'the tf_ network of that name'}"
    )
    if metadata.known:
        raise ValueError(message)
    warnings.warn(message + ", or ignore this if you know better", stacklevel=5)


def warn_of_bgr(preprocessing: Preprocessing, before: Preprocessing, source: str) -> None:
    """Warn that weights expect BGR where a pipeline fed RGB, and name the two ways out."""
    if (preprocessing.channel_order, before.channel_order) == ("bgr", "rgb"):
        warnings.warn(
            f"{source}: its weights expect images {describe(preprocessing)}; the network expected {describe(before)}. "
            f"Set stem_channels_from: [2, 1, 0] to go on in RGB, or [0, 1, 2] to feed BGR; either way prepare images "
            f"by the network's `preprocessing`",
            stacklevel=4,
        )


def set_eps(backbone: Backbone, eps: float | None) -> list[str]:
    """Give every batch norm ``eps``; return a sentence if that changed any."""
    norms = [m for m in backbone.modules() if eps is not None and hasattr(m, "running_var") and m.eps != eps]
    before = {norm.eps for norm in norms}
    for norm in norms:
        norm.eps = eps  # type: ignore[assignment]
    return [f"eps of {len(norms)} norms from {', '.join(map(str, sorted(before)))} to {eps}"] if norms else []  # type: ignore[type-var]


def _yaml(value: bool) -> str:
    return str(value).lower()


def _stride_in_1x1(backbone: Backbone) -> bool | None:
    """Whether the first 1x1 of a bottleneck that strides does so; None where none strides."""
    blocks = [block for block in backbone.modules() if isinstance(block, Bottleneck) and block.downsample is not None]
    striding = [block for block in blocks if any(_stride(module) > 1 for module in block.downsample or ())]
    return _stride(striding[0].conv1) > 1 if striding else None


def _stride(module: nn.Module) -> int:
    if isinstance(module, nn.AvgPool2d):  # of a ResNet-D, whose shortcut strides there
        return module.stride if isinstance(module.stride, int) else module.stride[0]
    return module.stride[0] if isinstance(module, nn.Conv2d) else 1


def _dilates_first_block(backbone: Backbone) -> bool | None:
    """Whether a dilated stage's first block has its other blocks' dilation; None where no stage dilates."""
    for stage in backbone.stages.values():
        dilations = [m.dilation[0] for m in stage.modules() if isinstance(m, nn.Conv2d) and m.kernel_size[0] > 1]
        if dilations and dilations[-1] > 1 and len(set(dilations[-2:])) == 1:  # of a multi-grid nothing is known
            return dilations[0] == dilations[-1]
    return None
