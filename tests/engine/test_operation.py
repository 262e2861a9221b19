"""The fused operation against plain PyTorch: values, gradients, memory, and never a stale weight."""

import copy
import io
import itertools
import multiprocessing
import pickle
import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import build, randomise_norms, relative_error, saved_mebibytes
from torch import Tensor, nn

from backbone import Backbone, FrozenBatchNorm2d, freeze_norms, freeze_stages, thaw_norms
from backbone.engine import conv_norm_act, engine_enabled
from backbone.engine.calls import has_hook_within
from backbone.providers.resnet.blocks import BasicBlock, Bottleneck
from backbone.providers.resnet.network import ResNet, Stage, Variant

CONVOLUTIONS = {
    "1x1": {"kernel_size": 1},
    "1x1 stride 2": {"kernel_size": 1, "stride": 2},
    "3x3": {"kernel_size": 3, "padding": 1},
    "3x3 stride 2": {"kernel_size": 3, "stride": 2, "padding": 1},
    "3x3 dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "3x3 in groups": {"kernel_size": 3, "padding": 1, "groups": 4},
    "7x7 stride 2": {"kernel_size": 7, "stride": 2, "padding": 3},
}
LAYOUTS = {"channels first": torch.contiguous_format, "channels last": torch.channels_last}


def unfused() -> AbstractContextManager[None]:
    """Let every call take the plain path."""
    return engine_enabled(False)


def operation(
    x: Tensor, conv: nn.Module, norm: nn.Module, residual: Tensor | None = None, *, relu: bool = True
) -> Tensor:
    """``relu(norm(conv(x)) + residual)``: the engine's, or the modules' where it stays out."""
    out = conv_norm_act(x, conv, norm, residual, nn.ReLU() if relu else None)
    if out is None:
        out = norm(conv(x))
        out = out if residual is None else out + residual
        out = F.relu(out) if relu else out
    return out


def conv_and_norm(settings: dict[str, int], channels: int = 16) -> tuple[nn.Conv2d, FrozenBatchNorm2d]:
    conv = nn.Conv2d(channels, channels, bias=False, **settings)  # type: ignore[arg-type]
    norm = FrozenBatchNorm2d(channels)
    randomise_norms(norm)
    return conv, norm


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("settings", CONVOLUTIONS)
@pytest.mark.parametrize("gradient", [True, False])
def test_values_equal_plain_pytorch(
    settings: str, layout: str, with_residual: bool, relu: bool, gradient: bool
) -> None:
    conv, norm = conv_and_norm(CONVOLUTIONS[settings])
    x = torch.randn(2, 16, 9, 13).to(memory_format=LAYOUTS[layout])
    with torch.set_grad_enabled(gradient):
        residual = torch.randn_like(conv(x)) if with_residual else None
        with unfused():
            expected = operation(x, conv, norm, residual, relu=relu)
        actual = conv_norm_act(x, conv, norm, residual, nn.ReLU() if relu else None)
    assert actual is not None
    assert relative_error(actual, expected) <= 1e-6


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("settings", CONVOLUTIONS)
def test_gradients_equal_plain_pytorch(settings: str, with_residual: bool, relu: bool) -> None:
    conv, norm = conv_and_norm(CONVOLUTIONS[settings])
    x = torch.randn(2, 16, 9, 13, requires_grad=True)
    residual = torch.randn_like(conv(x)).requires_grad_() if with_residual else None
    inputs = [tensor for tensor in (x, conv.weight, residual) if tensor is not None]

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(operation(x, conv, norm, residual, relu=relu).square().sum(), inputs)

    with unfused():
        expected = gradients()
    for actual, reference in zip(gradients(), expected, strict=True):
        assert relative_error(actual, reference) <= 1e-5


@pytest.mark.parametrize("needs", ["x", "weight", "residual", "everything"])
def test_gradients_are_exact_in_double_precision(needs: str) -> None:
    conv, norm = (module.double() for module in conv_and_norm({"kernel_size": 3, "padding": 1}, channels=3))
    conv.weight.requires_grad_(needs in ("weight", "everything"))
    x = torch.randn(1, 3, 4, 5, dtype=torch.double, requires_grad=needs in ("x", "everything"))
    residual = torch.randn(1, 3, 4, 5, dtype=torch.double, requires_grad=needs in ("residual", "everything"))

    def function(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        return operation(x, conv, norm, residual)

    assert torch.autograd.gradcheck(function, (x, conv.weight, residual))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("in_channels", "stride"), [(32, 1), (16, 1), (16, 2)])
