"""timm's blocks on our fused operations, held against the same blocks with timm's own forward."""

import copy
import io
import pickle
import sys
from types import FrameType
from typing import Any

import pytest
import torch
from conftest import build, randomise_norms, relative_error, saved_mebibytes
from timm.layers.drop import DropBlock2d, DropPath
from timm.layers.norm_act import BatchNormAct2d
from timm.models.resnet import Bottleneck
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from backbone import FrozenBatchNorm2d, freeze_norms, optimize_for_inference
from backbone.providers.timm import fused as timm_fused
from backbone.providers.timm.fused import FusedBottleneck

# One model for each way through the blocks -> how many frozen norms still run on their own.
MODELS = {
    "resnet18": 1,  # the stem's, which is no block
    "resnext50_32x4d": 1,
    "resnet26d": 1,  # a stem of three convolutions, shortcuts that pool before they project
    "seresnet50": 49,  # attention in every block, so that only shortcuts remain
    "resnetblur50": 10,  # the blocks that stride blur as well: timm's own forward
    "regnetx_002": 0,
    "regnety_002": 0,  # attention between the units
    "regnetz_005": 43,  # SiLU, which is no part of the operation
    "cspresnet50": 38,  # leaky ReLU
    "vovnet39a": 0,  # units alone
}


def pair(model: str, **settings: object) -> tuple[nn.Module, nn.Module]:
    """Return a model with frozen norms in double precision, and the same with timm's own forward."""
    ours = build(f"timm/{model}", norm="frozen_bn", **settings).double()
    randomise_norms(ours)
    return ours, with_timms_forward(ours)


