"""Any model as exporters want it: tensors in, named tensors out, and the plain model to compare with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, KeypointRCNN, MaskRCNN, RetinaNet

from backbone.export.affine import PixelAffine
from backbone.export.folding import for_export
from backbone.export.request import Request
from backbone.export.resizing import resize
from backbone.features import Backbone, Preprocessing

Outputs = Mapping[str, Tensor]

_DTYPES: Final = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_STRIDE_PROBE: Final = 512  # pixels; every power of two up to it divides it
_PREDICTIONS: Final = ("logits", "pred_boxes", "pred_masks", "class_queries_logits", "masks_queries_logits")
"""Of what a model of transformers returns; the others are states within it."""
_RANKED: Final = ("rt_detr", "rt_detr_v2", "d_fine")
"""Types of transformers' models whose queries are the best places of an encoder's map, in their order."""
_SECOND_HEADS: Final[Mapping[type, tuple[str, ...]]] = {
    MaskRCNN: ("masks",),
    KeypointRCNN: ("keypoints", "keypoints_scores"),
}


@dataclass
class Network:
    """What is exported.

    Attributes:
        module: Tensors -> tensors in the order of ``outputs``, traced as it stands.
        outputs: Their names.
        channels: Of an image.
        reference: The model as PyTorch runs it, of the same images as the file: a batch -> outputs by name.
        preprocessing: How images must be prepared, where the file does not do it.
        takes_bytes: Whether images are uint8.
        detector: The detector of torchvision behind it, or None.
        example_size: Height and width in pixels to trace and check with.
        resizes_to: Height and width that the file resizes images to itself, or None.
    """

    module: nn.Module
    outputs: tuple[str, ...]
    channels: int
    reference: Callable[[Tensor], Outputs]
    preprocessing: Preprocessing | None
    takes_bytes: bool
    detector: nn.Module | None = None
    example_size: tuple[int, int] = (192, 256)
    resizes_to: tuple[int, int] | None = None


def understand(model: nn.Module, request: Request) -> Network:
    """Return what to trace of ``model``, which stays as it is.

    Raises:
        ValueError: If the model or the combination cannot be exported.
    """
    if getattr(getattr(model, "config", None), "model_type", None) in _RANKED:
        raise ValueError(
            f"{type(model).__name__} takes its queries by rank, which nearly equal scores decide otherwise in another "
            f"runtime: its file cannot be compared with PyTorch; export its backbone alone, or a DETR"
        )
    copy = for_export(model)
    if isinstance(copy, FasterRCNN | RetinaNet | FCOS):
        return _understand_detector(copy, request)
    channels = in_channels(copy)
    preprocessing = preprocessing_of(copy)
    example_size = request.image_size or (192, 256)
    names = _output_names(copy, channels, example_size)
    prepare: nn.Module | None = None
    resizes_to = request.image_size if request.with_preprocessing else None
    if request.with_preprocessing:
        prepare = Prepare(preprocessing or Preprocessing(), channels, resizes_to)
    reference = Named(copy, names, prepare)
    network = for_export(copy).to(_DTYPES[request.dtype]) if request.dtype in _DTYPES else copy
    return Network(
        Named(network, names, prepare),
        names,
        channels,
        reference,
        preprocessing,
        request.with_preprocessing,
        example_size=(224, 320) if resizes_to else example_size,
        resizes_to=resizes_to,
    )


def _understand_detector(detector: FasterRCNN | RetinaNet | FCOS, request: Request) -> Network:
    from backbone.export.detection.core import DetectorCore

    if request.to not in ("onnx", "openvino"):
        raise ValueError(
            f"a detector's suppression and pooling are exported as ONNX's own operators, which {request.to} has none "
            f"of; use onnx or openvino, or export the backbone alone"
        )
    if request.dtype == "int8" or (request.dtype != "float32" and request.to == "onnx"):
        raise ValueError(f"a detector is exported to {request.to} in float32, got {request.dtype}; leave the dtype out")
    second = next((names for kind, names in _SECOND_HEADS.items() if isinstance(detector, kind)), ())
    channels = len(detector.transform.image_mean)

    def reference(images: Tensor) -> Outputs:
        images = images.float() / 255 if request.with_preprocessing else images
        found = detector(list(images))
        return {f"{key}/{index}": each[key] for index, each in enumerate(found) for key in each}

    return Network(
        DetectorCore(detector, strides_of(detector.backbone, channels)),
        ("boxes", "scores", "labels", "count", *second),
        channels,
        reference,
        None,
        request.with_preprocessing,
        detector=detector,
        example_size=request.image_size or _usual_size(detector),
    )


def _usual_size(detector: nn.Module) -> tuple[int, int]:
    """Three quarters as high as wide, near the size that the detector resizes to."""
    shorter: int = detector.transform.min_size[-1]  # type: ignore[union-attr, index, assignment]
    return shorter, min(shorter * 4 // 3, int(detector.transform.max_size))  # type: ignore[union-attr, arg-type]


class Named(nn.Module):
    """Images -> the named outputs of a network, float32 whatever it computes in."""

    def __init__(self, network: nn.Module, names: tuple[str, ...], prepare: nn.Module | None) -> None:
        super().__init__()
        self.network, self.names, self.prepare = network, names, prepare

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (N, C, H, W) -> one tensor for each name, in their order."""
        if self.prepare is not None:
            images = self.prepare(images)
        dtype = next((parameter.dtype for parameter in self.network.parameters()), images.dtype)
        outputs = named_outputs(self.network(images.to(dtype)))
        return {name: outputs[name].float() for name in self.names}


