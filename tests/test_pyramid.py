"""The pyramid against torchvision's own, and on what other pyramids refuse: odd sizes and equal strides."""

import pytest
import torch
from conftest import build, relative_error
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from backbone import freeze_report, freeze_stages, optimize_for_inference
from backbone.pyramid import FeaturePyramid
from backbone.recipe import ExtraLevels, SourceOfP6

LEVELS: dict[ExtraLevels, list[str]] = {
    "none": ["p2", "p3", "p4", "p5"],
    "maxpool": ["p2", "p3", "p4", "p5", "p6"],
    "p6p7": ["p2", "p3", "p4", "p5", "p6", "p7"],
}


@pytest.mark.parametrize("extra_levels", LEVELS)
@pytest.mark.parametrize("output_stride", [32, 16, 8])
@pytest.mark.parametrize("size", [(64, 64), (1, 1), (97, 131)])
def test_specs_tell_every_level_exactly(extra_levels: ExtraLevels, output_stride: int, size: tuple[int, int]) -> None:
    pyramid = FeaturePyramid(build(output_stride=output_stride), out_channels=8, extra_levels=extra_levels).eval()
    levels = pyramid(torch.rand(1, 3, *size))
    assert list(levels) == list(pyramid.feature_specs) == LEVELS[extra_levels]
    for name, spec in pyramid.feature_specs.items():
        assert levels[name].shape == (1, spec.channels, *(-(-side // spec.stride) for side in size))


@pytest.mark.parametrize("p6_from", ["p5", "c5"])
def test_levels_equal_torchvisions_own(p6_from: SourceOfP6) -> None:
    body = build()
    pyramid = FeaturePyramid(body, out_channels=16, extra_levels="p6p7", p6_from=p6_from).eval()
    extra = LastLevelP6P7(16 if p6_from == "p5" else 512, 16)
    theirs = FeaturePyramidNetwork([64, 128, 256, 512], 16, extra)
    theirs.load_state_dict(pyramid.fpn.state_dict())
    images = torch.rand(2, 3, 70, 90)
    for actual, expected in zip(pyramid(images).values(), theirs(body(images)).values(), strict=True):
        assert relative_error(actual, expected) < 1e-5


def test_p6_comes_from_c5_even_where_channels_are_equal() -> None:
    pyramid = FeaturePyramid(build(), out_channels=512, extra_levels="p6p7", p6_from="c5").eval()
    images = torch.rand(1, 3, 64, 64)
    expected = pyramid.fpn.extra_blocks.p6(pyramid.body(images)["c5"])
    assert torch.equal(pyramid(images)["p6"], expected)


def test_level_names_follow_the_backbones() -> None:
    pyramid = FeaturePyramid(build(out_features=["c3", "c4"]), extra_levels="p6p7")
    assert {name: spec.stride for name, spec in pyramid.feature_specs.items()} == {
        "p3": 8,
        "p4": 16,
        "p5": 32,
        "p6": 64,
    }


def test_logits_are_no_level() -> None:
    pyramid = FeaturePyramid(build(num_classes=10)).eval()
    assert list(pyramid(torch.rand(1, 3, 64, 64))) == LEVELS["none"]


def test_freezing_reaches_the_backbone_and_spares_the_pyramid() -> None:
    pyramid = FeaturePyramid(build())
    freeze_stages(pyramid, 3)
    assert [report.frozen for report in freeze_report(pyramid).values()] == [True, True, True, False, False]
    assert all(parameter.requires_grad for parameter in pyramid.fpn.parameters())


def test_pyramid_is_optimised_for_inference_with_its_backbone() -> None:
    pyramid = FeaturePyramid(build(), out_channels=16, extra_levels="maxpool").eval()
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        for actual, expected in zip(
            optimize_for_inference(pyramid)(images).values(), pyramid(images).values(), strict=True
        ):
            assert relative_error(actual, expected) < 1e-5


def test_pyramid_exports_and_compiles_to_the_same_levels() -> None:
    pyramid = FeaturePyramid(build(), out_channels=16, extra_levels="p6p7").eval()
    images = torch.rand(1, 3, 64, 96)
    exported = torch.export.export(pyramid, (images,)).module()
    for name, expected in pyramid(images).items():
        assert relative_error(exported(images)[name], expected) < 1e-5


INVALID = [
    ({"extra_levels": "p6"}, "extra_levels must be one of none, maxpool, p6p7, got 'p6'"),
    ({"extra_levels": "p6p7", "p6_from": "p4"}, "p6_from must be one of p5, c5, got 'p4'"),
    ({"extra_levels": "maxpool", "p6_from": "c5"}, "needs extra_levels: p6p7"),
]


@pytest.mark.parametrize(("settings", "rule"), INVALID)
def test_impossible_pyramid_is_refused(settings: dict[str, str], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        FeaturePyramid(build(), **settings)  # type: ignore[arg-type]
