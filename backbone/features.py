"""The contract: what a detector may rely on, whichever backbone it is given."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self, TypeAlias

from torch import Tensor, nn
from torch.fx import Proxy

from backbone.stages import STAGE_NAMES

Features: TypeAlias = dict[str, Tensor]
"""Feature maps by name (``c2`` to ``c5``, finest first), each (N, channels, H / stride, W / stride) rounded up."""


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


class Backbone(nn.Module):
    """Base class of every backbone. A subclass builds its modules and fills in the attributes.

    Attributes:
        feature_specs: Channels and stride of each feature map that ``forward`` returns, finest first.
        stage_modules: For each stage that is built (``stem``, ``c2`` ... ``c5``) the dotted names of its modules.
            Names rather than modules, so that swapping a module cannot leave a stale reference behind.
        stage_parameters: For each stage the dotted names of parameters in no module of that stage alone, such as a
            position embedding that lies beside all blocks; most networks have none.
        preprocessing: What the loaded weights expect of an image; torchvision's ImageNet values until then.
        unbuilt_prefixes: Parameter-name prefixes of the complete network that this instance left out.
            A checkpoint may carry them; anything else it carries must match.
    """

    def __init__(self) -> None:
        super().__init__()
        self.feature_specs: dict[str, FeatureSpec] = {}
        self.stage_modules: Mapping[str, Sequence[str]] = {}
        self.stage_parameters: Mapping[str, Sequence[str]] = {}
        self.preprocessing = Preprocessing()
        self.unbuilt_prefixes: tuple[str, ...] = ()

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
        """Hold ``backbone`` as the sub-module ``name``, and take over its stages and what its weights expect."""
        self.add_module(name, backbone)
        self.preprocessing = backbone.preprocessing
        self.stage_modules = {
            stage: tuple(f"{name}.{path}" for path in paths) for stage, paths in backbone.stage_modules.items()
        }
        self.stage_parameters = {
            stage: tuple(f"{name}.{path}" for path in paths) for stage, paths in backbone.stage_parameters.items()
        }
        self.unbuilt_prefixes = tuple(f"{name}.{prefix}" for prefix in backbone.unbuilt_prefixes)

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


def require_images(images: Tensor, in_channels: int) -> None:
    """Refuse what is no batch of images.

    Raises:
        ValueError: If ``images`` is not a floating-point tensor (N, in_channels, H, W).
    """
    if isinstance(images, Proxy):  # a trace: nobody knows the shape
        return
    if images.ndim != 4 or images.shape[1] != in_channels or not images.is_floating_point():  # noqa: PLR2004
        raise ValueError(
            f"images must be a floating-point tensor (N, {in_channels}, H, W), got {images.dtype} "
            f"{tuple(images.shape)}; add the batch dimension, scale and normalise, or set in_channels"
        )