def with_timms_forward(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for module in model.modules():
        if type(module).__module__ == timm_fused.__name__:
            (module.__class__,) = type(module).__bases__
    return model


def features_and_gradients(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    images = images.clone().requires_grad_()
    features = model(images)
    sum(feature.square().mean() for feature in features.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert images.grad is not None
    return {**features, **gradients, "images": images.grad}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("model", MODELS)
def test_features_and_gradients_equal_timms(model: str, training: bool) -> None:
    ours, timms = (each.train(training) for each in pair(model))
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    actual, expected = features_and_gradients(ours, images), features_and_gradients(timms, images)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(actual[name], value) <= 1e-10, name
    with torch.no_grad():
        for name, feature in ours(images).items():
            assert relative_error(feature, expected[name]) <= 1e-10, name


@pytest.mark.parametrize("model", MODELS)
def test_norms_are_folded_where_the_block_allows(model: str) -> None:
    ours, _ = pair(model)
    calls = 0

    def count(frame: FrameType, event: str, _: object) -> None:  # a replaced forward would be seen, and called
        nonlocal calls
        calls += event == "call" and frame.f_code is FrozenBatchNorm2d.forward.__code__

    sys.setprofile(count)
    try:
        ours(torch.randn(1, 3, 64, 64, dtype=torch.float64))
    finally:
        sys.setprofile(None)
    assert calls == MODELS[model]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", MODELS)
def test_features_without_gradient_equal_timms_whatever_kernel_there_is(model: str, dtype: torch.dtype) -> None:
    ours, timms = (each.to(dtype).float() for each in pair(model))  # weights that both dtypes can hold
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        actual = ours(images)
    with torch.no_grad():
        expected = timms(images)
    for name, feature in expected.items():
        assert relative_error(actual[name], feature) <= (1e-5 if dtype == torch.float32 else 5e-2), name
        assert actual[name].dtype == dtype


@pytest.mark.parametrize("stride", [32, 8])
@pytest.mark.parametrize("model", ["resnet50", "regnety_002"])
def test_a_frozen_half_learns_as_timms(model: str, stride: int) -> None:
    ours = build(f"timm/{model}", freeze_at=3, output_stride=stride).double().train()
    timms = with_timms_forward(ours)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    actual, expected = features_and_gradients(ours, images), features_and_gradients(timms, images)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(actual[name], value) <= 1e-10, name


@pytest.mark.parametrize("model", ["resnet18", "regnety_002"])
def test_trainable_norms_learn_as_timms(model: str) -> None:
    ours = build(f"timm/{model}").double().train()
    timms = with_timms_forward(ours)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    actual, expected = features_and_gradients(ours, images), features_and_gradients(timms, images)
    for name, value in expected.items():
        assert relative_error(actual[name], value) <= 1e-10, name
    for name, value in timms.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


def num_relus(network: nn.Module, images: Tensor) -> int:
    """How many ReLUs ran as operations of their own."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as seen:
        network(images)
    counts = {event.key: event.count for event in seen.key_averages()}
    return int(counts.get("aten::relu", 0) + counts.get("aten::relu_", 0))


@pytest.mark.parametrize("model", ["resnet50", "regnetx_002", "regnety_002"])
def test_inference_copy_adds_and_rectifies_in_the_convolution(model: str) -> None:
    ours, timms = (network.float().eval() for network in pair(model))
    fast: Any = optimize_for_inference(ours)
    images = torch.randn(1, 3, 64, 64)
    for name, expected in timms(images).items():
        assert relative_error(fast(images)[name], expected) <= 1e-5
    in_attention = sum(name.endswith("se.act") for name, _ in fast.named_modules())
    assert num_relus(fast, images) - in_attention == (1 if model == "resnet50" else 0)  # the stem's


def test_activation_of_a_norm_in_a_sequence_joins_the_convolution() -> None:
    network = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), BatchNormAct2d(8))).eval()
    randomise_norms(network)
    network.requires_grad_(False)
    images = torch.randn(2, 3, 8, 8)
    expected = network(images)
    timm_fused.fuse(network)
    freeze_norms(network)
    folded = optimize_for_inference(network)
    for fast in (network, folded):
        assert relative_error(fast(images), expected) <= 1e-5
        assert num_relus(fast, images) == 0


def test_drop_path_drops_in_training_only() -> None:
    block: Any = frozen_bottleneck(DropPath(0.5))
    x = torch.randn(64, 64, 4, 4)
    assert relative_error(block.eval()(x), timms_forward(block, x)) <= 1e-5
    dropped = (block.train()(x) == x.relu()).flatten(1).all(1)
    assert 0 < dropped.sum() < len(x)


@pytest.mark.parametrize("path", ["layer1.1.act2", "layer1.1.conv1", "layer1.1", "layer2.1.act1"])
def test_what_a_hook_keeps_of_a_resnet_is_not_overwritten(path: str) -> None:
    hook_keeps_what_it_saw("resnet18", path)


@pytest.mark.parametrize("path", ["s4.b2.act3", "s4.b3.conv1", "s4.b3.downsample", "s4.b3.conv1.bn.act", "s4.b3.conv3"])
def test_what_a_hook_keeps_of_a_regnet_is_not_overwritten(path: str) -> None:
    hook_keeps_what_it_saw("regnety_002", path)


def hook_keeps_what_it_saw(model: str, path: str) -> None:
    network: Any = pair(model)[0].float().eval()
    kept: list[tuple[Tensor, Tensor]] = []

    def keep(_module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        kept.extend((each, each.clone()) for each in (*inputs, output))

    module = network.network.get_submodule(path)
    module.register_forward_hook(keep)
    with torch.no_grad():
        network(torch.randn(1, 3, 64, 64))
    in_place = isinstance(module, nn.ReLU)  # timm's own act overwrites its input
    assert kept
    assert all(torch.equal(seen, then) for seen, then in kept[in_place:])


@pytest.mark.parametrize("path", ["conv", "bn", "bn.drop", "bn.act"])
def test_hook_in_a_unit_is_called(path: str) -> None:
    network: Any = pair("regnetx_002")[0].float()
    calls = []
    unit = network.network.s2.b1.conv1
    unit.get_submodule(path).register_forward_hook(lambda *args: calls.append(args))
    network(torch.randn(1, 3, 64, 64))
    assert len(calls) == 1


def test_drop_layer_in_a_norm_works_in_training_only() -> None:
    network: Any = pair("regnetx_002")[0].float()
    network.network.s1.b1.conv2.bn.drop = DropBlock2d(0.5, block_size=2)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(network.eval()(images)["c2"], network(images)["c2"])
        network.train()
        assert not torch.equal(network(images)["c2"], network(images)["c2"])


def test_pickled_and_compiled_models_give_the_same() -> None:
    network = pair("regnety_002")[0].float().eval()
    images = torch.randn(1, 3, 64, 64)
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    restored = torch.load(file, weights_only=False)
    exported = torch.export.export(network, (images,)).module()
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = network(images)
        for other in (restored, exported, compiled):
            for name, feature in other(images).items():
                assert relative_error(feature, expected[name]) <= 1e-5


@pytest.mark.parametrize("path", ["act1", "act3", "bn2", "conv3", "drop_block"])
def test_hook_sees_what_it_would_see_in_timms_block(path: str) -> None:
    block = frozen_bottleneck()
    seen = []
    block.get_submodule(path).register_forward_hook(lambda *args: seen.append(args[2].clone()))
    x = torch.randn(2, 64, 8, 8)
    out = block(x)
    assert relative_error(out, timms_forward(block, x)) <= 1e-5
    ours, timms = seen
    assert relative_error(ours, timms) <= 1e-5


def test_bf16_autocast_keeps_half_of_what_float32_does() -> None:
    for model in ("resnet50", "regnetx_002"):
        ours, _ = pair(model)
        ours.float().train()
        images = torch.randn(1, 3, 128, 128)
        whole = saved_mebibytes(ours, images)
        with torch.autocast("cpu", torch.bfloat16):
            assert saved_mebibytes(ours, images) <= 0.6 * whole


def frozen_bottleneck(drop_path: nn.Module | None = None) -> Bottleneck:
    block = Bottleneck(64, 16, drop_path=drop_path)
    freeze_norms(block)
    randomise_norms(block)
    block.__class__ = FusedBottleneck
    return block


def timms_forward(block: Bottleneck, x: Tensor) -> Tensor:
    out: Tensor = Bottleneck.forward(block, x)
    return out


REPARAMETERISED = ("fastvit_t8", "mobileone_s0", "repvit_m0_9", "repvgg_a0")


@pytest.mark.parametrize("norm", ["frozen_bn", "bn"])
@pytest.mark.parametrize("model", REPARAMETERISED)
def test_timms_reparameterisation_is_right_before_and_after_optimising(model: str, norm: str) -> None:
    from timm.utils.model import reparameterize_model

    ours = build(f"timm/{model}", norm=norm, out_features=["c2", "c3"]).eval()
    randomise_norms(ours)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = ours(images)
    once = reparameterize_model(ours)
    restored = pickle.loads(pickle.dumps(ours))
    for network in (once, restored, optimize_for_inference(once), reparameterize_model(optimize_for_inference(ours))):
        with torch.no_grad():
            features = network(images)
        assert all(relative_error(features[name], expected[name]) <= 1e-5 for name in expected)


@torch.no_grad()
def test_what_a_hook_keeps_of_regnets_shortcut_is_not_overwritten() -> None:
    model, images = build("timm/regnetx_002", norm="frozen_bn").eval(), torch.randn(1, 3, 64, 64)
    randomise_norms(model)
    for network in (model, optimize_for_inference(model)):
        kept: list[Tensor] = []
        copied: list[Tensor] = []
        norm = network.get_submodule("network.s1.b1.downsample.bn")
        norm.register_forward_hook(lambda _module, _inputs, out, kept=kept: kept.append(out))
        norm.register_forward_hook(lambda _module, _inputs, out, copied=copied: copied.append(out.clone()))
        network(images)
        assert torch.equal(kept[0], copied[0])