class Prepare(nn.Module):
    """Images of bytes -> what the weights expect: resized, 0 to 1, in their order of channels, normalised.

    Args:
        preprocessing: What the weights expect of an image.
        channels: Of an image.
        size: Height and width to resize to, with antialiasing; None leaves the size.
    """

    def __init__(self, preprocessing: Preprocessing, channels: int, size: tuple[int, int] | None) -> None:
        super().__init__()
        affine = PixelAffine.from_preprocessing(preprocessing, channels)
        self.size, self.reverse = size, affine.order != tuple(range(channels))
        self.bicubic = preprocessing.interpolation == "bicubic"
        self.register_buffer("factor", affine.scale(takes_bytes=True).float()[:, None, None])
        self.register_buffer("offset", affine.offset.float()[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) of 0 to 255 -> (N, C, h, w) float32."""
        pixels = images.float()
        if self.size is not None:
            pixels = resize(pixels, self.size, bicubic=self.bicubic)
        if self.reverse:
            pixels = pixels.flip(1)
        return pixels * self.get_buffer("factor") + self.get_buffer("offset")


def named_outputs(outputs: object) -> dict[str, Tensor]:
    """Return what a network gave as tensors by name: a dict's or a dataclass' keys, ``output`` for a lone tensor.

    Raises:
        ValueError: If there is no tensor in it.
    """
    if isinstance(outputs, Tensor):
        return {"output": outputs}
    if isinstance(outputs, Mapping):
        named = {str(name): value for name, value in outputs.items() if isinstance(value, Tensor)}
    elif isinstance(outputs, list | tuple):
        named = {f"output{index}": value for index, value in enumerate(outputs) if isinstance(value, Tensor)}
    else:
        named = {}
    if not named:
        raise ValueError(f"the model must return tensors or a mapping of them, got {type(outputs).__name__}")
    return named


def _output_names(model: nn.Module, channels: int, size: tuple[int, int]) -> tuple[str, ...]:
    with torch.no_grad():
        try:
            outputs = model(torch.zeros(1, channels, *size))
        except (RuntimeError, ValueError, AssertionError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"the network cannot take images of {size[0]} x {size[1]} pixels ({reason}); give --image-size as it "
                f"needs it"
            ) from None
    names = tuple(named_outputs(outputs))
    predictions = tuple(name for name in names if name in _PREDICTIONS)
    return predictions if predictions and type(outputs).__module__.startswith("transformers.") else names


def in_channels(model: nn.Module) -> int:
    """Return the channels of the images that ``model`` takes: those of its first convolution."""
    own = getattr(model, "in_channels", None)
    if isinstance(own, int):
        return own
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    raise ValueError(f"the model must have a convolution, to tell its images' channels, got {type(model).__name__}")


def strides_of(backbone: nn.Module, channels: int) -> dict[str, int]:
    """Return image pixels per feature pixel of each map of ``backbone``, measured."""
    with torch.no_grad():
        maps = backbone(torch.zeros(1, channels, _STRIDE_PROBE, _STRIDE_PROBE))
    maps = {"0": maps} if isinstance(maps, Tensor) else maps
    return {name: _STRIDE_PROBE // features.shape[2] for name, features in maps.items()}


def preprocessing_of(model: nn.Module) -> Preprocessing | None:
    """Return what the weights of the backbone in ``model`` expect of an image; None without a backbone of ours."""
    for module in model.modules():
        if isinstance(module, Backbone):
            return module.preprocessing
    return None
