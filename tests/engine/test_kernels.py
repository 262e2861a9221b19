"""The stem's rearrangement, which only CUDA uses, is exact wherever it is computed."""

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error

from backbone.engine.kernels import _space_to_depth, _stem_weight

SIZES = [(1, 1), (2, 3), (7, 8), (33, 64)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_stem_in_space_to_depth_equals_the_7x7(channels: int, size: tuple[int, int]) -> None:
    x, weight = torch.randn(2, channels, *size).double(), torch.randn(8, channels, 7, 7).double()
    packed = F.conv2d(_space_to_depth(x), _stem_weight(weight))
    assert relative_error(packed, F.conv2d(x, weight, stride=2, padding=3)) <= 1e-12
