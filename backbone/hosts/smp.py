"""segmentation_models_pytorch as a host: any backbone as the encoder of its segmenters. Importing this registers ours.

import backbone.hosts.smp  # "backbone-resnet50" and every other built-in name
model = segmentation_models_pytorch.Unet("backbone-resnet50", encoder_weights="IMAGENET1K_V2", classes=19)
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, Self

from torch import Tensor
from torchvision.models import get_model_weights

try:
    import segmentation_models_pytorch as _smp
    import segmentation_models_pytorch.encoders as their_encoders
    from segmentation_models_pytorch.encoders._base import EncoderMixin
except ModuleNotFoundError as error:
    if error.name != "segmentation_models_pytorch":
        raise
    raise ModuleNotFoundError(
        "backbone.hosts.smp needs segmentation_models_pytorch, which is not installed: pip install 'backbone[smp]'",
        name=error.name,
    ) from None

from backbone.builder import construct
from backbone.config import BackboneConfig
from backbone.features import Backbone
from backbone.freeze import freeze_stages
from backbone.hosts.transparent import TransparentWrapper
from backbone.initial import watch_initial_values
from backbone.norm import FrozenBatchNorm2d
from backbone.registry import BUILT_IN, list_backbones
from backbone.stages import C1_STRIDE, FEATURE_NAMES
from backbone.weights import load_weights

PREFIX: Final = "backbone-"
"""What comes before our names in SMP's table of encoders."""

DEFAULT_WEIGHTS: Final = "imagenet"
"""SMP's default for ``encoder_weights``: the weights of the config, or those that the network's library prefers."""

_THEIR_PREFIXES: Final = ("tu-", "timm-")  # SMP hands such names to timm before it looks into its table
_HUB_OWNER: Final = "backbone-plugin"  # no account of Hugging Face's: what is asked of it is answered here
_UNDILATED: Final = 32


def register_encoder(name: str, config: BackboneConfig) -> None:
    """Let SMP build the backbone of ``config`` where ``encoder_name`` is ``name``.

    The architecture chooses the features (``encoder_depth``) and the output stride; a dilated stage dilates in all its
    blocks, as in SMP, timm's models apart, which keep timm's convention. ``encoder_weights=None`` leaves the weights
    that the config names, ``"imagenet"`` means them or else the default of the network's library; anything else
    that ``BackboneConfig.weights`` takes replaces them. Registering the same twice changes nothing.

    Args:
        name: The new name, such as ``convnext``.
        config: What to build; ``freeze_at`` and ``norm`` hold until SMP's ``freeze_encoder`` and ours change it.

    Raises:
        ValueError: If the name is taken or SMP's own, or the config sets what the architecture chooses.
    """
    known = their_encoders.encoders.get(name)
    if known is not None and known["params"].get("config") != config:
        raise ValueError(f"encoder {name!r} is registered already, with another network; choose another name")
    if name.startswith(_THEIR_PREFIXES):
        raise ValueError(f"an encoder's name must not begin with {' or '.join(_THEIR_PREFIXES)}, which SMP gives to "
                         f"timm's own models, got {name!r}; choose another name")  # fmt: skip
    for key in ("output_stride", "out_features", "num_classes"):
        usual = BackboneConfig.model_fields[key].default
        if getattr(config, key) != usual:
            raise ValueError(
                f"{key} must be left at {usual} in an encoder's config, got {getattr(config, key)}: SMP's "
                f"encoder_output_stride and encoder_depth choose it"
            )
    their_encoders.encoders[name] = {
        "encoder": PluginEncoder,
        "pretrained_settings": _AnyWeights(name),
        "params": {"config": config},
    }


