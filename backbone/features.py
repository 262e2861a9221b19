"""The contract: what a detector may rely on, whichever backbone it is given."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final, Literal, Self, TypeAlias, TypedDict, Unpack

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from backbone.config import BackboneConfig
from backbone.stages import STAGE_NAMES

if TYPE_CHECKING:
    from backbone.transforms import ImageTransforms

Features: TypeAlias = dict[str, Tensor]
"""Feature maps by name (``c2`` to ``c5``, finest first), each (N, channels, H / stride, W / stride) rounded up."""


RGB_CHANNELS: Final = 3


@dataclass(frozen=True, slots=True)
class FeatureSpec:
    """The shape of one feature map, known before any image is seen.

    Attributes:
        channels: Number of channels.
        stride: Image pixels per feature pixel, in each direction.
    """

    channels: int
    stride: int


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How an image must be prepared for the weights a backbone carries.

    Attributes:
        mean: Subtracted from each channel, in units of ``value_range``.
        std: Then divides each channel, in units of ``value_range``.
        channel_order: Order of the colour channels.
        value_range: Lowest and highest pixel value before ``mean`` and ``std`` apply.
        interpolation: How images were resized in training: ``bilinear``, ``bicubic``, ...
    """

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    channel_order: Literal["rgb", "bgr"] = "rgb"
    value_range: tuple[float, float] = (0.0, 1.0)
    interpolation: str = "bilinear"

    def unit_statistics(self, in_channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and standard deviation for images of 0 to 1 with ``in_channels`` channels.

        One channel gets the average of the weights' channels; more than the weights know repeat them in turn, as a
        pre-trained stem's channels do.
        """
        low, high = self.value_range
        mean = [(value - low) / (high - low) for value in self.mean]
        std = [value / (high - low) for value in self.std]
        if in_channels == 1:
            return (sum(mean) / len(mean),), (sum(std) / len(std),)
        turns = range(in_channels)
        return tuple(mean[turn % len(mean)] for turn in turns), tuple(std[turn % len(std)] for turn in turns)

    def turns_to_bgr(self, in_channels: int) -> bool:
        """Whether RGB images of ``in_channels`` channels must be turned to BGR first."""
        return self.channel_order == "bgr" and in_channels == RGB_CHANNELS


class HubOptions(TypedDict, total=False):
    """How ``from_pretrained`` reaches huggingface.co; of no effect on a local folder."""

    revision: str | None
    token: str | bool | None
    cache_dir: str | os.PathLike[str] | None
    force_download: bool
    local_files_only: bool


class Backbone(nn.Module):
    """Base class of every backbone. A subclass builds its modules and fills in the attributes.

    A wrapper, such as a pyramid, holds another backbone by ``adopt`` and leaves most of these to it.

    Attributes:
        feature_specs: Channels and stride of each feature map that ``forward`` returns, finest first.
        unpublished_prefixes: Parameter-name prefixes of parts that no published weights have, because this package
            added them. Loading leaves them at their present values unless the file has them.
        traced_method: Name of the method, images -> maps in a container, that calls the same modules whatever the
            images are; ``forward``, or a part of it.
    """

    traced_method: ClassVar[str] = "forward"

    def __init__(self) -> None:
        super().__init__()
        self.feature_specs: dict[str, FeatureSpec] = {}
        self.unpublished_prefixes: tuple[str, ...] = ()
        self._adopted: str | None = None
        self._config: BackboneConfig | None = None
        self._preprocessing: Preprocessing | None = None
        self._stage_modules: Mapping[str, Sequence[str]] | None = None
        self._stage_parameters: Mapping[str, Sequence[str]] | None = None
        self._unbuilt_prefixes: tuple[str, ...] | None = None

    def forward(self, images: Tensor) -> Features:
        """Images (N, C, H, W) -> ``{name: (N, channels, H / stride, W / stride)}``; sizes round up."""
        raise NotImplementedError

    @property
    def stages(self) -> dict[str, nn.ModuleList]:
        """The stages that are built, stem first, each with its modules as they are now."""
        stages = {}
        for name in STAGE_NAMES:
            if name in self.stage_modules:
                stages[name] = nn.ModuleList(self.get_submodule(path) for path in self.stage_modules[name])
                if self.stage_parameters.get(name):
                    parameters = [self.get_parameter(path) for path in self.stage_parameters[name]]
                    stages[name].append(nn.ParameterList(parameters))
        return stages

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode, as every module does; what ``freeze_stages`` froze stays in the latter."""
        super().train(mode)
        for modules in self.stages.values():
            for module in modules:
                if getattr(module, "is_frozen", False):
                    module.eval()
        return self

    def adopt(self, name: str, backbone: "Backbone") -> None:
        """Hold ``backbone`` as the sub-module ``name``; its stages, config and preprocessing are this one's, too."""
        self.add_module(name, backbone)
        self._adopted = name

    @property
    def adopted(self) -> "Backbone | None":
        """The backbone that this one is a wrapper of; None if it is none."""
        return None if self._adopted is None else self.get_submodule(self._adopted)  # type: ignore[return-value]

    @property
    def config(self) -> BackboneConfig | None:
        """What ``build_backbone`` was asked for; None for a backbone that was made by hand."""
        return self._config if self.adopted is None else self.adopted.config

    @config.setter
    def config(self, config: BackboneConfig | None) -> None:
        _innermost(self)._config = config

    @property
    def preprocessing(self) -> Preprocessing:
        """What the loaded weights expect of an image; torchvision's ImageNet values where nothing is known."""
        return self.known_preprocessing or Preprocessing()

    @preprocessing.setter
    def preprocessing(self, preprocessing: Preprocessing) -> None:
        _innermost(self)._preprocessing = preprocessing

    @property
    def known_preprocessing(self) -> Preprocessing | None:
        """What the loaded weights expect of an image; None where no weights came with it."""
        return _innermost(self)._preprocessing

    @property
    def stage_modules(self) -> Mapping[str, Sequence[str]]:
        """For each stage that is built (``stem``, ``c2`` ... ``c5``) the dotted names of its modules.

        Names rather than modules, so that swapping a module cannot leave a stale reference behind.
        """
        if self._stage_modules is None and self.adopted is not None:
            return self._under_adopted(self.adopted.stage_modules)
        return self._stage_modules or {}

    @stage_modules.setter
    def stage_modules(self, names: Mapping[str, Sequence[str]]) -> None:
        self._stage_modules = names

    @property
    def stage_parameters(self) -> Mapping[str, Sequence[str]]:
        """For each stage the dotted names of parameters in no module of that stage alone; mostly there are none.

        An example is a position embedding that lies beside all blocks.
        """
        if self._stage_parameters is None and self.adopted is not None:
            return self._under_adopted(self.adopted.stage_parameters)
        return self._stage_parameters or {}

    @stage_parameters.setter
    def stage_parameters(self, names: Mapping[str, Sequence[str]]) -> None:
        self._stage_parameters = names

    @property
    def unbuilt_prefixes(self) -> tuple[str, ...]:
        """Parameter-name prefixes of the complete network that this instance left out.

        A checkpoint may carry them; anything else it carries must match.
        """
        if self._unbuilt_prefixes is None and self.adopted is not None:
            return tuple(f"{self._adopted}.{prefix}" for prefix in self.adopted.unbuilt_prefixes)
        return self._unbuilt_prefixes or ()

    @unbuilt_prefixes.setter
    def unbuilt_prefixes(self, prefixes: tuple[str, ...]) -> None:
        self._unbuilt_prefixes = prefixes

    def _under_adopted(self, names: Mapping[str, Sequence[str]]) -> Mapping[str, Sequence[str]]:
        return {stage: tuple(f"{self._adopted}.{path}" for path in paths) for stage, paths in names.items()}

    def transforms(self, resize: int | tuple[int, int] | None = None) -> "ImageTransforms":
        """Return a transform, one of torchvision's v2, that prepares images as the present weights expect them.

        It takes a PIL image, an array or a tensor of uint8 or floats, a batch, or a list; see ``ImageTransforms``.

        Args:
            resize: Shorter side, or height and width, in pixels; None keeps the images' size.
        """
        from backbone.transforms import ImageTransforms

        return ImageTransforms(self.preprocessing, input_channels(self), self.size_divisibility, resize)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write config, weights and freeze state into ``folder``; see ``backbone.save_pretrained``."""
        from backbone.pretrained import save_pretrained

        return save_pretrained(self, folder)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], **options: Unpack[HubOptions]) -> Self:
        """Return the backbone that ``save_pretrained`` wrote; see ``backbone.from_pretrained``.

        Raises:
            ValueError: If something else was written there, such as a detector.
        """
        from backbone.pretrained import from_pretrained

        model = from_pretrained(source, **options)
        if not isinstance(model, cls):
            raise ValueError(
                f"{source}: must hold a {cls.__name__}, got a {type(model).__name__}; load it by "
                f"backbone.from_pretrained"
            )
        return model

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        try:
            return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]
        except (AssertionError, RuntimeError) as error:  # torch's answers to .cuda() and .to("cuda") without a GPU
            if torch.cuda.is_available() or not re.search("cuda|nvidia", str(error), re.IGNORECASE):
                raise
            reason = " ".join(str(error).split()).rstrip(".")
            raise RuntimeError(
                f"a backbone moves to a CUDA device that torch can see, got none ({reason}); stay on the CPU"
            ) from None

    def named_weights(self, name: str) -> tuple[Mapping[str, Tensor], Preprocessing] | None:
        """Return the weights that this network's own library publishes under ``name``.

        None, as here, leaves it to ``load_weights`` to find and read them.

        Returns:
            A state dict in this network's parameter names, parts in ``unbuilt_prefixes`` allowed, and what the
            weights expect of an image.

        Raises:
            ValueError: If the library publishes weights for this network, but not under that name.
        """
        return None

    def adapt_weights(self, state: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], Preprocessing] | None:
        """Return a file's tensors as ``named_weights`` returns published ones, where the library has its own names.

        None, as here, leaves it to ``load_weights`` to recognise them.

        Args:
            state: By the file's names, without the wrappers of training scripts.

        Raises:
            ValueError: If they are not this network's.
        """
        return None

    @property
    def size_divisibility(self) -> int:
        """Image sizes, in pixels, that are multiples of this lose nothing to rounding. Any size works."""
        return max(spec.stride for spec in self.feature_specs.values())


def _innermost(backbone: Backbone) -> Backbone:
    """Return the backbone inside all wrappers."""
    while backbone.adopted is not None:
        backbone = backbone.adopted
    return backbone


def input_channels(backbone: Backbone) -> int:
    """Return the channels of the images that ``backbone`` takes, by its config or itself; else those of its weights."""
    inner = _innermost(backbone)
    if inner.config is not None:
        return inner.config.in_channels
    return int(getattr(inner, "in_channels", len(inner.preprocessing.mean)))


def find_backbone(model: nn.Module) -> Backbone:
    """Return the backbone in ``model``: itself, the one a wrapper holds, or the only one in a detector.

    Raises:
        ValueError: If there is none, or more than one.
    """
    found = {id(inner): (path, inner) for path, inner in _innermost_of(model)}
    if len(found) == 1:
        return next(iter(found.values()))[1]
    if found:
        paths = ", ".join(path for path, _ in found.values())
        raise ValueError(f"{type(model).__name__} must hold one backbone, got {paths}; give the one you mean")
    raise ValueError(
        f"{type(model).__name__} must be a backbone of this package or hold one, got none in it; give a model whose "
        f"backbone comes from build_backbone"
    )


def _innermost_of(model: nn.Module) -> list[tuple[str, Backbone]]:
    return [(path, _innermost(each)) for path, each in model.named_modules() if isinstance(each, Backbone)]


def require_images(images: Tensor, in_channels: int) -> None:
    """Refuse what is no batch of images.

    Raises:
        ValueError: If ``images`` is not a floating-point tensor (N, in_channels, H, W).
    """
    if isinstance(images, Proxy):  # a trace: nobody knows the shape
        return
    if not isinstance(images, Tensor):
        got, remedy = type(images).__name__, "model.transforms()([image, ...]) makes a batch of PIL images and arrays"
    elif images.ndim == 4 and images.shape[1] == in_channels and images.is_floating_point():  # noqa: PLR2004
        return
    else:
        got, remedy = f"{images.dtype} {tuple(images.shape)}", _remedy(images, in_channels)
    raise ValueError(f"images must be a floating-point tensor (N, {in_channels}, H, W), got {got}; {remedy}")


def _remedy(images: Tensor, in_channels: int) -> str:
    """Return what turns ``images``, which are none, into a batch."""
    shape, batched = images.shape, images.ndim == 4  # noqa: PLR2004
    if batched and shape[1] == in_channels:
        return "scale and normalise: model.transforms()(images)"
    if batched and shape[3] == in_channels:
        return "channels come last: model.transforms()(images.movedim(-1, 1))"
    if batched:
        return f"give {in_channels} channels, or build the network with in_channels={shape[1]}"
    if images.ndim == 3 and in_channels in (shape[0], shape[2]):  # noqa: PLR2004
        first = "image" if shape[0] == in_channels else "image.movedim(-1, 0)"
        return f"add the batch dimension: model.transforms()([{first}]) makes a batch"
    return "give a batch, as model.transforms()([image, ...]) makes it"
