"""dilations and multi_grid: what DeepLab's recipes ask for beyond an output stride."""

import pytest
import torch
from conftest import build
from torch import nn

from backbone import Backbone, BackboneConfig
from backbone.weights.metadata import Metadata, cross_check

# Dilations of the 3x3 convolutions, block by block, in C4 and C5.
OF_RESNET_50 = [
    # detectron2's DeepLab: RES5_DILATION 2 times RES5_MULTI_GRID [1, 2, 4]
    ({"output_stride": 16, "multi_grid": [1, 2, 4], "dilate_first_block": True}, [1] * 6, [2, 4, 8]),
    # the same at output stride 8: RES4_DILATION 2, RES5_DILATION 4
    ({"output_stride": 8, "multi_grid": [1, 2, 4], "dilate_first_block": True}, [2] * 6, [4, 8, 16]),
    # a grid reaches the first block whatever the convention
    ({"output_stride": 16, "multi_grid": [1, 2, 4]}, [1] * 6, [2, 4, 8]),
    ({"multi_grid": [1, 2, 4]}, [1] * 6, [1, 2, 4]),
    # mmsegmentation's dilations=(1, 1, 2, 4) with and without contract_dilation
    ({"output_stride": 8, "dilations": [1, 1, 2, 4]}, [1, 2, 2, 2, 2, 2], [2, 4, 4]),
    ({"output_stride": 8, "dilations": [1, 1, 2, 4], "dilate_first_block": True}, [2] * 6, [4] * 3),
    # dilated without giving up a stride, and undilated without one
    ({"dilations": [1, 1, 1, 3], "dilate_first_block": True}, [1] * 6, [3] * 3),
    ({"output_stride": 16, "dilations": [1, 1, 1, 1]}, [1] * 6, [1] * 3),
]


def dilations(model: Backbone, stage: str) -> list[int]:
    convs = [m for m in model.stages[stage].modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert all(conv.padding == conv.dilation for conv in convs)
    return [conv.dilation[0] for conv in convs]


@pytest.mark.parametrize(("settings", "c4", "c5"), OF_RESNET_50, ids=str)
def test_resnet50_has_the_dilations_of_the_recipes(settings: dict[str, object], c4: list[int], c5: list[int]) -> None:
    with torch.device("meta"):
        model = build("resnet50", **settings)
    assert (dilations(model, "c4"), dilations(model, "c5")) == (c4, c5)


def test_basic_blocks_take_a_grid_in_both_convolutions() -> None:
    model = build("resnet18", output_stride=16, multi_grid=[1, 2])
    assert dilations(model, "c5") == [2, 2, 4, 4]


@pytest.mark.parametrize("settings", [{"dilations": [1, 2, 3, 4]}, {"multi_grid": [2, 5]}], ids=str)
def test_sizes_and_strides_stay_those_of_the_output_stride(settings: dict[str, object]) -> None:
    model, plain = (build("resnet18", output_stride=16, **each).eval() for each in (settings, {}))
    images = torch.randn(1, 3, 65, 97)
    with torch.no_grad():
        features, expected = model(images), plain(images)
    assert model.feature_specs == plain.feature_specs
    assert [f.shape for f in features.values()] == [f.shape for f in expected.values()]
    plain.load_state_dict(model.state_dict())  # and so do parameters


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dilations": [1, 1, 2]}, "must be null or a list of four integers"),
        ({"dilations": [1, 1, 2, 0]}, "must be null or a list of four integers"),
        ({"multi_grid": []}, "must be null or a list of integers"),
        (
            {"multi_grid": [1, 2, 4], "out_features": ["c4"]},
            "multi_grid dilates the blocks of c5, which out_features c4",
        ),
        ({"multi_grid": [1, 2]}, "multi_grid must have one entry for each of the 3 blocks of c5, got"),
        ({"name": "timm/resnet18", "multi_grid": [1, 2]}, "multi_grid must be null: timm has none"),
        ({"name": "timm/resnet18", "dilations": [1, 1, 1, 2]}, "dilations must be null: timm dilates by output_stride"),
    ],
    ids=str,
)
def test_what_cannot_be_honoured_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        build(**{"name": "resnet50", **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize("convention", [True, False])
def test_weights_of_either_convention_load_under_a_grid(convention: bool) -> None:
    with torch.device("meta"):
        model = build("resnet50", output_stride=16, multi_grid=[1, 2, 4])
    cross_check(model, Metadata("a test", known=True, dilate_first_block=convention), "weights")


def test_a_list_in_a_config_becomes_a_tuple_as_everywhere() -> None:
    config = BackboneConfig.model_validate({"name": "resnet50", "multi_grid": [1, 2, 4], "dilations": [1, 1, 2, 4]})
    assert (config.multi_grid, config.dilations) == ((1, 2, 4), (1, 1, 2, 4))
