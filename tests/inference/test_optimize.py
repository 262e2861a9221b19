"""An optimised copy gives the same outputs, has no norms left, and leaves the original alone."""

import copy
import itertools
import logging
import pickle
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torchvision
from conftest import build, randomise_norms, relative_error
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import prune
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FeaturePyramidNetwork

from backbone import Backbone, optimize_for_inference
from backbone.providers.resnet.network import FAMILY


def trained(name: str = "resnet18", **settings: object) -> Backbone:
    model = build(name, **settings)
    randomise_norms(model)
    return model


@pytest.mark.parametrize("norm", ["frozen_bn", "bn", "sync_bn"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
@torch.no_grad()
def test_features_stay_the_same_and_no_norm_is_left(name: str, norm: str) -> None:
    model = trained(name, norm=norm, output_stride=16)
    images = torch.randn(2, 3, 65, 97)
    expected = model.eval()(images)
    fast = optimize_for_inference(model)
    assert not [module for module in fast.modules() if "Norm" in type(module).__name__]
    actual = fast(images)
    assert max(relative_error(actual[level], expected[level]) for level in expected) <= 1e-5


@pytest.mark.parametrize("name", FAMILY)
def test_every_norm_of_every_network_is_folded(name: str) -> None:
    with torch.device("meta"):
        model = build(name, num_classes=10)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert optimize_for_inference(model).optimization.folded == norms  # type: ignore[union-attr]


@torch.no_grad()
def test_logits_stay_the_same() -> None:
    model = trained(num_classes=10).eval()
    images = torch.randn(2, 3, 64, 64)
    assert relative_error(optimize_for_inference(model)(images)["logits"], model(images)["logits"]) <= 1e-5


@torch.no_grad()
def test_bfloat16_takes_float_images_and_returns_bfloat16() -> None:
    model = trained(norm="frozen_bn").eval()
    images = torch.randn(1, 3, 64, 64)
    fast = optimize_for_inference(model, dtype=torch.bfloat16)
    for features in (fast(images), fast(images=images)):
        assert {feature.dtype for feature in features.values()} == {torch.bfloat16}
    assert relative_error(features["c5"], model(images)["c5"]) < 3e-2


def test_the_original_stays_as_it_was() -> None:
    model = trained(norm="bn").train()
    state, text = copy.deepcopy(model.state_dict()), str(model)
    optimize_for_inference(model)
    assert (str(model), model.training) == (text, True)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


@torch.no_grad()
def test_group_norms_are_kept_and_named() -> None:
    model = trained(norm="gn").eval()
    fast: Any = optimize_for_inference(model)
    images = torch.randn(1, 3, 64, 64)
    assert fast.optimization.kept[0] == "bn1"
    assert relative_error(fast(images)["c5"], model(images)["c5"]) <= 1e-5


def test_it_says_what_it_did(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="backbone"):
        optimize_for_inference(trained())
    assert "folded 20 norms, prepared 0 other convolutions and 0 linear layers, computes in float32" in caplog.text


@pytest.mark.parametrize("copying", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@torch.no_grad()
def test_a_used_optimised_model_can_be_copied(copying: Any) -> None:
    fast = optimize_for_inference(trained())
    images = torch.randn(1, 3, 64, 64)
    expected = fast(images)["c5"]
    assert torch.equal(copying(fast)(images)["c5"], expected)


EDITS: dict[str, Callable[[Any], object]] = {
    "in place": lambda conv: conv.weight.mul_(2),
    "of one channel of the bias": lambda conv: conv.bias[3].add_(1),
    "through a new parameter": lambda conv: setattr(conv, "weight", nn.Parameter(conv.weight * 2)),
    "through two new .data": lambda conv: [setattr(conv.weight, "data", conv.weight.data * 2) for _ in range(2)],  # type: ignore[func-returns-value]
    "through a new .data": lambda conv: setattr(conv.weight, "data", conv.weight * 2),
}


@pytest.mark.parametrize("keep_weights", [True, False])
@pytest.mark.parametrize("edit", EDITS)
@torch.no_grad()
def test_an_edit_of_an_optimised_model_is_seen(edit: str, keep_weights: bool) -> None:
    model = trained("resnet50", norm="frozen_bn", out_features=["c4"])
    fast = optimize_for_inference(model, keep_weights=keep_weights)
    images = torch.randn(1, 3, 192, 192)
    for _ in range(3):
        before = fast(images)["c4"]
    EDITS[edit](fast.get_submodule("layer3.1.conv2"))
    after = fast(images)["c4"]
    assert relative_error(after, before) > 1e-3
    assert relative_error(after, copy.deepcopy(fast)(images)["c4"]) <= 1e-5


@torch.no_grad()
def test_threads_on_a_copy_without_plain_weights_lose_none() -> None:
    model = nn.Sequential(*[nn.Conv2d(4, 4, 3, padding=1) for _ in range(12)])
    images = [torch.randn(1, 4, 8, 8), torch.randn(1, 4, 12, 8)]
    expected = [model(image) for image in images]

    def run(first: int) -> float:
        numbers = [(first + step // 3) % 2 for step in range(12)]
        return max(relative_error(own(images[number]), expected[number]) for number in numbers)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(6) as pool:
            for _ in range(25):
                own = optimize_for_inference(model, keep_weights=False)
                assert max(pool.map(run, range(6))) <= 1e-5
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.engine
@pytest.mark.parametrize("keep_weights", [True, False])
@torch.no_grad()
def test_a_copy_of_a_copy_keeps_the_weights_it_is_told_to(keep_weights: bool) -> None:
    images = torch.randn(1, 3, 64, 64)
    fast = optimize_for_inference(trained(), keep_weights=not keep_weights)
    fast = optimize_for_inference(fast, keep_weights=keep_weights)
    for _ in range(3):
        fast(images)
    assert ("conv1.weight" in dict(fast.named_parameters())) == keep_weights


@pytest.mark.parametrize("keep_weights", [True, False])
@torch.no_grad()
def test_a_used_copy_can_be_pruned(keep_weights: bool) -> None:
    model, images = trained(), torch.randn(1, 3, 64, 64)
    fast = optimize_for_inference(model, keep_weights=keep_weights)
    for _ in range(3):
        fast(images)
    for network in (fast, model.eval()):
        conv: Any = network.get_submodule("layer2.0.conv1")
        prune.random_structured(conv, "weight", 0.5, dim=1)  # type: ignore[no-untyped-call]
        conv.weight_mask[:, ::2], conv.weight_mask[:, 1::2] = 0, 1
    for _ in range(3):
        assert relative_error(fast(images)["c5"], model(images)["c5"]) <= 1e-5
    prune.remove(fast.get_submodule("layer2.0.conv1"), "weight")  # type: ignore[no-untyped-call]
    for _ in range(3):
        assert relative_error(fast(images)["c5"], model(images)["c5"]) <= 1e-5


@torch.no_grad()
def test_a_used_copy_without_plain_weights_can_be_traced() -> None:
    fast, images = optimize_for_inference(trained(), keep_weights=False), torch.randn(1, 3, 64, 64)
    for _ in range(3):
        expected = fast(images)["c5"]
    assert relative_error(torch.fx.symbolic_trace(fast)(images)["c5"], expected) <= 1e-5


@torch.inference_mode()
def test_an_edit_of_a_model_optimised_in_inference_mode_is_seen() -> None:
    fast, images = optimize_for_inference(trained()), torch.randn(1, 3, 64, 64)
    assert not any(parameter.is_inference() for parameter in fast.parameters())
    for _ in range(3):
        fast(images)
    fast.get_parameter("layer3.1.conv2.weight").mul_(2)
    assert relative_error(fast(images)["c5"], copy.deepcopy(fast)(images)["c5"]) <= 1e-5


@torch.no_grad()
def test_weights_that_stand_in_for_a_call_are_used_for_that_call() -> None:
    fast, images = optimize_for_inference(trained()), torch.randn(1, 3, 64, 64)
    other = copy.deepcopy(fast)
    for factor in (1.0, 1.1, 1.2, 1.3):  # in the same memory, if the last ones are gone
        weights = {name: parameter * factor for name, parameter in fast.named_parameters()}
        other.load_state_dict(weights)
        assert relative_error(functional_call(fast, weights, (images,))["c5"], other(images)["c5"]) <= 1e-5
        del weights


@pytest.mark.parametrize("is_half", [True, False])
@pytest.mark.parametrize("looks", [True, False])
def test_a_fused_optimizer_that_trains_an_optimised_model_is_seen(looks: bool, is_half: bool) -> None:
    """Its step moves no version counter."""
    fast, images = optimize_for_inference(trained()), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for _ in range(3):
            fast(images)
    optimizer = torch.optim.SGD(fast.requires_grad_().parameters(), lr=0.1, fused=True)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
            loss = fast(images)["c5"].square().mean()
        loss.backward()
        optimizer.step()
        if looks:
            with torch.no_grad():
                fast(images)
    optimizer.step()
    fast.requires_grad_(False)
    assert relative_error(fast(images)["c5"], copy.deepcopy(fast)(images)["c5"]) <= 1e-5


@torch.no_grad()
def test_an_optimised_model_runs_in_the_replicas_of_data_parallel() -> None:
    fast, images = optimize_for_inference(trained()), torch.randn(1, 3, 64, 64)
    replicas = {module: module._replicate_for_data_parallel() for module in fast.modules()}  # type: ignore[no-untyped-call]
    for module, replica in replicas.items():
        replica._modules = {name: child and replicas[child] for name, child in module._modules.items()}
        replica.__dict__.update(module._parameters)  # where replicate() puts what is no Parameter
    assert relative_error(replicas[fast](images)["c5"], fast(images)["c5"]) <= 1e-5


@torch.no_grad()
def test_a_norm_with_a_hook_and_a_relu_is_called() -> None:
    model: Any = build("timm/regnetx_002", norm="frozen_bn").eval()
    randomise_norms(model)
    model.network.stem.bn.register_forward_hook(lambda *of: of[2] / 2)
    images = torch.randn(1, 3, 64, 64)
    expected = model(images)["c2"]
    assert relative_error(optimize_for_inference(model)(images)["c2"], expected) <= 1e-5


def test_biases_of_an_optimised_model_can_be_trained_alone() -> None:
    fast, images = optimize_for_inference(trained()), torch.randn(1, 3, 64, 64)
    biases = [parameter.requires_grad_() for name, parameter in fast.named_parameters() if name.endswith("bias")]
    fast(images)["c5"].sum().backward()
    assert all(bias.grad is not None for bias in biases)


class Late(nn.Sequential):
    """No row: the norm sees more than the convolution's output."""

    def forward(self, x: Tensor) -> Tensor:
        conv, norm = self
        return norm(conv(x) + 1)  # type: ignore[no-any-return]


HOOKED: dict[str, Callable[[Any], object]] = {
    "a forward hook of a convolution": lambda model: model.layer2[0].conv1.register_forward_hook(lambda *of: of[2] / 2),
    "a pre-hook of a norm": lambda model: model.layer2[0].bn1.register_forward_pre_hook(lambda *of: (of[1][0] / 2,)),
    "a hook of a projection's norm": lambda model: (
        model.layer2[0].downsample[1].register_forward_hook(lambda *of: of[2] / 2)
    ),
    "a replaced forward": lambda model: halve(model.layer2[0].conv1),
    "a replaced forward of a row": lambda model: lift(model.layer2[0].downsample),
    "a Sequential with a forward of its own": lambda model: setattr(model.layer2[0], "downsample", late()),
}


def halve(conv: nn.Conv2d) -> None:
    conv.forward = lambda x: nn.Conv2d.forward(conv, x) / 2  # type: ignore[method-assign, assignment]


def lift(row: nn.Sequential) -> None:
    conv, norm = row
    row.forward = lambda x: norm(conv(x) + 1)  # type: ignore[method-assign]


def late() -> Late:
    layers = Late(nn.Conv2d(64, 128, 1, 2, bias=False), nn.BatchNorm2d(128)).eval()
    randomise_norms(layers)
    return layers


@pytest.mark.parametrize("hook", HOOKED)
@torch.no_grad()
def test_what_computes_besides_a_layer_goes_on_computing(hook: str) -> None:
    model, images = trained(norm="frozen_bn").eval(), torch.randn(1, 3, 64, 64)
    before = model(images)["c5"]
    HOOKED[hook](model)
    expected = model(images)["c5"]
    assert relative_error(before, expected) > 1e-3
    assert relative_error(optimize_for_inference(model)(images)["c5"], expected) <= 1e-5


@torch.no_grad()
def test_switching_onednn_off_after_packing_works() -> None:
    fast, images = optimize_for_inference(trained()), torch.randn(1, 3, 64, 64)
    expected = [fast(images)["c5"] for _ in range(3)][-1]
    torch._C._set_mkldnn_enabled(False)
    try:
        assert relative_error(fast(images)["c5"], expected) <= 1e-5
    finally:
        torch._C._set_mkldnn_enabled(True)


@torch.no_grad()
def test_another_default_dtype_changes_nothing() -> None:
    fast = optimize_for_inference(trained("resnet50", norm="frozen_bn", out_features=["c4"]))
    images = torch.randn(1, 3, 192, 192)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert [fast(images)["c4"].dtype for _ in range(4)] == [torch.float32] * 4
    finally:
        torch.set_default_dtype(torch.float32)


class Odd(nn.Module):
    """A model whose parts look unlike ours."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = "a name"
        self.same = nn.Sequential(nn.Conv2d(3, 8, 3, padding="same"), nn.BatchNorm2d(8))
        self.with_activation = nn.Sequential(nn.Conv2d(8, 8, 1), BatchNormAct2d(8))

    def forward(self, image: Tensor) -> Tensor:
        return self.with_activation(self.same(image))  # type: ignore[no-any-return]


@torch.no_grad()
def test_unlike_models_keep_their_outputs() -> None:
    model, images = Odd().eval(), torch.randn(2, 3, 16, 16)
    assert relative_error(optimize_for_inference(model)(images), model(images)) <= 1e-5
    conv = nn.Sequential(nn.Conv2d(3, 8, 3))
    assert relative_error(optimize_for_inference(conv)(images[0]), conv(images[0])) <= 1e-5


def test_a_model_without_parameters_is_fine() -> None:
    assert isinstance(optimize_for_inference(nn.ReLU()), nn.ReLU)


@torch.no_grad()
def test_new_weights_in_an_optimised_model_are_used() -> None:
    fast, images = optimize_for_inference(trained()), torch.randn(1, 3, 64, 64)
    fast(images)
    other = optimize_for_inference(trained())
    fast.load_state_dict(other.state_dict())
    assert torch.equal(fast(images)["c5"], other(images)["c5"])


def test_an_optimised_model_lets_gradients_reach_the_image() -> None:
    images = torch.randn(1, 3, 64, 64, requires_grad=True)
    optimize_for_inference(trained())(images)["c5"].sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@torch.no_grad()
def test_an_optimised_model_exports(dtype: torch.dtype | None) -> None:
    fast, images = optimize_for_inference(trained(), dtype=dtype), torch.randn(2, 3, 64, 64)
    program = torch.export.export(fast, (images,))
    assert relative_error(program.module()(images)["c5"], fast(images)["c5"]) <= (3e-2 if dtype else 1e-5)


def test_a_dtype_that_is_no_float_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dtype must be one of torch.float16, .* got torch.int16"):
        optimize_for_inference(trained(), dtype=torch.int16)


class Levels(nn.Module):
    """Our backbone under the keys of torchvision's pyramid."""

    def __init__(self, model: Backbone) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {str(index): feature for index, feature in enumerate(self.model(images).values())}


class WithPyramid(nn.Module):
    """Our backbone and torchvision's FPN."""

    def __init__(self, model: Backbone) -> None:
        super().__init__()
        self.model = model
        self.fpn = FeaturePyramidNetwork([spec.channels for spec in model.feature_specs.values()], 32)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.fpn(self.model(images))  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@torch.no_grad()
def test_the_pyramid_is_optimised_with_its_backbone(dtype: torch.dtype | None) -> None:
    model = WithPyramid(trained()).eval()
    fast: Any = optimize_for_inference(model, dtype=dtype)
    images = torch.randn(1, 3, 96, 64)
    assert fast.optimization.prepared == 8
    for level, expected in model(images).items():
        assert relative_error(fast(images)[level], expected) <= (3e-2 if dtype else 1e-5)


@pytest.mark.parametrize("detector", ["fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn"])
@torch.no_grad()
def test_a_torchvision_detector_detects_the_same(detector: str) -> None:
    model: Any = torchvision.models.get_model(
        detector, weights=None, weights_backbone=None, num_classes=5, min_size=96, max_size=96
    )
    randomise_norms(model)
    assert isinstance(model.backbone, BackboneWithFPN)
    levels = ["c3", "c4", "c5"] if detector.startswith("retinanet") else ["c2", "c3", "c4", "c5"]
    ours = trained("resnet50", norm="frozen_bn", out_features=levels)
    ours.load_state_dict(model.backbone.body.state_dict())
    model.backbone.body = Levels(ours)
    images = [torch.rand(3, 96, 80)]
    model.eval()
    expected, actual = model(images)[0], optimize_for_inference(model)(images)[0]
    assert torch.equal(actual["labels"], expected["labels"])
    torch.testing.assert_close(actual["boxes"], expected["boxes"], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(actual["scores"], expected["scores"], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:cuda_graphs=True needs a CUDA device")
@torch.no_grad()
def test_a_detector_in_bfloat16_keeps_its_heads_in_float() -> None:
    model: Any = torchvision.models.get_model(
        "fasterrcnn_resnet50_fpn", weights=None, weights_backbone=None, min_size=96, max_size=96
    )
    fast: Any = optimize_for_inference(model, dtype=torch.bfloat16)
    assert {feature.dtype for feature in fast.backbone(torch.rand(1, 3, 96, 96)).values()} == {torch.float32}
    assert fast([torch.rand(3, 96, 80)])[0]["scores"].dtype == torch.float32
    pickle.loads(pickle.dumps(fast))
    for dtype, cuda_graphs in itertools.product((torch.bfloat16, torch.float32), (True, False)):
        again: Any = optimize_for_inference(
            optimize_for_inference(fast, dtype=torch.bfloat16, cuda_graphs=cuda_graphs), dtype=dtype
        )
        assert next(again.backbone.parameters()).dtype == dtype
        assert again([torch.rand(3, 96, 80)])[0]["scores"].dtype == torch.float32


class Masking(nn.Module):
    """As the backbones of DETR and its kin: features with the masks of their padding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, images: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [(self.conv(images), mask)]


def test_masks_stay_masks_in_half_precision() -> None:
    model = nn.Module()
    model.backbone = Masking()
    fast: Any = optimize_for_inference(model, dtype=torch.bfloat16)
    ((feature, mask),) = fast.backbone(torch.randn(1, 3, 8, 8), torch.ones(1, 8, 8, dtype=torch.bool))
    assert (feature.dtype, mask.dtype) == (torch.float32, torch.bool)


@torch.no_grad()
def test_images_may_stay_float_whatever_the_first_layer_is() -> None:
    model: Any = build("timm/tf_efficientnet_lite0").eval()
    images = torch.randn(1, 3, 64, 64)
    assert type(next(model.network.children())) is not nn.Conv2d
    fast = optimize_for_inference(model, dtype=torch.bfloat16)
    for features in (fast(images), fast(images=images)):
        assert {feature.dtype for feature in features.values()} == {torch.bfloat16}


@pytest.mark.engine
@torch.no_grad()
def test_a_shape_that_comes_again_may_take_another_path_to_the_same_features() -> None:
    model = trained("resnet50", norm="frozen_bn").eval()
    fast = optimize_for_inference(model)
    wide: Any = fast.get_submodule("layer3.1.conv2")
    found = []
    for size, times in {(192, 256): 3, (160, 256): 8, (129, 256): 3, (224, 256): 2}.items():
        for _ in range(times):
            images = torch.randn(1, 3, *size)
            actual, expected = fast(images), model(images)
            assert max(relative_error(actual[level], expected[level]) for level in expected) <= 1e-5
        found.append((wide._prepared.shape, wide._prepared.winograd is not None))
    first, patient, later, larger = found
    assert first == patient == (torch.Size((1, 256, 12, 16)), True)  # a few smaller images change nothing
    assert later == (torch.Size((1, 256, 9, 16)), True)
    assert larger == (torch.Size((1, 256, 14, 16)), False)


@pytest.mark.engine
@torch.no_grad()
def test_a_head_shared_between_levels_is_prepared_for_the_finest() -> None:
    head = nn.Sequential(nn.Conv2d(128, 128, 3, padding=1))
    fast: Any = optimize_for_inference(head)
    for _ in range(3):
        for size in (32, 16, 8, 4):
            x = torch.randn(1, 128, size, size)
            assert relative_error(fast(x), head(x)) <= 1e-5
    assert fast[0]._prepared.shape[-1] == 32
    assert fast[0]._prepared.winograd is not None


@torch.no_grad()
def test_a_part_that_was_optimised_earlier_takes_the_dtype_of_the_whole() -> None:
    model: Any = build("timm/tf_efficientnet_lite0").eval()
    images = torch.randn(1, 3, 64, 64)
    whole = nn.Sequential(optimize_for_inference(model, dtype=torch.bfloat16))
    assert optimize_for_inference(whole, dtype=torch.float32)(images)["c5"].dtype == torch.float32


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@torch.no_grad()
def test_linear_layers_take_nested_input() -> None:
    layer, rows = nn.Linear(5, 3), [torch.randn(2, 5), torch.randn(4, 5)]
    found = optimize_for_inference(layer)(torch.nested.nested_tensor(rows)).unbind()
    assert all(relative_error(actual, layer(row)) <= 1e-5 for actual, row in zip(found, rows, strict=True))


def test_linear_layers_take_sparse_input() -> None:
    layer = nn.Linear(5, 3)
    x = torch.randn(4, 5)
    with torch.no_grad():
        assert relative_error(optimize_for_inference(layer)(x.to_sparse()), layer(x)) <= 1e-5


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (0, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_stay_the_same(shape: tuple[int, ...], bias: bool) -> None:
    model = nn.Sequential(nn.Linear(5, 4, bias=bias))
    fast: Any = optimize_for_inference(model)
    x = torch.randn(shape).transpose(0, -1).contiguous().transpose(0, -1)  # rows that are not contiguous
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-6)
    assert fast.optimization.linear == 1
    assert fast.double()(x.double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert fast.float()(x).dtype == torch.bfloat16
    leaf = x.requires_grad_()
    fast(leaf).sum().backward()
    assert leaf.grad is not None


@torch.no_grad()
def test_autocast_is_honoured_around_an_optimised_model() -> None:
    fast = optimize_for_inference(trained(norm="frozen_bn"))
    with torch.autocast("cpu", torch.bfloat16):
        assert fast(torch.randn(1, 3, 64, 64))["c5"].dtype == torch.bfloat16


@pytest.mark.engine
@torch.no_grad()
def test_a_state_dict_waits_for_a_weight_that_is_being_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = optimize_for_inference(build("resnet18").eval(), keep_weights=False)
    images = torch.randn(1, 3, 64, 64)
    model(images), model(images)
    keys = list(model.state_dict())
    conv, save = model.layer4[1].conv2, nn.Module._save_to_state_dict
    assert conv.weight is not None  # who looks has it plain again
    calls = []

    def save_later(module: nn.Module, *args: Any) -> None:
        if module is conv:
            calls.append(threading.Thread(target=model, args=(images,)))
            calls[0].start()
            calls[0].join(0.5)  # another thread's call would pack it meanwhile
        save(module, *args)

    monkeypatch.setattr(nn.Module, "_save_to_state_dict", save_later)
    assert sorted(model.state_dict()) == sorted(keys)
    calls[0].join()
