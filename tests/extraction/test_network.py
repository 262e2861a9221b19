"""From bytes to vectors: pooling in parts is pooling."""

import pytest
import torch

from backbone.extraction.network import pool


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 64, 50, 60), (1, 3, 1, 1), (3, 2048, 9, 7), (1, 300_000, 1, 2)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_pooling_is_that_of_double_precision(
    shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    maps = torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)
    before = maps.clone()
    average = maps.double().mean((2, 3)).float()
    generalised = maps.double().clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3).float()
    torch.testing.assert_close(pool(maps, gem=False), average, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pool(maps, gem=True), generalised, rtol=1e-5, atol=1e-6)
    assert torch.equal(maps, before)
