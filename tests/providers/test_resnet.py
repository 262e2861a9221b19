"""The networks against torchvision's, timm's and detectron2's own classes with the same weights, and their shapes."""

import itertools
from typing import Any

import pytest
import timm
import torch
import torchvision
from conftest import build, randomise_norms, relative_error
from torch import Tensor, nn

from backbone import Backbone, freeze_norms, list_backbones
from backbone.providers.resnet.network import FAMILY

TOLERANCE = 1e-5
FEATURES = ("c2", "c3", "c4", "c5")
PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
}
IMAGE_SIZES = [(1, 1), (2, 3), (31, 33), (32, 64), (65, 97), (257, 333)]


def torchvision_features(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """C2 to C5 and logits of torchvision's own ResNet."""
    features, hooks = {}, []
    for name, layer in zip(FEATURES, ("layer1", "layer2", "layer3", "layer4"), strict=True):

        def keep(_module: nn.Module, _inputs: object, output: Tensor, name: str = name) -> None:
            features[name] = output

        hooks.append(network.get_submodule(layer).register_forward_hook(keep))
    features["logits"] = network(images)
    for hook in hooks:
        hook.remove()
    return features


def assert_same_features(ours: Backbone, theirs: dict[str, Tensor], images: Tensor) -> None:
    errors = {name: relative_error(feature, theirs[name]) for name, feature in ours.eval()(images).items()}
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 65, 97)


@pytest.mark.parametrize("name", [name for name, row in FAMILY.items() if not row.deep_stem])
@torch.no_grad()
def test_every_network_equals_torchvision(name: str, images: Tensor) -> None:
    reference = torchvision.models.get_model(name).eval()
    randomise_norms(reference)
    expected = torchvision_features(reference, images)
    ours = build(name, num_classes=1000)
    ours.load_state_dict(reference.state_dict(), strict=True)
    assert_same_features(ours, expected, images)
    freeze_norms(ours)
    assert_same_features(ours, expected, images)


@pytest.mark.parametrize("output_stride", [16, 8])
@torch.no_grad()
def test_dilation_equals_torchvision(output_stride: int, images: Tensor) -> None:
    dilated = [False, output_stride == 8, True]
    reference = torchvision.models.resnet50(replace_stride_with_dilation=dilated).eval()
    randomise_norms(reference)
    ours = build("resnet50", output_stride=output_stride, num_classes=1000)
    ours.load_state_dict(reference.state_dict(), strict=True)
    assert_same_features(ours, torchvision_features(reference, images), images)


@torch.no_grad()
def test_group_norm_equals_torchvision(images: Tensor) -> None:
    reference = torchvision.models.resnet50(norm_layer=lambda channels: nn.GroupNorm(32, channels)).eval()
    ours = build("resnet50", norm="gn", num_classes=1000)
    ours.load_state_dict(reference.state_dict(), strict=True)
    assert_same_features(ours, torchvision_features(reference, images), images)


@torch.no_grad()
def test_stride_in_1x1_equals_torchvision_with_the_strides_moved(images: Tensor) -> None:
    reference = torchvision.models.resnet50().eval()
    randomise_norms(reference)
    for name in ("layer2", "layer3", "layer4"):
        block: Any = reference.get_submodule(name + ".0")
        block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
    ours = build("resnet50", stride_in_1x1=True, num_classes=1000)
    ours.load_state_dict(reference.state_dict(), strict=True)
    assert_same_features(ours, torchvision_features(reference, images), images)


@pytest.mark.parametrize(
    ("name", "output_stride"),
    list(itertools.product(["resnet18", "resnet34", "resnet50", "resnext50_32x4d"], [32, 16, 8])),
)
@torch.no_grad()
def test_dilation_equals_timm(name: str, output_stride: int, images: Tensor) -> None:
    reference: Any = timm.create_model(name, output_stride=output_stride).eval()
    randomise_norms(reference)
    ours = build(name, output_stride=output_stride, num_classes=1000)
    ours.load_state_dict(reference.state_dict(), strict=True)
    features = reference.forward_intermediates(images, indices=[1, 2, 3, 4], intermediates_only=True)
    assert_same_features(ours, {**dict(zip(FEATURES, features, strict=True)), "logits": reference(images)}, images)