@pytest.mark.parametrize("size", [(9, 13), (1, 1), (2, 31)])
def test_backward_leaves_what_it_was_given_alone(
    size: tuple[int, int], in_channels: int, stride: int, layout: str
) -> None:
    block = Bottleneck(in_channels, 8, 32, stride=stride, norm=FrozenBatchNorm2d)
    randomise_norms(block)
    x = torch.randn(1, in_channels, *size).to(memory_format=LAYOUTS[layout]).requires_grad_()
    inputs = [x, *(parameter for parameter in block.parameters() if parameter.ndim == 4)]
    output = block(x)
    grad = torch.randn(1, 32, 1, 1).expand_as(output)  # dense in no layout
    kept = grad.clone(), x.detach().clone(), output.detach().clone()
    first = torch.autograd.grad(output, inputs, grad, retain_graph=True)
    second = torch.autograd.grad(output, inputs, grad)
    assert all(map(torch.equal, (grad, x, output), kept))
    with unfused():
        expected = torch.autograd.grad(block(x), inputs, grad)
    for ours, again, plain in zip(first, second, expected, strict=True):
        assert torch.equal(ours, again)
        assert relative_error(ours, plain) <= 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("settings", CONVOLUTIONS)
def test_parameters_in_bfloat16_equal_plain_pytorch(settings: str, layout: str) -> None:
    conv, norm = (module.bfloat16() for module in conv_and_norm(CONVOLUTIONS[settings]))
    x = torch.randn(2, 16, 9, 13).to(torch.bfloat16, memory_format=LAYOUTS[layout]).requires_grad_()

    def answers() -> tuple[Tensor, ...]:
        with torch.no_grad():
            features = operation(x, conv, norm)
        output = operation(x, conv, norm)
        return features, output, *torch.autograd.grad(output.square().sum(), (x, conv.weight))

    with unfused():
        expected = answers()
    for actual, plain in zip(answers(), expected, strict=True):
        assert actual.dtype == torch.bfloat16
        assert relative_error(actual.float(), plain.float()) <= 3e-2


def trainable_subsets(count: int) -> list[tuple[bool, ...]]:
    return [subset for subset in itertools.product([False, True], repeat=count) if any(subset)]


@pytest.mark.parametrize(
    ("in_channels", "subset"),
    [(16, subset) for subset in trainable_subsets(4)] + [(8, subset) for subset in trainable_subsets(5)],
)
def test_any_part_of_a_block_may_train(in_channels: int, subset: tuple[bool, ...]) -> None:
    block = Bottleneck(in_channels, 4, 16, norm=FrozenBatchNorm2d).double()
    randomise_norms(block)
    x = torch.randn(2, in_channels, 5, 6, dtype=torch.double)
    weights = [parameter for parameter in block.parameters() if parameter.ndim == 4]
    wanted = [tensor.requires_grad_(needs) for tensor, needs in zip((x, *weights), subset, strict=True)]
    wanted = [tensor for tensor in wanted if tensor.requires_grad]
    with unfused():
        expected = torch.autograd.grad(block(x).square().sum(), wanted)
    actual = torch.autograd.grad(block(x).square().sum(), wanted)
    assert all(relative_error(ours, plain) <= 1e-12 for ours, plain in zip(actual, expected, strict=True))


@pytest.mark.parametrize("in_channels", [8, 16])
def test_second_derivatives_equal_plain_pytorch(in_channels: int) -> None:
    block = Bottleneck(in_channels, 4, 16, norm=FrozenBatchNorm2d).double()
    randomise_norms(block)
    x = torch.randn(2, in_channels, 4, 4, dtype=torch.double, requires_grad=True)
    weights = [parameter for parameter in block.parameters() if parameter.ndim == 4]

    def second() -> tuple[Tensor, ...]:
        gradients = torch.autograd.grad(block(x).pow(3).sum(), [x, *weights], create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), [x, *weights])  # type: ignore[arg-type]

    actual = second()
    with unfused():
        expected = second()
    assert all(relative_error(ours, plain) <= 1e-10 for ours, plain in zip(actual, expected, strict=True))


