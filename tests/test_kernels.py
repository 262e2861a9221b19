"""The stem's rearrangement, which only CUDA uses, is exact wherever it is computed."""

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error

from backbone.kernels import Geometry, _space_to_depth, _stem_weight, conv_backward

SIZES = [(1, 1), (2, 3), (7, 8), (33, 64)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_stem_in_space_to_depth_equals_the_7x7(channels: int, size: tuple[int, int]) -> None:
    x, weight = torch.randn(2, channels, *size).double(), torch.randn(8, channels, 7, 7).double()
    packed = F.conv2d(_space_to_depth(x), _stem_weight(weight))
    assert relative_error(packed, F.conv2d(x, weight, stride=2, padding=3)) <= 1e-12


@pytest.mark.parametrize(("needs_x", "needs_weight"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("kernel", [1, 3])
def test_bfloat16_gradients_equal_autograd(kernel: int, needs_x: bool, needs_weight: bool) -> None:
    x = torch.randn(2, 16, 9, 7).to(torch.bfloat16, memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(8, 16, kernel, kernel).bfloat16().requires_grad_()
    grad = torch.randn(2, 8, 10 - kernel, 8 - kernel).bfloat16()
    expected = torch.autograd.grad(F.conv2d(x.float(), weight.float()), (x, weight), grad.float())
    geometry = Geometry((1, 1), (0, 0), (1, 1), 1)
    actual = conv_backward(grad, x.detach(), weight.detach(), geometry, needs_x=needs_x, needs_weight=needs_weight)
    for wanted, ours, theirs in zip((needs_x, needs_weight), actual, expected, strict=True):
        assert (ours is not None) is wanted
        assert ours is None or relative_error(ours, theirs) <= 2e-2
