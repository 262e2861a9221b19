"""Where the ecosystem meets the engine: walking, tracing, subclassing, converting, swapping and hooking modules.

Each test holds the law: take the engine away and nothing changes but the time.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from conftest import build, randomise_norms, relative_error
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FrozenBatchNorm2d as TorchvisionFrozenBatchNorm2d

from backbone import (
    Backbone,
    FrozenBatchNorm2d,
    engine_enabled,
    engine_report,
    freeze_norms,
    optimize_for_inference,
)
from backbone.hosts.torchvision import build_detector
from backbone.providers.resnet.blocks import BasicBlock, Bottleneck
from backbone.providers.resnet.network import FAMILY, ResNet
from backbone.pyramid import FeaturePyramid
from backbone.recipe import DetectorConfig

NAMES = ("resnet18", "resnet50")
IMAGES = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
LAYERS = {"layer1": "c2", "layer2": "c3", "layer3": "c4", "layer4": "c5"}


def pair(name: str) -> tuple[Any, Any]:
    """Ours and torchvision's own network, frozen norms in both, with the same weights, in evaluation mode."""
    theirs = getattr(torchvision.models, name)(norm_layer=TorchvisionFrozenBatchNorm2d)
    randomise_norms(theirs)
    ours = build(name, norm="frozen_bn")
    state = {key: value for key, value in theirs.state_dict().items() if not key.startswith("fc.")}
    ours.load_state_dict(state, strict=True)
    return ours.eval(), theirs.eval()


def plain(model: Callable[..., Any], *inputs: Any) -> Any:
    with engine_enabled(False), torch.no_grad():
        return model(*inputs)


# --- walking and tracing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_intermediate_layer_getter_gives_torchvisions_features(name: str) -> None:
    ours, theirs = (IntermediateLayerGetter(network, LAYERS)(IMAGES) for network in pair(name))
    assert all(relative_error(ours[level], theirs[level]) <= 1e-5 for level in LAYERS.values())


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_children_in_a_row_give_torchvisions_c5(name: str) -> None:
    ours, theirs = pair(name)
    expected = nn.Sequential(*list(theirs.children())[:-2])(IMAGES)
    assert relative_error(nn.Sequential(*ours.children())(IMAGES), expected) <= 1e-5


@pytest.mark.parametrize("optimised", [False, True])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_feature_extractors_and_symbolic_traces_give_torchvisions_features(name: str, optimised: bool) -> None:
    ours, theirs = pair(name)
    ours = optimize_for_inference(ours) if optimised else ours
    expected = create_feature_extractor(theirs, LAYERS)(IMAGES)
    for traced in (create_feature_extractor(ours, LAYERS), torch.fx.symbolic_trace(ours)):
        features = traced(IMAGES)
        assert all(relative_error(features[level], expected[level]) <= 1e-5 for level in LAYERS.values())


def pyramid() -> nn.Module:
    return FeaturePyramid(build("resnet18", norm="frozen_bn"), out_channels=8, extra_levels="p6p7")


def segmenter(detector: str) -> nn.Module:
    settings = {"detector": detector, "num_classes": 3, "backbone": {"name": "resnet50"}, "aux_classifier": True}
    return build_detector(DetectorConfig.model_validate(settings))


TRACED: dict[str, Callable[[], nn.Module]] = {
    "pyramid": pyramid,
    "deeplabv3": lambda: segmenter("deeplabv3"),
    "fcn": lambda: segmenter("fcn"),
    "timm/resnet18": lambda: build("timm/resnet18", norm="frozen_bn"),
    "timm/regnetx_002": lambda: build("timm/regnetx_002", norm="frozen_bn"),
}


@pytest.mark.parametrize("name", TRACED)
def test_symbolic_traces_compute_what_the_modules_do(name: str) -> None:
    model = TRACED[name]().eval()
    randomise_norms(model)
    network = getattr(model, "network", model)  # of a timm backbone timm's own network: sizes decide what ours does
    expected = plain(network, IMAGES)
    traced = torch.fx.symbolic_trace(network)
    with torch.no_grad():
        actual = traced(IMAGES)
    for ours, reference in zip(leaves(actual), leaves(expected), strict=True):
        assert relative_error(ours, reference) <= 1e-6


def leaves(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs.values())


