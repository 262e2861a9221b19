"""The plan of strides and dilations, in integers."""

import pytest

from backbone.stages import OUTPUT_STRIDES, STAGE_NAMES, StagePlan, plan_stages

# (output_stride, dilate_first_block) -> per stage c2..c5: stride, first dilation, dilation, output stride.
PLANS: dict[tuple[int, bool], list[tuple[int, int, int, int]]] = {
    (32, False): [(1, 1, 1, 4), (2, 1, 1, 8), (2, 1, 1, 16), (2, 1, 1, 32)],
    (32, True): [(1, 1, 1, 4), (2, 1, 1, 8), (2, 1, 1, 16), (2, 1, 1, 32)],
    # torchvision, timm: C5 dilates 1, 2, 2; detectron2, mmdetection, SMP: 2, 2, 2
    (16, False): [(1, 1, 1, 4), (2, 1, 1, 8), (2, 1, 1, 16), (1, 1, 2, 16)],
    (16, True): [(1, 1, 1, 4), (2, 1, 1, 8), (2, 1, 1, 16), (1, 2, 2, 16)],
    (8, False): [(1, 1, 1, 4), (2, 1, 1, 8), (1, 1, 2, 8), (1, 2, 4, 8)],
    (8, True): [(1, 1, 1, 4), (2, 1, 1, 8), (1, 2, 2, 8), (1, 4, 4, 8)],
}
INVALID_STRIDES = [12, 0, -16, 4, 64, 1, 31]


@pytest.mark.parametrize(("output_stride", "dilate_first_block"), PLANS)
def test_plan_follows_the_table(output_stride: int, dilate_first_block: bool) -> None:
    plans = plan_stages(output_stride, dilate_first_block=dilate_first_block)
    expected = [
        StagePlan(name, *row)
        for name, row in zip(("c2", "c3", "c4", "c5"), PLANS[output_stride, dilate_first_block], strict=True)
    ]
    assert list(plans) == expected


@pytest.mark.parametrize("output_stride", OUTPUT_STRIDES)
def test_dilation_makes_up_for_the_stride_not_taken(output_stride: int) -> None:
    assert [plan.output_stride * plan.dilation for plan in plan_stages(output_stride)] == [4, 8, 16, 32]


@pytest.mark.parametrize("output_stride", OUTPUT_STRIDES)
def test_no_stage_is_coarser_than_the_output_stride(output_stride: int) -> None:
    assert max(plan.output_stride for plan in plan_stages(output_stride)) == output_stride


def test_plan_strides_32_unless_told_otherwise() -> None:
    assert plan_stages() == plan_stages(32, dilate_first_block=False)


def test_stages_count_from_the_stem() -> None:
    assert STAGE_NAMES == ("stem", "c2", "c3", "c4", "c5")


@pytest.mark.parametrize("output_stride", INVALID_STRIDES)
def test_other_output_stride_is_refused_with_the_rule_and_the_value(output_stride: int) -> None:
    with pytest.raises(ValueError, match=rf"^output_stride must be 32, 16 or 8 \(image pixels\), got {output_stride}$"):
        plan_stages(output_stride)
