"""The pooling after the stem against torch's own; the residual blocks are held by the parity tests."""

import pytest
import torch
import torch.nn.functional as F

from backbone import blocks
from backbone.blocks import StemPool


@pytest.mark.parametrize(
    "shape", [(1, 64, 24, 32), (3, 5, 10, 4), (2, 1, 2, 2), (1, 8, 9, 12), (1, 8, 12, 9), (1, 3, 1, 1)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("band", [1, 4096, 2**30])
def test_stem_pool_is_max_pool2d(
    shape: tuple[int, ...], dtype: torch.dtype, band: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "_FRESH_BYTES", 0)
    monkeypatch.setattr(blocks, "_POOL_BYTES", band)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    layouts = {
        "contiguous": x,
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "cropped": F.pad(x, (1, 2, 3, 1))[:, :, 3:-1, 1:-2],
    }
    for layout, features in layouts.items():
        found = StemPool()(features)
        assert torch.equal(found, F.max_pool2d(features, 3, 2, 1)), layout
        if layout == "channels_last":
            assert found.is_contiguous(memory_format=torch.channels_last)


def test_stem_pool_lets_nan_and_infinity_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_FRESH_BYTES", 0)
    x = torch.full((1, 2, 8, 8), -torch.inf)
    x[0, 0, 3, 5] = torch.nan
    x[0, 1, 4, 4] = torch.inf
    found, expected = StemPool()(x), F.max_pool2d(x, 3, 2, 1)
    assert found.isnan().sum() == 4  # the windows that see it
    assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7))


def test_stem_pool_has_a_gradient() -> None:
    x = torch.randn(1, 4, 8, 8, requires_grad=True)
    (found,) = torch.autograd.grad(StemPool()(x).square().sum(), x)
    (expected,) = torch.autograd.grad(F.max_pool2d(x, 3, 2, 1).square().sum(), x)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("size", "dtype", "stores"), [(16, torch.float32, True), (16, torch.bfloat16, False), (2048, torch.float32, False)]
)
def test_stem_pool_stores_no_indices_where_they_cost(size: int, dtype: torch.dtype, stores: bool) -> None:
    x = torch.zeros(1, 4, size, size, dtype=dtype)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, torch.no_grad():
        StemPool()(x)
    assert ("aten::max_pool2d_with_indices" in {event.key for event in profile.key_averages()}) is stores
