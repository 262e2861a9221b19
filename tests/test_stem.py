"""The stem in bands of rows against its modules one after the other."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from torch import Tensor, nn

from backbone import BackboneConfig, FrozenBatchNorm2d, build_backbone, optimize_for_inference
from backbone import stem as stem_file
from backbone.folded import FoldedConv2d
from backbone.fused import conv_norm_act
from backbone.stem import stem

LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of images that the convolution was given, call by call."""
    rows: list[int] = []

    def watched(x: Tensor, conv: nn.Module, norm: nn.Module) -> Tensor:
        rows.append(x.shape[2])
        return conv_norm_act(x, conv, norm)

    monkeypatch.setattr(stem_file, "conv_norm_act", watched)
    monkeypatch.setattr(stem_file, "_FRESH_BYTES", 0)
    return rows


def make(norm: type[nn.Module] = FrozenBatchNorm2d, channels: int = 8) -> tuple[nn.Conv2d, nn.Module, nn.MaxPool2d]:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False).requires_grad_(False)
    found = norm(channels).requires_grad_(False)
    for name, constant in found.state_dict().items():
        if constant.is_floating_point():
            constant.copy_(torch.rand(channels) + 0.5 if name != "bias" else torch.randn(channels))
    return conv, found, nn.MaxPool2d(3, stride=2, padding=1)


def in_a_row(images: Tensor, conv: nn.Module, norm: nn.Module, pool: nn.Module) -> Tensor:
    found: Tensor = pool(F.relu(norm(conv(images))))
    return found


@pytest.mark.parametrize("shape", [(1, 3, 4, 4), (1, 3, 64, 48), (2, 3, 36, 8), (1, 3, 100, 20)], ids=str)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("bands", [1, 3, 1000])
def test_bands_give_what_the_modules_give(
    shape: tuple[int, ...], dtype: torch.dtype, bands: int, seen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    conv, norm, pool = make()
    images = torch.randn(shape).contiguous(memory_format=torch.channels_last).to(dtype)
    between = shape[0] * 8 * shape[2] * shape[3] // 4 * dtype.itemsize
    monkeypatch.setattr(stem_file, "_BAND_BYTES", -(-between // bands))
    expected = in_a_row(images.double(), conv.to(dtype).double(), norm.to(dtype).double(), pool)
    found = stem(images, conv.to(dtype), norm.to(dtype), pool)
    assert found.dtype == dtype
    assert found.shape == expected.shape
    assert relative_error(found.double(), expected) <= LIMITS[dtype]
    most = shape[2] // 4  # a band makes one row at least
    assert len(seen) in ({1} if bands == 1 else {min(bands, most), min(bands, most) - 1})


def test_an_inference_copy_goes_by_bands_as_well(seen: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_backbone(BackboneConfig(name="resnet18", norm="bn")).eval()
    copy = optimize_for_inference(model)
    assert isinstance(copy.get_submodule("conv1"), FoldedConv2d)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        monkeypatch.setattr(stem_file, "_FRESH_BYTES", 2**40)
        expected = model(images)
        monkeypatch.setattr(stem_file, "_FRESH_BYTES", 0)
        monkeypatch.setattr(stem_file, "_BAND_BYTES", 2**16)
        seen.clear()
        for _ in range(4):  # packed from the third on
            found = copy(images)
    assert len(seen) > 4
    for name, feature in found.items():
        assert relative_error(feature, expected[name]) <= 1e-5


@pytest.mark.parametrize(
    ("height", "width", "dtype", "calls"),
    [
        (800, 1344, torch.float32, 5),
        (480, 640, torch.float32, 1),
        (800, 1344, torch.bfloat16, 3),
        (798, 1344, torch.float32, 1),
    ],
)
def test_large_images_go_by_bands(
    height: int, width: int, dtype: torch.dtype, calls: int, seen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stem_file, "_FRESH_BYTES", 32 * 2**20)
    conv, norm, pool = make(channels=64)
    stem(torch.zeros(1, 3, height, width, dtype=dtype), conv.to(dtype), norm.to(dtype), pool)
    assert len(seen) == calls


def hooked(module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: None)


REASONS: dict[str, Callable[[nn.Conv2d, nn.Module, nn.Module], object]] = {
    "a gradient is needed": lambda conv, norm, pool: conv.requires_grad_(),
    "the convolution is watched": lambda conv, norm, pool: hooked(conv),
    "the norm is watched": lambda conv, norm, pool: hooked(norm),
    "the maximum is watched": lambda conv, norm, pool: hooked(pool),
    "the maximum is another": lambda conv, norm, pool: setattr(pool, "ceil_mode", True),
    "the convolution is another": lambda conv, norm, pool: setattr(conv, "dilation", (3, 3)),
}


@pytest.mark.parametrize("reason", REASONS)
def test_one_pass_where_bands_would_show(reason: str, seen: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stem_file, "_BAND_BYTES", 2**10)
    layers = make()
    stem(torch.randn(1, 3, 64, 32), *layers)
    assert len(seen) > 1
    seen.clear()
    REASONS[reason](*layers)
    stem(torch.randn(1, 3, 64, 32), *layers)
    assert len(seen) == 1


def test_statistics_are_taken_of_whole_images(seen: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stem_file, "_BAND_BYTES", 2**10)
    with torch.no_grad():
        stem(torch.randn(1, 3, 64, 32), *make(nn.BatchNorm2d))
    assert len(seen) == 1
