"""Winograd convolutions against direct ones in double precision."""

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error

from backbone.engine.kernels import Geometry, has_onednn
from backbone.engine.winograd import WinogradConv, suits

pytestmark = pytest.mark.skipif(not has_onednn(torch.zeros(1)), reason="this build of torch has no oneDNN")
SAME = Geometry((1, 1), (1, 1), (1, 1), 1)
UNSUITED = {
    "few channels": ((1, 64, 32, 32), (64, 64, 3, 3), SAME, torch.float32),
    "1x1": ((1, 256, 32, 32), (256, 256, 1, 1), Geometry((1, 1), (0, 0), (1, 1), 1), torch.float32),
    "stride 2": ((1, 256, 32, 32), (256, 256, 3, 3), Geometry((2, 2), (1, 1), (1, 1), 1), torch.float32),
    "dilated": ((1, 256, 32, 32), (256, 256, 3, 3), Geometry((1, 1), (2, 2), (2, 2), 1), torch.float32),
    "bfloat16": ((1, 256, 32, 32), (256, 256, 3, 3), SAME, torch.bfloat16),
    "a tiny image": ((1, 256, 4, 4), (256, 256, 3, 3), SAME, torch.float32),
}


@pytest.mark.parametrize(
    ("channels_in", "channels_out", "size", "relu"),
    [
        (128, 128, (1, 1, 1), True),
        (256, 128, (1, 1, 1), False),
        (128, 128, (1, 8, 12), False),
        (256, 128, (2, 13, 7), True),
        (512, 512, (2, 13, 7), False),
        (256, 128, (1, 30, 41), True),
        (128, 128, (2, 50, 70), True),  # in bands
        (256, 128, (2, 50, 70), False),
    ],
    ids=str,
)
def test_it_equals_the_direct_convolution(
    channels_in: int, channels_out: int, size: tuple[int, int, int], relu: bool
) -> None:
    x = torch.randn(size[0], channels_in, *size[1:])
    weight, bias = torch.randn(channels_out, channels_in, 3, 3) / 30, torch.randn(channels_out)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    actual = WinogradConv(weight, bias, x)(x, relu=relu)
    assert relative_error(actual, expected.relu() if relu else expected) <= 1e-5
    assert actual.is_contiguous(memory_format=torch.channels_last)


def test_it_suits_wide_3x3_convolutions() -> None:
    assert suits(torch.zeros(1, 256, 32, 32), torch.zeros(256, 256, 3, 3), SAME)


@pytest.mark.parametrize("case", UNSUITED)
def test_it_suits_nothing_else(case: str) -> None:
    x, weight, geometry, dtype = UNSUITED[case]
    assert not suits(torch.zeros(x, dtype=dtype), torch.zeros(weight, dtype=dtype), geometry)
