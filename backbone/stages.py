"""Stride and dilation of every stage, planned in integers before any tensor exists."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

STAGE_NAMES: Final = ("stem", "c2", "c3", "c4", "c5")
"""The five stages in order. ``freeze_at = n`` freezes the first n of them."""

FEATURE_NAMES: Final = ("c1", *STAGE_NAMES[1:])
"""The feature map of each stage. The stem's, c1, is taken before its max-pool, at stride 2."""

STEM_STRIDE: Final = 4
C1_STRIDE: Final = 2
OUTPUT_STRIDES: Final = (32, 16, 8)


def stage_number(feature: str) -> int:
    """Return the place in ``STAGE_NAMES`` of the stage that makes ``feature``: 0 for c1, the stem's."""
    return FEATURE_NAMES.index(feature)


def stage_of(feature: str) -> str:
    """Return the name of the stage that makes ``feature``: ``stem`` for c1, else its own."""
    return STAGE_NAMES[stage_number(feature)]


@dataclass(frozen=True, slots=True)
class StagePlan:
    """How one residual stage samples the image.

    Attributes:
        name: ``c2`` to ``c5``.
        stride: Stride of the stage's first block, in its input's pixels.
        first_dilation: Dilation of the 3x3 convolution in the first block.
        dilation: Dilation of the 3x3 convolutions in the other blocks.
        output_stride: Image pixels per feature pixel of the stage's output.
    """

    name: str
    stride: int
    first_dilation: int
    dilation: int
    output_stride: int


def plan_stages(
    output_stride: int = 32, *, dilate_first_block: bool = False, dilations: Sequence[int] | None = None
) -> tuple[StagePlan, ...]:
    """Plan C2 to C5 so that no feature map is coarser than ``output_stride``.

    A stage that may not stride any more dilates instead (DeepLab, arXiv:1606.00915). Two conventions exist for
    the first block of such a stage, and weights trained with one give other features with the other:

    * it keeps the previous dilation (torchvision, timm): C5 at stride 16 has dilations 1, 2, 2; the default;
    * it takes the new one (detectron2, mmdetection, SMP): 2, 2, 2; ``dilate_first_block=True``.

    Args:
        output_stride: Largest stride, in image pixels: 32, 16 or 8.
        dilate_first_block: Whether a dilated stage's first block takes the new dilation.
        dilations: Dilation of C2 to C5 in place of those that ``output_stride`` asks for.

    Raises:
        ValueError: If ``output_stride`` is not 32, 16 or 8, or ``dilations`` are not four.
    """
    if dilations is not None and len(dilations) != len(STAGE_NAMES) - 1:
        raise ValueError(f"dilations must be four, of C2, C3, C4 and C5, got {list(dilations)}")
    if output_stride not in OUTPUT_STRIDES:
        raise ValueError(f"output_stride must be 32, 16 or 8 (image pixels), got {output_stride!r}")
    plans: list[StagePlan] = []
    total_stride, dilation = STEM_STRIDE, 1
    for number, (name, wanted_stride) in enumerate((("c2", 1), ("c3", 2), ("c4", 2), ("c5", 2))):
        dilates = total_stride * wanted_stride > output_stride
        stride = 1 if dilates else wanted_stride
        new_dilation = dilation * wanted_stride if dilates else dilation
        if dilations is not None:
            new_dilation = dilations[number]
        first_dilation = new_dilation if dilate_first_block else dilation
        total_stride, dilation = total_stride * stride, new_dilation
        plans.append(StagePlan(name, stride, first_dilation, dilation, total_stride))
    return tuple(plans)
