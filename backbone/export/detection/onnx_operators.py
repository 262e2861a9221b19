"""``operators`` in ONNX's own operators, for torch.onnx's table of translations."""

from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

import torch
from onnxscript import FLOAT, opset18, script

from backbone.export.detection.operators import NOTHING

Value: TypeAlias = Any
"""A value of the graph under construction."""

op: Final[Any] = opset18  # typed for what it computes itself, and here it writes down
_BOOL: Final = 9  # of TensorProto


def select_best(scores: Value, count: int) -> Value:
    """TopK of what is there, padded to ``count``."""
    length = op.Min(op.Constant(value_ints=[count]), op.Shape(scores, start=1, end=2))
    values, places = op.TopK(scores, length, axis=1)
    missing = op.Concat(op.Constant(value_ints=[0, 0, 0]), op.Sub(op.Constant(value_ints=[count]), length), axis=0)
    padded = op.Pad(values, missing, op.Constant(value_float=NOTHING))
    return padded, op.Pad(places, missing, op.Constant(value_int=0))


def suppress(boxes: Value, scores: Value, groups: Value, num_groups: int, overlap: float) -> Value:
    """NonMaxSuppression with a group as its class, its list of survivors scattered into a mask."""
    classes = op.Reshape(op.Constant(value_ints=list(range(num_groups))), op.Constant(value_ints=[1, num_groups, 1]))
    is_member = op.Equal(op.Unsqueeze(groups, op.Constant(value_ints=[1])), classes)
    by_class = op.Where(is_member, op.Unsqueeze(scores, op.Constant(value_ints=[1])), op.Constant(value_float=-1.0))
    survivors = op.NonMaxSuppression(
        boxes,
        by_class,
        op.Shape(boxes, start=1, end=2),
        op.Constant(value_floats=[overlap]),
        op.Constant(value_floats=[-0.5]),
    )
    places = op.Gather(survivors, op.Constant(value_ints=[0, 2]), axis=1)
    nothing = op.Expand(op.Constant(value_float=0.0), op.Shape(scores))
    ones = op.Expand(op.Constant(value_float=1.0), op.Shape(places, start=0, end=1))
    return op.Cast(op.ScatterND(nothing, places, ones), to=_BOOL)


def pool_boxes(
    maps: Sequence[Value], boxes: Value, levels: Value, scales: Sequence[float], size: int, sampling_ratio: int
) -> Value:
    """RoiAlign of each level's boxes and of an empty one, so that no level is without; then in their old order."""
    flat, zero, one = op.Constant(value_ints=[-1]), op.Constant(value_int=0), op.Constant(value_int=1)
    num_images = op.Shape(boxes, start=0, end=1)
    images = op.Unsqueeze(op.Range(zero, op.Squeeze(num_images), one), op.Constant(value_ints=[1]))
    images = op.Reshape(op.Expand(images, op.Shape(boxes, start=0, end=2)), flat)
    images = op.Concat(images, op.Constant(value_ints=[0]), axis=0)
    boxes = op.Reshape(boxes, op.Constant(value_ints=[-1, 4]))
    last = op.Shape(boxes, start=0, end=1)
    boxes = op.Concat(boxes, op.Constant(value=_zeros(1, 4)), axis=0)
    levels = op.Reshape(levels, flat)
    parts, places = [], []
    for level, (features, scale) in enumerate(zip(maps, scales, strict=True)):
        here = op.Reshape(op.NonZero(op.Equal(levels, op.Constant(value_int=level))), flat)
        places.append(op.Concat(here, last, axis=0))
        pooled = op.RoiAlign(
            features,
            op.Gather(boxes, places[-1]),
            op.Gather(images, places[-1]),
            coordinate_transformation_mode="output_half_pixel",
            output_height=size,
            output_width=size,
            sampling_ratio=max(sampling_ratio, 0),
            spatial_scale=scale,
        )
        parts.append(pooled)
    rows = op.Concat(*places, axis=0)
    positions = op.Range(zero, op.Squeeze(op.Shape(rows)), one)
    empty = op.Expand(op.Constant(value_int=0), op.Add(last, op.Constant(value_ints=[1])))
    order = op.ScatterElements(empty, rows, positions, axis=0)
    return op.Gather(op.Concat(*parts, axis=0), op.Slice(order, op.Constant(value_ints=[0]), last))


def find_keypoints(heatmaps: Value, boxes: Value) -> Value:
    """A loop over the boxes, see ``_find_peaks``."""
    found = _find_peaks(heatmaps, boxes)
    keypoints = op.Gather(found, op.Constant(value_ints=[0, 1, 2]), axis=2)
    return keypoints, op.Gather(found, op.Constant(value_int=3), axis=2)


@script(default_opset=op)  # type: ignore[untyped-decorator, unused-ignore]
def _find_peaks(heatmaps: FLOAT[...], boxes: FLOAT[...]) -> FLOAT[...]:  # type: ignore[type-arg, misc, unused-ignore]
    """Each box's heat maps (J, S, S) are resized to its size in pixels: (x, y, 1, score) of their peaks (R, J, 4)."""
    corner = op.Slice(boxes, [0], [2], [1])
    size = op.Max(op.Sub(op.Slice(boxes, [2], [4], [1]), corner), 1.0)
    pixels = op.Ceil(size)
    num_joints = op.Shape(heatmaps, start=1, end=2)
    found = op.Expand(0.0, op.Concat(op.Shape(heatmaps, start=0, end=2), [4], axis=0))
    for index in range(op.Squeeze(op.Shape(boxes, start=0, end=1))):
        row = op.Reshape(index, [1])
        extent = op.Cast(op.Reshape(op.Gather(pixels, row), [2]), to=7)
        width = op.Slice(extent, [0], [1])
        height = op.Slice(extent, [1], [2])
        maps = op.Gather(heatmaps, row)
        shape = op.Concat([1], num_joints, height, width, axis=0)
        resized = op.Resize(maps, None, None, shape, mode="cubic", coordinate_transformation_mode="half_pixel")
        flat = op.Reshape(resized, op.Concat(num_joints, [-1], axis=0))
        peak = op.ArgMax(flat, axis=1)
        best = op.GatherElements(flat, peak, axis=1)
        place = op.Concat(op.Mod(peak, width), op.Div(peak, width), axis=1)
        scale = op.Div(op.Gather(size, row), op.Gather(pixels, row))
        position = op.Add(op.Mul(op.Add(op.Cast(place, to=1), 0.5), scale), op.Gather(corner, row))
        joints = op.Concat(position, op.Expand(1.0, op.Shape(best)), best, axis=1)
        found = op.ScatterND(found, op.Reshape(index, [1, 1]), op.Unsqueeze(joints, [0]))
    return found  # type: ignore[no-any-return, unused-ignore]


def _zeros(*shape: int) -> Any:  # noqa: ANN401 - a TensorProto
    import numpy as np
    from onnx import numpy_helper

    return numpy_helper.from_array(np.zeros(shape, np.float32))


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return torch.onnx's ``custom_translation_table`` for the operators of detection."""
    ours = torch.ops.backbone_export
    return {
        ours.select_best.default: select_best,
        ours.suppress.default: suppress,
        ours.pool_boxes.default: pool_boxes,
        ours.find_keypoints.default: find_keypoints,
    }