def test_second_derivatives_reach_a_residual() -> None:
    conv, norm = (module.double() for module in conv_and_norm({"kernel_size": 1}, channels=3))
    x, residual = (torch.randn(1, 3, 4, 5, dtype=torch.double, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradgradcheck(
        lambda x, weight, residual: operation(x, conv, norm, residual), (x, conv.weight, residual)
    )


@pytest.mark.parametrize("freeze_at", [0, 2, 5])
def test_autocast_gradients_are_as_good_as_plain_ones(freeze_at: int) -> None:
    model = build(norm="frozen_bn", freeze_at=freeze_at)
    images = torch.randn(1, 3, 64, 64, requires_grad=True)

    def gradients(*, autocast: bool) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            features = model(images)
        wanted = [images, *(p for p in model.parameters() if p.requires_grad)]
        return list(torch.autograd.grad(sum(f.float().square().mean() for f in features.values()), wanted))

    exact, ours = gradients(autocast=False), gradients(autocast=True)
    with unfused():
        plain = gradients(autocast=True)
    assert [gradient.dtype for gradient in ours] == [torch.float32] * len(ours)
    error = max(float((a - b).norm() / b.norm()) for a, b in zip(ours, exact, strict=True))
    plain_error = max(float((a - b).norm() / b.norm()) for a, b in zip(plain, exact, strict=True))
    assert error <= 1.2 * plain_error


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 120.0), (torch.bfloat16, 60.0)])
def test_saved_for_backward_at_512_pixels_with_two_frozen_stages(dtype: torch.dtype, limit: float) -> None:
    model = build("resnet50", norm="frozen_bn", freeze_at=2)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        assert saved_mebibytes(model, torch.randn(1, 3, 512, 512)) <= limit


def test_nothing_is_saved_where_nothing_trains() -> None:
    assert saved_mebibytes(build(norm="frozen_bn", freeze_at=5), torch.randn(1, 3, 64, 64)) == 0


def test_every_feature_is_bfloat16_under_autocast() -> None:
    model = build(norm="frozen_bn")
    with torch.autocast("cpu", torch.bfloat16):
        assert {feature.dtype for feature in model(torch.randn(1, 3, 64, 64)).values()} == {torch.bfloat16}


def test_features_are_channels_last() -> None:
    features = build(norm="frozen_bn")(torch.randn(1, 3, 64, 64))
    assert all(feature.is_contiguous(memory_format=torch.channels_last) for feature in features.values())


def test_a_dtype_that_does_not_fit_the_weights_is_refused_as_in_pytorch() -> None:
    with pytest.raises(RuntimeError, match="same"):
        build(norm="frozen_bn")(torch.randn(1, 3, 64, 64, dtype=torch.bfloat16))


def test_weights_in_double_precision_are_refused_under_autocast_as_in_pytorch() -> None:
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="same"):
        build(norm="frozen_bn").double()(torch.randn(1, 3, 64, 64))


# --- someone is watching ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["conv1", "bn1", "layer1.0.conv2", "layer1.0.bn2", "layer2.0.downsample.1"])
@torch.no_grad()
def test_a_hook_sees_its_module_called(path: str) -> None:
    model, seen = build(norm="frozen_bn"), []
    model.get_submodule(path).register_forward_hook(lambda *_: seen.append(path))
    model(torch.randn(1, 3, 64, 64))
    assert seen == [path]


@pytest.mark.parametrize("path", ["layer1.0", "layer1.1", "layer2", "layer2.0.downsample", "layer3.0.downsample.1"])
@torch.no_grad()
def test_what_a_hook_keeps_is_not_overwritten(path: str) -> None:
    model, kept = build("resnet50", norm="frozen_bn"), []
    randomise_norms(model)
    model.get_submodule(path).register_forward_hook(lambda _module, _inputs, out: kept.append((out, out.clone())))
    model(torch.randn(1, 3, 64, 64))
    assert torch.equal(*kept[0])


@torch.no_grad()
def test_features_of_one_image_survive_the_next() -> None:
    model = build("resnet50", norm="frozen_bn")
    features = model(torch.randn(1, 3, 64, 64))
    before = {name: feature.clone() for name, feature in features.items()}
    model(torch.randn(1, 3, 64, 64))
    assert all(torch.equal(features[name], before[name]) for name in features)