@torch.no_grad()
def test_backbone_with_fpn_gives_torchvisions_levels() -> None:
    ours, theirs = pair("resnet18")
    levels = []
    for network in (ours, theirs):
        torch.manual_seed(0)
        layers = {f"layer{number}": str(number - 1) for number in range(1, 5)}
        levels.append(BackboneWithFPN(network, layers, [64, 128, 256, 512], 8)(IMAGES))
    assert all(relative_error(levels[0][level], levels[1][level]) <= 1e-5 for level in levels[1])


# --- hooking and replacing --------------------------------------------------------------------------------------------


def guided_gradient(network: Any, images: Tensor) -> Tensor:
    """Guided backpropagation (arXiv:1412.6806): each ReLU passes back positive gradients alone."""
    handles = []
    for module in network.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
            handles.append(module.register_full_backward_hook(lambda *args: (args[1][0].clamp_min(0),)))
    images = images.clone().requires_grad_()
    layer4 = network.layer4
    keep: list[Tensor] = []
    handles.append(layer4.register_forward_hook(lambda *args: keep.append(args[2])))
    network(images)
    keep[0].square().sum().backward()  # type: ignore[no-untyped-call]
    for handle in handles:
        handle.remove()
    assert images.grad is not None
    return images.grad


@pytest.mark.parametrize("name", NAMES)
def test_guided_backpropagation_explains_as_in_torchvisions_network(name: str) -> None:
    ours, theirs = pair(name)
    assert relative_error(guided_gradient(ours, IMAGES), guided_gradient(theirs, IMAGES)) <= 1e-4


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_replaced_relus_act_as_in_torchvisions_network(name: str) -> None:
    features = []
    for network in pair(name):
        for module in list(network.modules()):
            for child, relu in module.named_children():
                if isinstance(relu, nn.ReLU):
                    setattr(module, child, nn.SiLU())
        features.append(IntermediateLayerGetter(network, LAYERS)(IMAGES)["c5"])
        if isinstance(network, Backbone):
            assert relative_error(network(IMAGES)["c5"], features[0]) <= 1e-6
    assert relative_error(*features) <= 1e-5


@pytest.mark.parametrize("target", [(nn.ReLU, "forward"), (nn.Conv2d, "forward"), (torch.nn.functional, "conv2d")])
@torch.no_grad()
def test_a_tool_that_replaces_torchs_own_functions_sees_them_called(
    target: tuple[Any, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls = build("resnet18", norm="frozen_bn").eval(), []
    original = getattr(*target)
    monkeypatch.setattr(*target, lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))  # type: ignore[func-returns-value]
    model(IMAGES)
    assert len(calls) in (17, 20)  # ReLUs, convolutions


@pytest.mark.parametrize("optimised", [False, True])
@torch.no_grad()
def test_a_hook_on_all_modules_sees_every_one_called(optimised: bool) -> None:
    model = build("resnet18", norm="frozen_bn").eval()
    network = optimize_for_inference(model) if optimised else model
    seen: list[nn.Module] = []
    with nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module)):
        network(IMAGES)
    leaves = {module for module in network.modules() if not list(module.children())}
    assert leaves <= set(seen)


@pytest.mark.engine
@torch.no_grad()
def test_a_function_mode_sees_every_convolution_and_a_default_device_does_not_slow() -> None:
    class Counting(torch.overrides.TorchFunctionMode):
        count = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func in (torch.conv2d, torch.nn.functional.conv2d)
            return func(*args, **(kwargs or {}))

    model = build("resnet18", norm="frozen_bn").eval()
    with Counting() as mode:
        model(IMAGES)
    assert mode.count >= 20
    before = engine_report().cached_bytes["folded"]
    with torch.device("cpu"):
        model(IMAGES)
    assert engine_report().cached_bytes["folded"] > before


# --- subclassing ------------------------------------------------------------------------------------------------------


class ScaledBasicBlock(BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x)).sigmoid()
        out = self.bn2(self.conv2(out)) * 0.5 + self.conv2(out)
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))  # type: ignore[no-any-return]


class ScaledBottleneck(Bottleneck):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.conv1(x).relu()))
        out = self.bn3(self.conv3(out)) + self.conv3(out)
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))  # type: ignore[no-any-return]


class EarlyResNet(ResNet):
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        raw = self.conv1(images)
        return {"c2": self.layer1(self.maxpool(self.relu(self.bn1(raw) + raw)))}  # type: ignore[operator]