def to_detectron2(key: str) -> str:
    """Translate one of our parameter names to detectron2's."""
    if key.startswith(("conv1", "bn1")):
        return "stem." + key.replace("bn1", "conv1.norm")
    stage, block, rest = key.removeprefix("layer").split(".", 2)
    rest = rest.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm").replace("bn", "conv")
    norm = "bn" in key or "downsample.1" in key
    if norm and "shortcut" not in rest:
        convolution, parameter = rest.split(".", 1)
        rest = f"{convolution}.norm.{parameter}"
    return f"res{int(stage) + 1}.{block}.{rest}"


@pytest.mark.parametrize("stride_in_1x1", [False, True])
@pytest.mark.parametrize("res5_dilation", [1, 2])
@torch.no_grad()
def test_it_equals_detectron2(stride_in_1x1: bool, res5_dilation: int, images: Tensor) -> None:
    with_detectron2 = pytest.importorskip(
        "detectron2.modeling.backbone.resnet", reason="detectron2 is installed from its own repository"
    )
    from detectron2.config import get_cfg
    from detectron2.layers import ShapeSpec

    cfg = get_cfg()
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = stride_in_1x1
    cfg.MODEL.RESNETS.RES5_DILATION = res5_dilation
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    reference = with_detectron2.build_resnet_backbone(cfg, ShapeSpec(channels=3)).eval()
    randomise_norms(reference)
    ours = build("resnet50", stride_in_1x1=stride_in_1x1, output_stride=32 // res5_dilation, dilate_first_block=True)
    state = reference.state_dict()
    translated = {key: to_detectron2(key) for key in ours.state_dict() if not key.endswith("num_batches_tracked")}
    assert set(translated.values()) == set(state)
    ours.load_state_dict({key: state[theirs] for key, theirs in translated.items()}, strict=True)
    theirs = {f"c{name[-1]}": feature for name, feature in reference(images).items()}
    assert_same_features(ours, theirs, images)


@pytest.mark.parametrize(("name", "expected"), PARAMETERS.items())
def test_parameter_counts_are_the_papers(name: str, expected: int) -> None:
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in build(name, num_classes=1000).parameters()) == expected