class PluginEncoder(TransparentWrapper, EncoderMixin):  # type: ignore[misc]
    """Any backbone of this package as SMP wants an encoder, with the state-dict names of SMP's own.

    Args:
        config: What to build.
        depth: How many feature maps to make, each of half the resolution, besides the image: 1 to 5.
        output_stride: Largest stride, in image pixels: 32, 16 or 8.

    Attributes:
        config: What was built.

    Raises:
        ValueError: If ``depth`` is out of range, or a setting cannot be honoured.
    """

    def __init__(self, config: BackboneConfig, depth: int = 5, output_stride: int = _UNDILATED) -> None:
        if not 1 <= depth <= len(FEATURE_NAMES):
            raise ValueError(f"encoder_depth must be 1 to {len(FEATURE_NAMES)} (feature maps), got {depth}")
        super().__init__()
        all_blocks = output_stride < _UNDILATED and "/" not in config.name  # a library has its own convention
        self.settings = config.model_copy(
            update={
                "out_features": FEATURE_NAMES[:depth],
                "output_stride": output_stride,
                "dilate_first_block": config.dilate_first_block or all_blocks,
            }
        )
        self._depth, self._output_stride = depth, output_stride
        self._build(self.settings)

    def forward(self, images: Tensor) -> list[Tensor]:  # type: ignore[override]
        """Images (N, C, H, W) -> themselves, c1 (N, 64, H/2, W/2), c2 (N, 256, H/4, W/4), ...; sizes round up.

        A network without a map at stride 2 gives one of no channels there, as SMP's ``tu-`` encoders do.
        """
        features = self.network(images)
        if "c1" not in features:
            height, width = ((side + C1_STRIDE - 1) // C1_STRIDE for side in images.shape[-2:])  # ONNX rounds towards 0
            features["c1"] = images.new_empty(len(images), 0, height, width)
        return [images, *(features[name] for name in FEATURE_NAMES[: self._depth])]

    def set_in_channels(self, in_channels: int, pretrained: bool = True) -> None:
        """Build anew for images of ``in_channels`` channels, its weights adapted: what SMP calls at last.

        Raises:
            ValueError: If the config is for images of other than three and other than ``in_channels`` channels.
        """
        registered = self.settings.in_channels
        if in_channels != registered:
            if registered != BackboneConfig.model_fields["in_channels"].default:
                raise ValueError(
                    f"in_channels must be {registered}, for which the encoder is registered, got {in_channels}; pass "
                    f"in_channels={registered}"
                )
            self._build(self.settings.model_copy(update={"in_channels": in_channels}))
        if self.settings.weights is None:
            watch_initial_values(self.network, self.settings.name)

    def make_dilated(self, output_stride: int) -> None:
        """Do nothing: the network was built with its dilation."""

    def load_state_dict(
        self, state_dict: "Mapping[str, Any] | _Request", strict: bool = True, assign: bool = False
    ) -> Any:  # noqa: ANN401 - torch's own pair of lists
        """Load what SMP's ``encoder_weights`` names, or a state dict in SMP's names, which for ResNets are ours."""
        if not isinstance(state_dict, _Request):
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        weights = default_weights(self.settings) if state_dict.weights == DEFAULT_WEIGHTS else state_dict.weights
        return self._build(self.settings.model_copy(update={"weights": weights}))

    def train(self, mode: bool = True) -> Self:
        """Set the mode; a frozen norm, to which ``unfreeze_encoder`` gives gradients it never has, loses them."""
        for module in self.modules():
            if isinstance(module, FrozenBatchNorm2d):
                module.requires_grad_(False)
        return super().train(mode)

    def _build(self, config: BackboneConfig) -> None:
        network = _with_c1_if_it_has_one(config)
        if config.weights is not None:
            load_weights(network, config.weights, name=config.name, stem_channels_from=config.stem_channels_from)
        freeze_stages(network, config.freeze_at)
        self.settings = config
        self.wrap(network)
        channels = [network.feature_specs[name].channels for name in FEATURE_NAMES[1 : self._depth]]
        c1 = network.feature_specs.get("c1")
        self._in_channels, self._out_channels = config.in_channels, [config.in_channels, c1.channels if c1 else 0]
        self._out_channels += channels


def default_weights(config: BackboneConfig) -> str:
    """Return the weights that ``encoder_weights="imagenet"`` means.

    Raises:
        ValueError: If the config names none and no library publishes any for this network.
    """
    if config.weights is not None:
        return config.weights
    if "/" in config.name:
        return "default"
    try:
        return str(get_model_weights(config.name).DEFAULT.name)
    except ValueError:
        raise ValueError(
            f"encoder_weights must be None, or name weights for {config.name}, for which no library publishes any, "
            f"got {DEFAULT_WEIGHTS!r}, SMP's default; give a checkpoint's path or None"
        ) from None


def _with_c1_if_it_has_one(config: BackboneConfig) -> Backbone:
    try:
        return construct(config)
    except ValueError:
        coarser = config.out_features[1:]
        if not coarser:
            raise
        return construct(config.model_copy(update={"out_features": coarser}))


class _AnyWeights(Mapping[str, Mapping[str, str]]):
    """SMP's table of an encoder's published weights, which here has no end: ``load_weights`` knows what there is."""

    def __init__(self, encoder: str) -> None:
        self.encoder = encoder

    def __getitem__(self, weights: str) -> Mapping[str, str]:
        return {"repo_id": f"{_HUB_OWNER}/{self.encoder}", "revision": os.fspath(weights)}

    def __iter__(self) -> Iterator[str]:
        return iter((DEFAULT_WEIGHTS,))

    def __len__(self) -> int:
        return 1


@dataclass(frozen=True)
class _Request:
    """What SMP would fetch from the hub for one of our encoders: its weights, or a file of how to prepare images."""

    encoder: str
    weights: str

    def __fspath__(self) -> str:
        """Return the path of the latter, written now: SMP reads it only where somebody asks for it."""
        encoder = PluginEncoder(**their_encoders.encoders[self.encoder]["params"], depth=len(FEATURE_NAMES))
        encoder.load_state_dict(self)
        pixels = encoder.network.preprocessing
        settings = {
            "input_space": pixels.channel_order.upper(),
            "input_range": pixels.value_range,
            "mean": pixels.mean,
            "std": pixels.std,
        }
        file = Path(_folder().name, "config.json")
        file.write_text(json.dumps(settings))
        return str(file)


@cache
def _folder() -> "TemporaryDirectory[str]":
    return TemporaryDirectory()


def _answer_for_the_hub(download: Callable[..., Any], load: Callable[..., Any]) -> tuple[Callable[..., Any], ...]:
    """Return SMP's two functions that fetch and read a file of the hub, answering for our encoders themselves.

    SMP has no other way for an encoder of its table to load weights itself; where it gets one this goes.
    """

    def hf_hub_download(repo_id: str, *args: object, **kwargs: object) -> object:
        owner, _, encoder = repo_id.partition("/")
        return _Request(encoder, str(kwargs["revision"])) if owner == _HUB_OWNER else download(repo_id, *args, **kwargs)

    def load_file(file: object, *args: object, **kwargs: object) -> object:
        return file if isinstance(file, _Request) else load(file, *args, **kwargs)

    return hf_hub_download, load_file


their_encoders.hf_hub_download, their_encoders.load_file = _answer_for_the_hub(
    their_encoders.hf_hub_download, their_encoders.load_file
)
del _smp
for _name in list_backbones(provider=BUILT_IN):
    register_encoder(PREFIX + _name, BackboneConfig(name=_name, norm="bn"))
