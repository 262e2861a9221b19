"""What torchvision's detectors do to images before the network, as an ONNX graph: normalise, resize, pad.

The size of the result depends on the size of the image through divisions that torch.export cannot follow.
"""

from typing import Any

import torch
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from backbone.export.affine import PixelAffine


def front_graph(
    transform: GeneralizedRCNNTransform,
    channels: int,
    *,
    takes_bytes: bool,
    opset: int,
    batch: int | None = None,
    image_size: tuple[int, int] | None = None,
) -> Any:  # noqa: ANN401
    """Return the graph images -> resized (N, C, H, W), image_size (2,), ratio (4,), as a ModelProto.

    Args:
        transform: The detector's own.
        channels: Of an image.
        takes_bytes: Whether images are uint8 of 0 to 255 rather than float32 of 0 to 1.
        opset: Of ONNX.
        batch: Images at a time; None for any number.
        image_size: Height and width of an image; None for any.
    """
    from onnx import parser

    affine = PixelAffine.of(transform.normalize, channels)
    dtype = "uint8" if takes_bytes else "float"
    height, width = image_size or ("height", "width")
    text = f"""
    <ir_version: 10, opset_import: ["": {opset}]>
    front ({dtype}[{batch or "batch"}, {channels}, {height}, {width}] images)
        => (float[{batch or "batch"}, {channels}, padded_height, padded_width] resized,
            float[2] image_size, float[4] ratio)
    <float[{channels}, 1, 1] factor = {_braces(affine.scale(takes_bytes=takes_bytes))},
     float[{channels}, 1, 1] offset = {_braces(affine.offset)},
     int64[{channels}] order = {{{", ".join(map(str, affine.order))}}}>
    {{
        pixels = Cast<to = 1>(images)
        ordered = Gather<axis = 1>(pixels, order)
        scaled = Mul(ordered, factor)
        normalised = Add(scaled, offset)
        size = Shape<start = 2, end = 4>(images)
        leading = Shape<start = 0, end = 2>(images)
        {_resized_size(transform, image_size)}
        new_shape = Concat<axis = 0>(leading, new_size)
        resized_alone = Resize<mode = "linear", coordinate_transformation_mode = "half_pixel">(
            normalised, , , new_shape)
        divisor = Constant<value_ints = [{transform.size_divisible}]>()
        almost = Constant<value_ints = [{transform.size_divisible - 1}]>()
        raised = Add(new_size, almost)
        steps = Div(raised, divisor)
        padded_size = Mul(steps, divisor)
        missing = Sub(padded_size, new_size)
        nothing = Constant<value_ints = [0, 0, 0, 0, 0, 0]>()
        pads = Concat<axis = 0>(nothing, missing)
        resized = Pad(resized_alone, pads)
        image_size = Cast<to = 1>(new_size)
        old_size = Cast<to = 1>(size)
        ratios = Div(old_size, image_size)
        corners = Constant<value_ints = [1, 0, 1, 0]>()
        ratio = Gather(ratios, corners)
    }}
    """
    return parser.parse_model(text)


def resized_size(transform: GeneralizedRCNNTransform, height: int, width: int) -> tuple[int, int]:
    """Return what ``transform`` resizes an image of that size to, in pixels, without padding."""
    image, _ = transform.resize(torch.zeros(1, height, width), None)
    return image.shape[1], image.shape[2]


def _resized_size(transform: GeneralizedRCNNTransform, image_size: tuple[int, int] | None) -> str:
    """Return the lines that compute ``new_size``: for images of any size in double precision, as torchvision does."""
    if image_size is not None:
        height, width = resized_size(transform, *image_size)
        return f"new_size = Constant<value_ints = [{height}, {width}]>()"
    if transform._skip_resize:
        return "new_size = Identity(size)"
    if transform.fixed_size is not None:
        width, height = transform.fixed_size
        return f"new_size = Constant<value_ints = [{height}, {width}]>()"
    shorter, longer = float(transform.min_size[-1]), float(transform.max_size)
    return f"""
        sides = Cast<to = 11>(size)
        shortest = ReduceMin<keepdims = 1>(sides)
        longest = ReduceMax<keepdims = 1>(sides)
        limits = Constant<value = double[2] {{{shorter}, {longer}}}>()
        extremes = Concat<axis = 0>(shortest, longest)
        scales = Div(limits, extremes)
        scale = ReduceMin<keepdims = 1>(scales)
        exact = Mul(sides, scale)
        floored = Floor(exact)
        new_size = Cast<to = 7>(floored)
    """


def _braces(values: torch.Tensor) -> str:
    return "{" + ", ".join(repr(value) for value in values.tolist()) + "}"
