"""The way that CUDA takes through a network, without a GPU: fake tensors have a device, a dtype and a shape, no values.

What goes wrong here would go wrong on every GPU: a constant left on the CPU, a dtype that a kernel refuses, a gradient
of another dtype than its parameter. What the kernels compute is for test_gpu.py, on a GPU.
"""

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import build
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from backbone import optimize_for_inference
from backbone.gradient import _FoldedLayers

# what is kept is told by addresses; fake ones are all 0
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Plain and bottleneck blocks, groups, pooled shortcuts, few and depthwise channels.
NAMES = ["resnet18", "resnet50", "resnext50_32x4d", "timm/regnety_002", "timm/resnet26d", "timm/ghostnet_050"]


class Flow:
    """What the stand-ins saw."""

    def __init__(self) -> None:
        self.fused = self.fused_with_residual = 0
        self.trained: set[int] = set()

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor, *geometry: Any) -> Tensor:
        """Stand in for ``cudnn_convolution_relu``, with what cuDNN asks for."""
        self.fused += 1
        assert x.dtype == weight.dtype == bias.dtype
        assert weight.shape[1] > 1
        assert x.dtype == torch.float32 or (x.shape[1] % 8 == 0 and weight.shape[0] % 8 == 0)
        return F.conv2d(x, weight, bias, *geometry)

    def convolve_and_add(
        self, x: Tensor, weight: Tensor, residual: Tensor, factor: float, bias: Tensor, *geometry: Any
    ) -> Tensor:
        """Stand in for ``cudnn_convolution_add_relu``."""
        self.fused_with_residual += 1
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


@pytest.fixture
def flow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Flow]:
    flow = Flow()
    monkeypatch.setattr(torch, "cudnn_convolution_relu", flow.convolve)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", flow.convolve_and_add)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.backends.cudnn, "enabled", True)
    monkeypatch.setattr(_FoldedLayers, "apply", flow.apply)
    importlib.import_module("backbone.timm_fused")
    for name, module in list(sys.modules.items()):
        if name.startswith("backbone.") and hasattr(module, "is_seen_through"):
            monkeypatch.setattr(module, "is_seen_through", lambda _: False)
    # a parameter made of a fake tensor is of class FakeTensor
    class_of = lambda thing: nn.Parameter if isinstance(thing, FakeTensor) else type(thing)  # noqa: E731
    monkeypatch.setattr(sys.modules["backbone.fused"], "type", class_of, raising=False)
    with FakeTensorMode():
        yield flow


def on_cuda(make: Callable[[], nn.Module]) -> nn.Module:
    """Make a network with real tensors, and put fake ones on CUDA in their place."""
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
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
    torch.set_autocast_enabled("cuda", dtype != torch.float32)
    torch.set_autocast_dtype("cuda", torch.float16 if dtype == torch.float32 else dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", torch.float16)
        torch.clear_autocast_cache()


def expect(features: dict[str, Tensor], dtype: torch.dtype) -> None:
    assert {feature.device.type for feature in features.values()} == {"cuda"}
    assert {feature.dtype for feature in features.values()} == {dtype}
    assert [tuple(feature.shape[2:]) for feature in features.values()] == [(25, 32), (13, 16), (7, 8), (4, 4)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_training_step_keeps_devices_and_dtypes(name: str, dtype: torch.dtype, flow: Flow) -> None:
    network = on_cuda(lambda: build(name, norm="frozen_bn", freeze_at=2).train())
    with autocast(dtype):
        expect(network(images()), dtype)
    if not name.startswith("timm/"):
        trainable = {id(parameter) for parameter in network.parameters() if parameter.requires_grad}
        assert flow.trained == trainable
    assert flow.trained


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_inference_keeps_devices_and_dtypes(name: str, dtype: torch.dtype, flow: Flow) -> None:
    network = on_cuda(lambda: build(name, norm="frozen_bn").eval())
    for _ in range(2):  # the second time with weights that were kept
        with autocast(dtype):
            expect(network(images()), dtype)
    assert flow.fused > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_an_inference_copy_keeps_devices_and_dtypes(name: str, dtype: torch.dtype, flow: Flow) -> None:
    network = on_cuda(lambda: optimize_for_inference(build(name, norm="frozen_bn").eval(), dtype=dtype))
    for _ in range(2):  # the second time with weights that are packed
        expect(network(images()), dtype)
    assert flow.fused > 0


@pytest.mark.parametrize(("name", "fused", "with_residual"), [("resnet18", 17, 8), ("resnet50", 49, 16)])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_every_convolution_with_a_relu_is_one_fused_kernel(
    name: str, fused: int, with_residual: int, dtype: torch.dtype, flow: Flow
) -> None:
    network = on_cuda(lambda: build(name, norm="frozen_bn").eval())
    with autocast(dtype):
        network(images())
    assert (flow.fused, flow.fused_with_residual) == (fused, with_residual)