@torch.no_grad()
def test_a_dispatch_mode_counts_every_convolution() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        build(norm="frozen_bn")(torch.randn(1, 3, 224, 224))
    assert counter.get_total_flops() // 2 == pytest.approx(1.81e9, rel=0.01)


@torch.no_grad()
def test_a_replaced_forward_is_called() -> None:
    model, called = build(norm="frozen_bn"), []
    conv = model.get_submodule("layer1.0.conv1")
    original = conv.forward
    conv.forward = lambda x: called.append(1) or original(x)  # type: ignore[func-returns-value]
    model(torch.randn(1, 3, 64, 64))
    assert called == [1]


def test_backward_hooks_on_a_norm_work() -> None:
    model, seen = build(norm="frozen_bn"), []
    model.get_submodule("layer2.0.bn1").register_full_backward_hook(lambda *_: seen.append(1))
    model(torch.randn(1, 3, 64, 64))["c3"].sum().backward()
    assert seen == [1]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # inside torch's forward mode
def test_forward_mode_derivatives_are_plain_pytorchs() -> None:
    from torch.autograd import forward_ad

    model, images = build(norm="frozen_bn", freeze_at=5), torch.randn(1, 3, 32, 32)
    with forward_ad.dual_level():
        features = model(forward_ad.make_dual(images, torch.ones_like(images)))  # type: ignore[no-untyped-call]
        assert forward_ad.unpack_dual(features["c5"]).tangent is not None  # type: ignore[no-untyped-call]


@torch.no_grad()
def test_a_stage_takes_foreign_blocks_and_slices() -> None:
    model: Any = build("resnet18", norm="frozen_bn")
    model.layer4[1] = nn.Identity()
    model.layer3 = model.layer3[:1]
    assert model(torch.randn(1, 3, 64, 64))["c5"].shape == (1, 512, 2, 2)


class Remembering(BasicBlock):
    """A user's own block, with the plain signature, which looks at its output later."""

    def forward(self, x: Tensor) -> Tensor:
        self.last = super().forward(x)
        self.copy = self.last.clone()
        return self.last


@torch.no_grad()
def test_a_subclass_of_a_block_keeps_its_signature_and_its_output() -> None:
    blocks = [Remembering(16, 16, norm=FrozenBatchNorm2d) for _ in range(3)]
    Stage(*blocks)(torch.randn(1, 16, 8, 8))
    assert all(torch.equal(block.last, block.copy) for block in blocks)