class Doubling(FrozenBatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def with_class(model: nn.Module, old: type, new: type) -> nn.Module:
    for module in model.modules():
        if type(module) is old:
            module.__class__ = new
    return model


SUBCLASSED: dict[str, Callable[[], nn.Module]] = {
    "BasicBlock": lambda: with_class(build("resnet18", norm="frozen_bn"), BasicBlock, ScaledBasicBlock),
    "Bottleneck": lambda: with_class(build("resnet50", norm="frozen_bn"), Bottleneck, ScaledBottleneck),
    "BasicBlock, trainable norms": lambda: with_class(build("resnet18"), BasicBlock, ScaledBasicBlock),
    "ResNet": lambda: with_class(build("resnet18", norm="frozen_bn"), ResNet, EarlyResNet),
    "FrozenBatchNorm2d": lambda: with_class(build("resnet18", norm="frozen_bn"), FrozenBatchNorm2d, Doubling),
}


@pytest.mark.parametrize("name", SUBCLASSED)
@torch.no_grad()
def test_subclasses_with_a_forward_of_their_own_compute_it(name: str) -> None:
    model = SUBCLASSED[name]().eval()
    randomise_norms(model)
    expected = plain(model, IMAGES)
    fast = optimize_for_inference(model)
    for _ in range(3):
        for ours in (model(IMAGES), fast(IMAGES)):
            assert all(relative_error(ours[level], expected[level]) <= 1e-4 for level in expected)


@pytest.mark.parametrize("cls", [Bottleneck, FrozenBatchNorm2d])
@torch.no_grad()
def test_a_forward_replaced_on_a_class_is_called(cls: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("resnet50", norm="frozen_bn", out_features=["c2"]).eval()
    forward = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, x: -forward(self, x))
    networks = [model, optimize_for_inference(model)] if cls is Bottleneck else [model]  # a copy holds no norm
    for network in networks:
        assert relative_error(network(IMAGES)["c2"], plain(model, IMAGES)["c2"]) <= 1e-5


class DetrStyle(nn.Module):
    """A frozen norm of the same short name, with its eps inside."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 0.1).rsqrt()
        return x * scale.view(-1, 1, 1) + (self.bias - self.running_mean * scale).view(-1, 1, 1)


class WithActivation(DetrStyle):
    eps = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sigmoid()


@pytest.mark.parametrize("cls", [DetrStyle, WithActivation])
@torch.no_grad()
def test_another_librarys_frozen_norm_of_the_same_name_is_left_alone(cls: type[nn.Module]) -> None:
    namesake = type("FrozenBatchNorm2d", (cls,), {})
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), namesake(8), nn.ReLU())
    assert relative_error(optimize_for_inference(model)(IMAGES), model(IMAGES)) <= 1e-6


@torch.no_grad()
def test_torchvisions_and_detrs_frozen_norms_are_folded() -> None:
    detr = pytest.importorskip("transformers.models.detr.modeling_detr", reason="transformers is not installed")
    for norm in (TorchvisionFrozenBatchNorm2d(8, eps=1e-3), detr.DetrFrozenBatchNorm2d(8)):
        randomise_norms(norm)
        model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), norm, nn.ReLU())
        fast: Any = optimize_for_inference(model)
        assert fast.optimization.folded == 1
        assert relative_error(fast(IMAGES), model(IMAGES)) <= 1e-6


# --- derivatives ------------------------------------------------------------------------------------------------------


def frozen_block(channels: int = 8) -> Bottleneck:
    torch.manual_seed(0)
    block = Bottleneck(channels, 4, channels, norm=FrozenBatchNorm2d).double()
    randomise_norms(block)
    return block


def twice(block: Bottleneck, x: Tensor) -> Tensor:
    return block(block(x))  # type: ignore[no-any-return]


def tied(block: Bottleneck, x: Tensor) -> Tensor:
    other = copy.copy(block)
    other._modules = {**block._modules, "bn3": block.bn2}
    block.conv3.weight, block.conv1.weight = block.conv3.weight, block.conv1.weight
    second = frozen_block()
    second.conv2.weight = block.conv2.weight
    return second(block(x))  # type: ignore[no-any-return]


def generated(block: Any, x: Tensor) -> Tensor:
    scale = 1 + x.mean()
    weight = block.conv2.weight * scale
    conv = copy.copy(block.conv2)
    conv._parameters = {"bias": None}
    conv.weight = weight
    other = copy.copy(block)
    other._modules = {**block._modules, "conv2": conv}
    return other(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("use", [twice, tied, generated])
def test_second_derivatives_count_each_weight_once(use: Callable[[Bottleneck, Tensor], Tensor]) -> None:
    block = frozen_block()
    x = torch.randn(2, 8, 5, 6, dtype=torch.double, requires_grad=True)
    wanted = [x, *(p for p in block.parameters() if p.ndim == 4)]

    def derivatives() -> list[Tensor]:
        first = torch.autograd.grad(use(block, x).pow(3).sum(), wanted, create_graph=True)
        second = torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), wanted)
        return [*first, *second]

    actual = derivatives()
    with engine_enabled(False):
        expected = derivatives()
    assert all(relative_error(ours, reference) <= 1e-9 for ours, reference in zip(actual, expected, strict=True))


def test_batched_gradients_equal_those_one_by_one() -> None:
    block: Any = frozen_block()
    x = torch.randn(1, 8, 3, 4, dtype=torch.double, requires_grad=True)
    inputs = [x, block.conv2.weight]
    out = block(x)
    grads = torch.randn(5, *out.shape, dtype=torch.double)
    batched = torch.autograd.grad(out, inputs, grads, is_grads_batched=True, retain_graph=True)
    mapped = torch.vmap(lambda grad: torch.autograd.grad(out, inputs, grad, retain_graph=True))(grads)
    one_by_one = [torch.autograd.grad(out, inputs, grad, retain_graph=True) for grad in grads]
    for place, singles in enumerate(zip(*one_by_one, strict=True)):
        for ours in (batched[place], mapped[place]):
            assert relative_error(ours, torch.stack(singles)) <= 1e-10


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # inside torch's forward mode
@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_vectorised_jacobians_equal_plain_ones(strategy: str) -> None:
    block = frozen_block().requires_grad_(False)
    x = torch.randn(1, 8, 2, 3, dtype=torch.double)
    jacobian = torch.autograd.functional.jacobian(block, x, vectorize=True, strategy=strategy)  # type: ignore[no-untyped-call]
    with engine_enabled(False):
        expected = torch.autograd.functional.jacobian(block, x)  # type: ignore[no-untyped-call]
    assert relative_error(jacobian, expected) <= 1e-10


def test_gradcheck_passes_with_batched_gradients() -> None:
    block = frozen_block()
    x = torch.randn(1, 8, 2, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(block, (x,), check_batched_grad=True)


# --- weights of other kinds -------------------------------------------------------------------------------------------


class Wrapped(Tensor):
    """A weight of a class of its own, as quantisation libraries have them: only the plain operations know it."""

    @staticmethod
    def __new__(cls: type["Wrapped"], data: Tensor) -> "Wrapped":
        return Tensor._make_wrapper_subclass(cls, data.shape, dtype=data.dtype)

    def __init__(self, data: Tensor) -> None:
        self.halves = data / 2

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return Wrapped(args[0].halves * 2)
        if func.namespace != "aten":
            raise NotImplementedError(func)
        return func(*[each.halves * 2 if isinstance(each, Wrapped) else each for each in args], **(kwargs or {}))


@pytest.mark.parametrize("first", ["optimise", "wrap"])
@torch.no_grad()
def test_weights_of_a_tensor_subclass_run_plainly(first: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), FrozenBatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 62 * 94, 4))
    randomise_norms(model)
    expected = model(IMAGES)

    def wrap(network: Any) -> Any:
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.weight = nn.Parameter(Wrapped(layer.weight.detach()), requires_grad=False)
        return network

    network: Any = model.requires_grad_(False)
    network = wrap(optimize_for_inference(network)) if first == "optimise" else optimize_for_inference(wrap(network))
    for _ in range(3):
        assert relative_error(network(IMAGES), expected) <= 1e-5


@pytest.mark.filterwarnings("ignore:Sparse (CSR|invariant)")
@torch.no_grad()
def test_sparse_weights_of_a_linear_layer_run_plainly() -> None:
    model: Any = optimize_for_inference(nn.Sequential(nn.Linear(16, 4)))
    x = torch.randn(3, 16)
    expected = model(x)
    model[0].weight = nn.Parameter(model[0].weight.detach().to_sparse_csr(), requires_grad=False)
    assert relative_error(model(x), expected) <= 1e-5


@pytest.mark.parametrize("first", ["optimise", "quantise"])
@torch.no_grad()
def test_torchaos_quantised_linear_layers_run_plainly(first: str) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model: Any = nn.Sequential(
        nn.Conv2d(3, 32, 4, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 8)
    )
    expected = model(IMAGES)
    config = quantization.Int8WeightOnlyConfig()
    if first == "optimise":
        model = optimize_for_inference(model)
        quantization.quantize_(model, config)
    else:
        quantization.quantize_(model, config)
        model = optimize_for_inference(model)
    assert relative_error(model(IMAGES), expected) <= 2e-2


# --- the switch -------------------------------------------------------------------------------------------------------


@pytest.mark.engine
@torch.no_grad()
def test_the_switch_turns_everything_off_and_back() -> None:
    model = build("resnet18", norm="frozen_bn").eval()
    size = engine_report().cached_bytes["folded"]
    with engine_enabled(False):
        assert not engine_report().enabled
        model(IMAGES)
        assert engine_report().cached_bytes["folded"] == size
    assert engine_report().enabled
    model(IMAGES)
    assert engine_report().cached_bytes["folded"] > size


def test_a_switch_that_is_used_again_switches_again() -> None:
    before, off = engine_report().enabled, engine_enabled(False)
    for _ in range(2):
        with off:
            assert not engine_report().enabled
        assert engine_report().enabled == before


def test_a_pass_with_gradients_drops_the_weights_that_were_folded_without() -> None:
    model = build("resnet18", norm="frozen_bn").eval()
    with torch.no_grad():
        model(IMAGES)
    whole = engine_report().cached_bytes["folded"]
    model(IMAGES)  # in evaluation mode, but something trains: the scales and shifts serve on
    assert engine_report().cached_bytes["folded"] <= 0.1 * whole


@torch.no_grad()
def test_training_mode_and_another_dtype_drop_what_no_longer_serves() -> None:
    model = build("resnet18", norm="frozen_bn").eval()
    empty = engine_report().cached_bytes["folded"]
    model(IMAGES)
    whole = engine_report().cached_bytes["folded"] - empty
    with torch.autocast("cpu", torch.bfloat16):
        model(IMAGES)
    assert engine_report().cached_bytes["folded"] - empty <= whole * 0.51
    model.train()
    assert engine_report().cached_bytes["folded"] == empty


def test_a_copy_without_plain_weights_is_about_as_large_as_the_model() -> None:
    model = build("resnet50", norm="frozen_bn").eval()
    size = sum(parameter.nbytes for parameter in model.parameters())
    fast = optimize_for_inference(model, keep_weights=False)
    before = engine_report().cached_bytes["prepared"]
    expected = plain(model, IMAGES)
    with torch.no_grad():
        for _ in range(3):
            features = fast(IMAGES)
    kept = engine_report().cached_bytes["prepared"] - before + sum(parameter.nbytes for parameter in fast.parameters())
    assert kept <= 1.05 * size
    assert all(relative_error(features[name], expected[name]) <= 1e-5 for name in expected)
    again = optimize_for_inference(model)
    again.load_state_dict(fast.state_dict(), strict=True)
    copied = copy.deepcopy(fast).double()
    assert all(relative_error(copied(IMAGES.double())[name], expected[name]) <= 1e-5 for name in expected)


@torch.no_grad()
def test_weights_that_need_no_layout_of_their_own_are_not_counted_twice() -> None:
    fast = optimize_for_inference(build("resnet18", norm="frozen_bn").double())
    before = engine_report().cached_bytes["prepared"]
    for _ in range(3):
        fast(IMAGES.double())
    assert engine_report().cached_bytes["prepared"] == before


def test_every_variant_of_the_family_has_torchvisions_children() -> None:
    for name in (name for name, row in FAMILY.items() if not row.deep_stem):  # torchvision has no ResNet-D
        with torch.device("meta"):
            ours, theirs = build(name), getattr(torchvision.models, name)()
        assert [child for child, _ in ours.named_children()] == [child for child, _ in theirs.named_children()][:-2]
        assert {path for path, _ in ours.named_modules()} == {
            path for path, _ in theirs.named_modules() if path.partition(".")[0] not in ("fc", "avgpool")
        }


def test_a_head_with_batch_norm_1d_freezes_without_timm() -> None:
    head = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    randomise_norms(head)
    x = torch.randn(5, 4)
    expected = head(x)
    assert type(freeze_norms(head)[1]) is FrozenBatchNorm2d  # type: ignore[index]
    assert relative_error(head(x), expected) <= 1e-6


# --- numbers that are not finite --------------------------------------------------------------------------------------


def _spoil(model: Any, images: Tensor, where: str) -> Tensor:
    """Put a NaN or an infinity into an image, a convolution or a norm."""
    images = images.clone()
    block = model.layer2[0]
    with torch.no_grad():
        match where:
            case "image":
                images[0, 1, 30, 30] = torch.nan
            case "infinite image":
                images[0, 1, 30, 30] = torch.inf
            case "convolution":
                block.conv1.weight[0, 0, 1, 1] = torch.nan
            case "projection":
                block.downsample[0].weight[3] = torch.inf
            case "stem":
                model.conv1.weight[5, 0, 0, 0] = -torch.nan
            case "norm":
                block.bn1.bias[2] = torch.nan
            case "variance":
                block.bn2.running_var[2] = -1.0
    return images


SPOILT = ("image", "infinite image", "convolution", "projection", "stem", "norm", "variance")


@pytest.mark.engine
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["training", "training bn_eval", "frozen", "copy", "copy of a batch norm"])
@pytest.mark.parametrize("where", SPOILT)
def test_nan_shows_in_the_features_as_without_the_engine(where: str, kind: str, dtype: torch.dtype) -> None:
    norms = {"training bn_eval": "bn_eval", "copy of a batch norm": "bn"}
    model: nn.Module = build("resnet18", norm=norms.get(kind, "frozen_bn")).eval()
    randomise_norms(model)
    images = _spoil(model, IMAGES, where)
    if "copy" in kind:
        model = optimize_for_inference(model, dtype=dtype)
    with torch.set_grad_enabled("training" in kind), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        for _ in range(3):  # a copy prepares its weights when a shape comes again
            found = model(images)
        with engine_enabled(False):
            expected = model(images)
    assert found["c5"].isnan().any()
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    for name, features in expected.items():
        assert torch.equal(found[name].isnan(), features.isnan()), name
        assert relative_error(found[name].nan_to_num(), features.nan_to_num()) <= limit


@pytest.mark.engine
@torch.no_grad()
def test_weights_that_turn_into_nan_are_noticed_in_what_was_prepared() -> None:
    model: Any = optimize_for_inference(build("resnet18").eval())
    for _ in range(3):
        assert not model(IMAGES)["c5"].isnan().any()
    model.layer3[1].conv2.weight[7] = torch.nan
    assert model(IMAGES)["c4"][:, 7].isnan().all()
    assert not model(IMAGES)["c3"].isnan().any()


@pytest.mark.engine
@torch.no_grad()
@pytest.mark.parametrize("kind", ["frozen", "copy"])
def test_a_block_called_by_hand_keeps_nan(kind: str) -> None:
    model = build("resnet50", norm="frozen_bn").eval()
    x = torch.randn(1, 256, 14, 14)
    x[0, 0, 3, 3] = torch.nan
    owner: Any = optimize_for_inference(model) if kind == "copy" else model
    block = owner.layer2[0]
    with engine_enabled(False):
        expected = block(x)
    assert expected.isnan().any()
    for _ in range(3):
        assert torch.equal(block(x).isnan(), expected.isnan())


@pytest.mark.engine
@torch.no_grad()
def test_a_folded_weight_that_overflows_leaves_the_stem_to_its_modules() -> None:
    model = build("resnet18", norm="frozen_bn").eval()
    stem: Any = model
    stem.bn1.weight.fill_(3000.0)
    stem.conv1.weight.uniform_(-60, 60)
    model.half()
    images = IMAGES.half() * 1e-4
    with engine_enabled(False):
        expected = model(images)
    for name, features in model(images).items():
        assert features.isfinite().all()
        assert relative_error(features, expected[name]) <= 2e-2


@pytest.mark.parametrize("needs_grad", [False, True])
def test_a_default_device_is_not_that_of_what_is_looked_at(needs_grad: bool) -> None:
    model = build("resnet18", norm="frozen_bn").eval()
    with torch.set_grad_enabled(needs_grad), torch.device("meta"):
        found = model(IMAGES)
    with engine_enabled(False):
        assert relative_error(found["c5"], model(IMAGES)["c5"]) <= 1e-5


def test_a_retained_graph_goes_backward_twice_through_checkpoints() -> None:
    model = build("resnet18", checkpoint_stages=["c2", "c3"]).train()
    loss = model(IMAGES)["c5"].mean()
    loss.backward(retain_graph=True)
    statistics: Any = model
    before = statistics.layer1[0].bn1.running_mean.clone()
    loss.backward()
    assert torch.equal(statistics.layer1[0].bn1.running_mean, before)
