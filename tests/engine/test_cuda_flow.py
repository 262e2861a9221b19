"""The way that CUDA takes through a network, without a GPU: fake tensors have a device, a dtype and a shape, no values.

What goes wrong here would go wrong on every GPU: a constant left on the CPU, a dtype that a kernel refuses, a gradient
of another dtype than its parameter, a network that goes unfused. Values, and second derivatives, are for test_gpu.py.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import build
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from backbone import optimize_for_inference
from backbone.engine import torch_internals
from backbone.engine.folded import FoldedConv2d
from backbone.engine.gradient import _FoldedLayers

# what is kept is told by addresses; fake ones are all 0
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
# Of each network the convolutions that one kernel takes with their ReLU, and those of them that add a residual as well:
# plain and bottleneck blocks, groups, pooled shortcuts, depthwise channels, which no kernel takes.
FUSED = {
    "resnet18": (17, 8),
    "resnet50": (49, 16),
    "resnext50_32x4d": (49, 16),
    "timm/regnety_002": (40, 13),
    "timm/resnet26d": (26, 8),
    "timm/ghostnet_050": (12, 0),
}
# In half precision kernels take channels by eights: not three, four or twenty of them.
FUSED_IN_HALF = {**FUSED, "timm/regnety_002": (39, 13), "timm/resnet26d": (25, 8), "timm/ghostnet_050": (3, 0)}


class Flow:
    """What the stand-ins saw."""

    def __init__(self) -> None:
        self.counts = [0, 0]  # fused convolutions, and those with a residual
        self.folded = 0
        self.trained: set[int] = set()

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor, *geometry: Any) -> Tensor:
        """Stand in for ``cudnn_convolution_relu``, with what cuDNN asks for."""
        self.counts[0] += 1
        assert x.dtype == weight.dtype == bias.dtype
        assert weight.shape[1] > 1
        assert x.dtype == torch.float32 or (x.shape[1] % 8 == 0 and weight.shape[0] % 8 == 0)
        return F.conv2d(x, weight, bias, *geometry)

    def convolve_and_add(
        self, x: Tensor, weight: Tensor, residual: Tensor, factor: float, bias: Tensor, *geometry: Any
    ) -> Tensor:
        """Stand in for ``cudnn_convolution_add_relu``."""
        self.counts[1] += 1
        out = self.convolve(x, weight, bias, *geometry)
        assert factor == 1
        assert residual.shape == out.shape
        assert residual.dtype == out.dtype
        return out

    def apply(self, plan: Any, constants: Any, x: Tensor, residual: Tensor | None, *weights: Tensor) -> Tensor:
        """Stand in for the autograd engine, which wants a real device: forward, and backward at once."""
        context: Any = type("Context", (), {})()
        context.save_for_backward = lambda *saved: setattr(context, "saved_tensors", saved)
        inputs = (x, residual, *weights)
        context.needs_input_grad = (False, False, *[each is not None and each.requires_grad for each in inputs])
        with torch.no_grad():
            out = _FoldedLayers.forward(context, plan, constants, x, residual, *weights)
            grads = _FoldedLayers.backward(context, torch.ones_like(out))
        for tensor, grad in zip(inputs, grads[2:], strict=True):
            assert (grad is not None) == (tensor is not None and tensor.requires_grad)
            if tensor is not None and grad is not None:
                assert (grad.shape, grad.dtype, grad.device) == (tensor.shape, tensor.dtype, tensor.device)
        self.trained |= {id(weight) for weight in weights if weight.requires_grad}
        return out.requires_grad_()


class Strict(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuse what a GPU's convolutions refuse; fake ones take other dtypes and, in torch 2.11, other devices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func in (aten.convolution.default, aten.convolution_backward.default, aten.threshold_backward.default):
            kinds = {(tensor.device.type, tensor.dtype) for tensor in args if isinstance(tensor, Tensor)}
            assert len(kinds) == 1, (func, kinds)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def flow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Flow]:
    flow = Flow()
    monkeypatch.setattr(torch_internals, "cudnn_convolution_relu", flow.convolve)
    monkeypatch.setattr(torch_internals, "cudnn_convolution_add_relu", flow.convolve_and_add)
    monkeypatch.setattr(torch_internals, "has_cudnn", lambda device: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.backends.cudnn, "enabled", True)
    monkeypatch.setattr(_FoldedLayers, "apply", flow.apply)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch_internals, "num_dispatch_modes", lambda: 0)  # the modes below are not the user's
    monkeypatch.setattr(sys.modules["backbone.engine.calls"], "type", class_of, raising=False)

    def fold(*args: Any) -> tuple[Tensor, Tensor]:
        flow.folded += 1
        weight, bias = real_fold(*args)
        return weight, bias

    real_fold = sys.modules["backbone.engine.operation"].fold
    monkeypatch.setattr(sys.modules["backbone.engine.operation"], "fold", fold)
    with FakeTensorMode(), Strict():  # type: ignore[no-untyped-call]
        yield flow


def class_of(thing: object) -> type:
    """As ``type``, for code that looks for plain tensors: a parameter made of a fake tensor is of class FakeTensor."""
    return nn.Parameter if isinstance(thing, FakeTensor) else type(thing)


def on_cuda(make: Callable[[], nn.Module]) -> nn.Module:
    """Make a network with real tensors, and put fake ones on CUDA in their place."""
    with unset_fake_temporarily():
        network = make()

    def moved(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")

    for module in network.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = nn.Parameter(moved(parameter), requires_grad=parameter.requires_grad)
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = moved(buffer)
    return network


def images() -> Tensor:
    return torch.empty(2, 3, 97, 128, device="cuda").to(memory_format=torch.channels_last)


@contextlib.contextmanager
def autocast(dtype: torch.dtype) -> Iterator[None]:
    """What ``torch.autocast("cuda", dtype)`` does; that refuses where there is no GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", dtype != torch.float32)
    torch.set_autocast_dtype("cuda", torch.float16 if dtype == torch.float32 else dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
        torch.clear_autocast_cache()


def expect(flow: Flow, name: str, features: dict[str, Tensor], dtype: torch.dtype) -> None:
    """All features are of the right kind, and every convolution that can be was fused; starts the count again."""
    assert {feature.device.type for feature in features.values()} == {"cuda"}
    assert {feature.dtype for feature in features.values()} == {dtype}
    assert [tuple(feature.shape[2:]) for feature in features.values()] == [(25, 32), (13, 16), (7, 8), (4, 4)]
    assert tuple(flow.counts) == (FUSED if dtype == torch.float32 else FUSED_IN_HALF)[name]
    flow.counts = [0, 0]


every_network = pytest.mark.parametrize("name", FUSED)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


@every_dtype
@every_network
def test_a_training_step_keeps_devices_and_dtypes(name: str, dtype: torch.dtype, flow: Flow) -> None:
    network = on_cuda(lambda: build(name, norm="frozen_bn", freeze_at=2).train())
    with autocast(dtype):
        expect(flow, name, network(images()), dtype)
    trainable = {id(parameter) for parameter in network.parameters() if parameter.requires_grad}
    # what timm keeps outside of its blocks goes through plain autograd
    assert flow.trained == trainable or (name.startswith("timm/") and flow.trained < trainable)
    assert flow.trained


@every_dtype
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_training_step_with_norms_that_train_does_so_too(name: str, dtype: torch.dtype, flow: Flow) -> None:
    network = on_cuda(lambda: build(name, norm="bn_eval", freeze_at=2).train())
    with autocast(dtype):
        expect(flow, name, network(images()), dtype)
    assert {id(p) for p in network.parameters() if p.requires_grad and p.ndim == 4} < flow.trained


@every_dtype
@every_network
@torch.no_grad()
def test_inference_keeps_devices_and_dtypes(name: str, dtype: torch.dtype, flow: Flow) -> None:
    network = on_cuda(lambda: build(name, norm="frozen_bn", freeze_at=5).eval())
    folded = []
    for _ in range(2):
        with autocast(dtype):
            expect(flow, name, network(images()), dtype)
        folded.append(flow.folded)
    assert 0 < folded[0] == folded[1]  # the second time with the weights of the first


@torch.no_grad()
def test_weights_that_train_are_folded_every_time(flow: Flow) -> None:
    network = on_cuda(lambda: build("resnet18", norm="frozen_bn").eval())
    for passes in (1, 2):  # a fused optimizer's step would move no version counter in between
        network(images())
        assert flow.folded == passes * 20


@every_dtype
@every_network
@torch.no_grad()
def test_an_inference_copy_keeps_devices_and_dtypes(name: str, dtype: torch.dtype, flow: Flow) -> None:
    network = on_cuda(lambda: optimize_for_inference(build(name, norm="frozen_bn").eval(), dtype=dtype))
    for _ in range(2):  # packs, and uses what is packed
        expect(flow, name, network(images()), dtype)


STEMS = {
    "timm": lambda: build("timm/resnet50"),
    "group norm": lambda: build("resnet50", norm="gn"),
    "torchvision": torchvision.models.resnet50,
}


@every_dtype
@pytest.mark.parametrize("make", STEMS.values(), ids=STEMS)
@torch.no_grad()
def test_a_stem_that_is_called_as_a_module_takes_images_too(
    make: Callable[[], nn.Module], dtype: torch.dtype, flow: Flow
) -> None:
    network = on_cuda(lambda: optimize_for_inference(make().eval(), dtype=dtype))
    for _ in range(2):  # packs, and uses what is packed
        features = network(images().to(dtype))
        assert {each.dtype for each in (features.values() if isinstance(features, dict) else [features])} == {dtype}


@torch.no_grad()
def test_no_fused_kernel_is_asked_for_double_precision(flow: Flow) -> None:
    network = on_cuda(lambda: optimize_for_inference(build("resnet18"), dtype=torch.float64))
    assert network(images())["c5"].dtype == torch.float64
    assert flow.counts == [0, 0]


@pytest.mark.parametrize("ask", ["cudnn.deterministic", "use_deterministic_algorithms"])
@torch.no_grad()
def test_no_fused_kernel_is_asked_where_algorithms_must_be_deterministic(
    ask: str, flow: Flow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", ask == "cudnn.deterministic")
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: ask != "cudnn.deterministic")
    on_cuda(lambda: build("resnet18", norm="frozen_bn", freeze_at=5).eval())(images())
    assert flow.counts == [0, 0]


@torch.no_grad()
def test_an_inference_copy_packs_nothing_under_capture(flow: Flow, monkeypatch: pytest.MonkeyPatch) -> None:
    network = on_cuda(lambda: optimize_for_inference(build("resnet18"), dtype=torch.bfloat16))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    network(images())  # only the replays would fill what is packed here
    layers = [module for module in network.modules() if isinstance(module, FoldedConv2d)]
    assert all(layer._prepared is None for layer in layers)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    network(images())
    assert all(layer._prepared is not None for layer in layers)