class Biased(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        conv, norm = self
        return norm(conv(x) + 1)  # type: ignore[no-any-return]


class Tripled(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 3  # type: ignore[no-any-return, no-untyped-call]


def replaced(*layers: nn.Module) -> nn.Sequential:
    row = nn.Sequential(*layers)
    row.forward = lambda x: layers[1](layers[0](x) + 1)  # type: ignore[method-assign]
    return row


@pytest.mark.parametrize("shortcut", [Biased, Tripled, replaced])
def test_a_shortcut_with_a_forward_of_its_own_is_called(shortcut: Callable[..., nn.Sequential]) -> None:
    block = BasicBlock(8, 16, stride=2, norm=FrozenBatchNorm2d)
    randomise_norms(block)
    x = torch.randn(1, 8, 8, 8)
    before = block(x)
    assert isinstance(block.downsample, nn.Sequential)
    block.downsample = shortcut(*block.downsample)
    with unfused():
        expected = block(x)
    assert relative_error(before, expected) > 1e-3
    assert relative_error(block(x), expected) <= 1e-5


@pytest.mark.parametrize("stride", [1, [1, 1]])
def test_a_stride_set_afterwards_works(stride: Any) -> None:
    conv, norm = conv_and_norm({"kernel_size": 3, "padding": 1, "stride": 2})
    conv.stride = stride
    x = torch.randn(1, 16, 8, 8)
    assert relative_error(operation(x, conv, norm), F.relu(norm(conv(x)))) <= 1e-5
    with torch.no_grad():
        assert relative_error(operation(x, conv, norm), F.relu(norm(conv(x)))) <= 1e-5


def test_per_sample_gradients_by_vmap_work() -> None:
    conv, norm = conv_and_norm({"kernel_size": 1})
    x = torch.randn(3, 1, 16, 4, 4)
    assert torch.vmap(lambda sample: operation(sample, conv, norm))(x).shape == (3, 1, 16, 4, 4)


@pytest.mark.parametrize("gradient", [False, True])
def test_a_residual_of_another_shape_is_broadcast_as_in_pytorch(gradient: bool) -> None:
    conv, norm = conv_and_norm({"kernel_size": 3, "padding": 1})
    x, residual = torch.randn(2, 16, 8, 8), torch.randn(2, 16, 1, 1)
    results = []
    for fused in (True, False):
        with engine_enabled(fused), torch.set_grad_enabled(gradient):
            leaf = residual.clone().requires_grad_(gradient)
            out = operation(x, conv, norm, leaf)
            results.append([out, *(torch.autograd.grad(out.square().sum(), leaf) if gradient else ())])
    for ours, plain in zip(*results, strict=True):
        assert relative_error(ours, plain) <= 1e-5


@pytest.mark.parametrize("gradient", [False, True])
def test_a_block_whose_shortcut_no_longer_fits_is_refused_as_in_pytorch(gradient: bool) -> None:
    block = BasicBlock(16, 16, norm=FrozenBatchNorm2d)
    block.conv1.stride = (2, 2)
    with torch.set_grad_enabled(gradient), pytest.raises(RuntimeError, match="size of tensor"):
        block(torch.randn(1, 16, 8, 8))


# --- never stale ------------------------------------------------------------------------------------------------------


def small(norm_seed: int = 0) -> Backbone:
    """Stem, C2 and C3 with one block each."""
    torch.manual_seed(norm_seed)
    model = ResNet(Variant(Bottleneck, (1, 2, 1, 1)), out_features=("c2", "c3"))
    randomise_norms(model)
    return model


def assert_fresh(model: Backbone, images: Tensor, tolerance: float = 1e-5) -> None:
    for autocast in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            actual = model(images)
            with unfused():
                expected = model(images)
        for name in expected:
            assert relative_error(actual[name], expected[name]) <= (0.05 if autocast else tolerance), name


def optimizer_step(model: Backbone, **settings: bool) -> Backbone:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, **settings)  # type: ignore[arg-type]
    model(torch.randn(2, 3, 32, 32))["c3"].square().mean().backward()
    optimizer.step()
    return model


def edit(change: Callable[[Backbone], object]) -> Callable[[Backbone], Backbone]:
    def apply(model: Backbone) -> Backbone:
        with torch.no_grad():
            change(model)
        return model

    return apply


def load_bytes(model: Backbone) -> Backbone:
    file = io.BytesIO()
    torch.save(small(1).state_dict(), file)
    file.seek(0)
    model.load_state_dict(torch.load(file))
    return model


def freeze_and_thaw(model: Backbone) -> Backbone:
    freeze_stages(model, 2)
    assert_fresh(model, torch.randn(1, 3, 32, 32))
    thaw_norms(model)
    model.train()(torch.randn(2, 3, 32, 32))  # statistics move
    freeze_norms(model)
    return model


EVENTS: dict[str, Callable[[Backbone], Backbone]] = {
    "load_state_dict": load_bytes,
    "load_state_dict assign": edit(lambda model: model.load_state_dict(small(1).state_dict(), assign=True)),
    "in-place on the weight": edit(lambda model: model.get_parameter("conv1.weight").mul_(2)),
    "in-place on statistics": edit(lambda model: model.get_buffer("layer1.0.bn2.running_var").mul_(2)),
    "in-place on one bias": edit(lambda model: model.get_parameter("bn1.bias")[3].add_(1)),
    "a norm's value through .data": edit(lambda model: model.get_parameter("layer2.0.bn3.bias").data[77:78].add_(1)),
    "channels through .data": edit(lambda model: model.get_parameter("layer2.0.conv2.weight").data[:, 7:40].mul_(3)),
    "through .data": edit(lambda model: model.get_parameter("layer2.0.conv3.weight").data.mul_(2)),
    "an EMA through .data": edit(lambda model: [p.data.mul_(0.5) for p in model.parameters()]),
    "a new .data": edit(lambda model: setattr(model.get_parameter("conv1.weight"), "data", torch.randn(64, 3, 7, 7))),
    "inside inference mode": torch.inference_mode()(edit(lambda model: model.get_parameter("conv1.weight").mul_(2))),
    "a new parameter": edit(
        lambda model: setattr(model.get_submodule("conv1"), "weight", nn.Parameter(torch.randn(64, 3, 7, 7)))
    ),
    "another eps": edit(lambda model: setattr(model.get_submodule("bn1"), "eps", 0.5)),
    "to double and back": lambda model: model.double().float(),
    "to bfloat16 and back": lambda model: model.bfloat16().float(),
    "to channels_last": lambda model: model.to(memory_format=torch.channels_last),
    "an optimizer step": optimizer_step,
    "a foreach step": lambda model: optimizer_step(model, foreach=True),
    "a fused step": lambda model: optimizer_step(model, fused=True),
    "deepcopy and edit": edit(lambda model: copy.deepcopy(model).get_parameter("conv1.weight").mul_(2)),
    "a deepcopy": copy.deepcopy,
    "a pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "freeze, thaw, freeze": freeze_and_thaw,
}


@pytest.mark.parametrize("event", EVENTS)
def test_the_kept_weights_are_never_stale_after(event: str) -> None:
    model, images = small().eval(), torch.randn(1, 3, 32, 32)
    assert_fresh(model, images)
    before = model(images)["c3"].detach()
    after = EVENTS[event](model).eval()
    assert_fresh(after, images)
    unchanged = event in ("a deepcopy", "a pickle", "deepcopy and edit", "to double and back", "to channels_last")
    assert (relative_error(after(images)["c3"], before) <= 1e-5) is unchanged


def _edited_in_a_child(model: Backbone, images: Tensor) -> None:
    torch.set_num_threads(1)
    edit(lambda m: m.get_parameter("conv1.weight").mul_(2))(model)
    assert_fresh(model, images)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_a_fork_keeps_its_own_weights() -> None:
    model, images = small().eval(), torch.randn(1, 3, 32, 32)
    assert_fresh(model, images)
    child = multiprocessing.get_context("fork").Process(target=_edited_in_a_child, args=(model, images))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert_fresh(model, images)


def test_a_model_made_in_inference_mode_is_never_stale() -> None:
    with torch.inference_mode():
        model, images = small().eval(), torch.randn(1, 3, 32, 32)
        before = model(images)["c3"]
        model.get_parameter("conv1.weight").mul_(2)
        assert relative_error(model(images)["c3"], before) > 1e-3


def test_weights_kept_in_inference_mode_work_outside() -> None:
    model, images = small().eval(), torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        model(images)
    assert_fresh(model, images)


def test_500_random_sequences_of_mixed_use_equal_the_unfused_reference() -> None:
    choose = random.Random(0)
    images = torch.randn(2, 3, 24, 24)
    state = small(3).state_dict()

    def train_step(model: Backbone) -> Backbone:
        model.train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        for parameter in model.parameters():
            parameter.grad = None
        loss = torch.stack([feature.square().mean() for feature in model(images).values()]).sum()
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
            torch.optim.SGD(parameters, lr=1e-3, momentum=0.9).step()
        return model

    def load(model: Backbone) -> Backbone:
        model.load_state_dict(state)
        return model

    def freeze(model: Backbone) -> Backbone:
        freeze_stages(model, depth)
        return model

    uses: list[Callable[[Backbone], Any]] = [
        train_step, train_step, load, freeze, freeze, freeze_norms, thaw_norms, copy.deepcopy,
        lambda model: model.eval(), lambda model: model.train(),
        *(EVENTS[name] for name in ("an EMA through .data", "in-place on statistics", "to double and back")),
    ]  # fmt: skip
    ours, reference = small(), small()
    for sequence in range(500):
        ours, reference = load(ours), load(reference)
        for _ in range(choose.randint(2, 5)):
            use, depth = choose.choice(uses), choose.randint(0, 5)
            ours = use(ours)
            with unfused():
                reference = use(reference)
            with torch.no_grad():
                actual = ours(images)
                with unfused():
                    expected = reference(images)
            for name in expected:
                assert relative_error(actual[name], expected[name]) <= 1e-4, (sequence, name)


@pytest.mark.parametrize("path", ["", "0", "0.0"])
def test_a_hook_is_found_at_any_depth(path: str) -> None:
    block = nn.Sequential(nn.Sequential(nn.Conv2d(1, 1, 1)), nn.ReLU())
    assert not has_hook_within(block)
    hook = block.get_submodule(path).register_forward_hook(lambda *_: None)
    assert has_hook_within(block)
    hook.remove()
    assert not has_hook_within(block)