@pytest.mark.parametrize("norm", ["frozen_bn", "bn", "sync_bn", "gn"])
@pytest.mark.parametrize("output_stride", [32, 16, 8])
@pytest.mark.parametrize("name", list_backbones())
def test_feature_specs_are_the_shapes_that_come_out(name: str, output_stride: int, norm: str) -> None:
    with torch.device("meta"):
        model = build(name, output_stride=output_stride, norm=norm).eval()
        features = model(torch.empty(1, 3, 70, 129))
    assert list(features) == list(model.feature_specs)
    for feature, spec in zip(features.values(), model.feature_specs.values(), strict=True):
        assert feature.shape == (1, spec.channels, -(-70 // spec.stride), -(-129 // spec.stride))


@pytest.mark.parametrize("size", IMAGE_SIZES)
@pytest.mark.parametrize("output_stride", [32, 8])
@torch.no_grad()
def test_sizes_round_up(size: tuple[int, int], output_stride: int) -> None:
    model = build(output_stride=output_stride).eval()
    for name, feature in model(torch.randn(1, 3, *size)).items():
        stride = model.feature_specs[name].stride
        assert feature.shape[2:] == tuple(-(-side // stride) for side in size)


def dilations(model: Backbone, layer: str) -> list[int | str]:
    return [
        m.dilation[0]
        for m in model.get_submodule(layer).modules()
        if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)
    ]


@pytest.mark.parametrize(
    ("name", "dilate_first_block", "c4", "c5"),
    [
        ("resnet50", False, [1, 2, 2, 2, 2, 2], [2, 4, 4]),
        ("resnet50", True, [2, 2, 2, 2, 2, 2], [4, 4, 4]),
        ("resnet18", False, [1, 2, 2, 2], [2, 4, 4, 4]),
        ("resnet18", True, [2, 2, 2, 2], [4, 4, 4, 4]),
    ],
)
def test_both_dilation_conventions_at_stride_8(
    name: str, dilate_first_block: bool, c4: list[int], c5: list[int]
) -> None:
    with torch.device("meta"):
        model = build(name, output_stride=8, dilate_first_block=dilate_first_block)
    assert (dilations(model, "layer3"), dilations(model, "layer4")) == (c4, c5)


def test_c5_keeps_stride_16_when_dilated() -> None:
    assert build(output_stride=16).feature_specs["c5"].stride == 16


def test_stages_beyond_the_features_are_not_built() -> None:
    model = build(out_features=["c3"])
    assert list(model.stages) == ["stem", "c2", "c3"]
    assert list(model(torch.randn(1, 3, 64, 64))) == ["c3"]
    assert not hasattr(model, "layer3")


def test_features_come_finest_first_whatever_the_order_asked_for() -> None:
    assert list(build(out_features=["c5", "c2"])(torch.randn(2, 3, 64, 64))) == ["c2", "c5"]


def test_the_classifier_builds_every_stage_and_adds_logits() -> None:
    model = build(out_features=["c2"], num_classes=7)
    features = model(torch.randn(2, 3, 64, 64))
    assert list(features) == ["c2", "logits"]
    assert features["logits"].shape == (2, 7)


@pytest.mark.parametrize("in_channels", [1, 4])
def test_images_may_have_any_number_of_channels(in_channels: int) -> None:
    assert build(in_channels=in_channels)(torch.randn(2, in_channels, 64, 64))["c5"].shape == (2, 512, 2, 2)


@pytest.mark.parametrize(
    "images",
    [torch.zeros(3, 64, 64), torch.zeros(1, 4, 64, 64), torch.zeros(1, 3, 64, 64, dtype=torch.uint8)],
    ids=["no batch", "four channels", "bytes"],
)
def test_images_of_the_wrong_kind_are_refused(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"images must be a floating-point tensor \(N, 3, H, W\), got"):
        build()(images)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_zero_init_residual_starts_each_block_as_its_shortcut(name: str) -> None:
    model = build(name, zero_init_residual=True).eval()
    x = torch.rand(1, model.feature_specs["c2"].channels, 8, 8)
    assert torch.equal(model.get_submodule("layer1.1")(x), x)


def test_stride_in_1x1_is_refused_where_there_is_no_1x1() -> None:
    with pytest.raises(ValueError, match="no 1x1 convolution to stride in, got true"):
        build("resnet18", stride_in_1x1=True)


@pytest.mark.parametrize("norm", ["bn", "frozen_bn", "gn"])
def test_recomputing_changes_neither_gradients_nor_statistics(norm: str, images: Tensor) -> None:
    plain = build(norm=norm)
    recomputing = build(norm=norm, checkpoint_stages=["c2", "c4"])
    recomputing.load_state_dict(plain.state_dict())
    for model in (plain, recomputing):
        model(images)["c5"].square().mean().backward()
    for (name, expected), actual in zip(plain.named_parameters(), recomputing.parameters(), strict=True):
        if expected.grad is not None:
            assert actual.grad is not None
            assert relative_error(actual.grad, expected.grad) <= TOLERANCE, name
    for key, value in plain.state_dict().items():
        assert torch.equal(value, recomputing.state_dict()[key]), key


def test_recomputing_saves_memory(images: Tensor) -> None:
    def saved_bytes(model: Backbone) -> int:
        saved: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(images)
        return sum(saved.values())

    every_stage = ["c2", "c3", "c4", "c5"]
    assert saved_bytes(build("resnet50", checkpoint_stages=every_stage)) < 0.5 * saved_bytes(build("resnet50"))


def test_stages_hold_every_parameter_once() -> None:
    model = build()
    in_stages = [parameter for modules in model.stages.values() for parameter in modules.parameters()]
    assert list(map(id, in_stages)) == list(map(id, model.parameters()))


@pytest.mark.parametrize(("output_stride", "expected"), [(32, 32), (16, 16), (8, 8)])
def test_size_divisibility_is_the_largest_stride(output_stride: int, expected: int) -> None:
    assert build(output_stride=output_stride).size_divisibility == expected
