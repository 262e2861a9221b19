"""How torchvision's detectors prepare images, as the backbone's weights expect it."""

from collections.abc import Sequence
from typing import Final, TypedDict

from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from backbone.features import Preprocessing, find_backbone, input_channels
from backbone.recipe import DetectorConfig


class BackboneTransform(GeneralizedRCNNTransform):  # type: ignore[misc]
    """torchvision's resizing, normalising and batching, which asks the backbone at each call what its weights expect.

    Weights that are loaded later count. Images are RGB, of 0 to 1, as everywhere in torchvision; for weights that were
    trained on BGR they are turned.

    Args:
        model: A backbone, or a pyramid or detector that holds one.
        min_size: Shorter side in pixels; of several, one is drawn in training.
        max_size: Longer side in pixels, at most.
        image_mean: In place of the weights' own mean, in their order of channels; None for that.
        image_std: In place of the weights' own standard deviation; None for that.

    Raises:
        ValueError: If there is no backbone in ``model``.
    """

    follows_backbone: Final = True

    def __init__(
        self,
        model: nn.Module,
        min_size: int | Sequence[int] = 800,
        max_size: int = 1333,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
    ) -> None:
        sizes = (min_size,) if isinstance(min_size, int) else tuple(min_size)
        super().__init__(sizes, max_size, image_mean, image_std)
        self._backbone = (find_backbone(model),)  # in a tuple, so that it is no sub-module

    @property
    def image_mean(self) -> list[float]:
        """Subtracted from each channel, of 0 to 1."""
        return list(self._statistics()[0]) if self._mean is None else self._mean

    @image_mean.setter
    def image_mean(self, mean: Sequence[float] | None) -> None:
        self._mean = None if mean is None else list(mean)

    @property
    def image_std(self) -> list[float]:
        """Divides each channel."""
        return list(self._statistics()[1]) if self._std is None else self._std

    @image_std.setter
    def image_std(self, std: Sequence[float] | None) -> None:
        self._std = None if std is None else list(std)

    def normalize(self, image: Tensor) -> Tensor:
        """An RGB image (C, H, W) of 0 to 1 -> the same shape, as the weights expect it."""
        turned = image.flip(0) if self._backbone[0].preprocessing.turns_to_bgr(image.shape[0]) else image
        return super().normalize(turned)  # type: ignore[no-any-return]

    def _statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        (backbone,) = self._backbone
        return backbone.preprocessing.unit_statistics(input_channels(backbone))


def torchvision_transform(
    model: nn.Module, *, min_size: int | Sequence[int] = 800, max_size: int = 1333
) -> BackboneTransform:
    """Return the transform of a torchvision detector for the weights in ``model``: ``detector.transform = ...``.

    It keeps to them when others are loaded later, and turns images to BGR where they want it.

    Args:
        model: A backbone, or a pyramid or detector that holds one.
        min_size: Shorter side of the resized image in pixels; of several, one is drawn in training.
        max_size: Longer side in pixels, at most.

    Raises:
        ValueError: If there is no backbone in ``model``.
    """
    return BackboneTransform(model, min_size, max_size)


class DetectorKwargs(TypedDict):
    """What torchvision's detectors take to normalise images."""

    image_mean: list[float]
    image_std: list[float]


def detector_kwargs(model: nn.Module) -> DetectorKwargs:
    """Return the keywords of ``FasterRCNN(as_torchvision(model), ..., **detector_kwargs(model))`` for its weights.

    Args:
        model: A backbone, or a pyramid that holds one, its weights loaded.

    Raises:
        ValueError: If the weights expect BGR, which no keyword of torchvision's says.
    """
    backbone = find_backbone(model)
    expected, channels = backbone.preprocessing, input_channels(backbone)
    if expected.turns_to_bgr(channels):
        raise ValueError(
            "detector_kwargs must suit weights that expect RGB, got weights that expect BGR; set "
            "detector.transform = torchvision_transform(model), or load them with stem_channels_from=[2, 1, 0]"
        )
    mean, std = expected.unit_statistics(channels)
    return {"image_mean": list(mean), "image_std": list(std)}


def expect_images(detector: nn.Module, config: DetectorConfig, preprocessing: Preprocessing) -> None:
    """Let a detector of ``build_detector`` prepare images as weights expect them that are loaded afterwards."""
    find_backbone(detector).preprocessing = preprocessing  # its transform, unless ``config`` decides, asks there


def unit_statistics(preprocessing: Preprocessing, in_channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return ``preprocessing.unit_statistics(in_channels)``: mean and standard deviation for images of 0 to 1."""
    return preprocessing.unit_statistics(in_channels)
