"""The stem in bands of rows against its modules one after the other."""

import importlib
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import build, relative_error
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from backbone import FrozenBatchNorm2d, optimize_for_inference
from backbone.engine.folded import FoldedConv2d
from backbone.engine.operation import conv_norm_act, fold
from backbone.engine.stem import Bands, plan_bands

LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
stem_file = importlib.import_module("backbone.engine.stem")  # the package has a function of that name
RELU = nn.ReLU(inplace=True)
Layers = tuple[nn.Conv2d, nn.Module, nn.MaxPool2d]


def stem(images: Tensor, conv: nn.Module, norm: nn.Module, pool: nn.Module) -> Tensor:
    """The engine's stem, or the modules' where it stays out."""
    out = stem_file.stem(images, conv, norm, RELU, pool)
    return pool(F.relu(norm(conv(images)))) if out is None else out  # type: ignore[no-any-return]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The images and rows that the convolution was given, call by call; a band has at most 16 rows of 8 channels."""
    shapes: list[tuple[int, int]] = []

    def watched(x: Tensor, conv: nn.Module, norm: nn.Module, *, act: nn.Module) -> Tensor | None:
        shapes.append((x.shape[0], x.shape[2]))
        return conv_norm_act(x, conv, norm, act=act)

    monkeypatch.setattr(stem_file, "conv_norm_act", watched)
    monkeypatch.setattr(stem_file, "_FRESH_BYTES", 0)
    monkeypatch.setattr(stem_file, "_BAND_BYTES", 16 * 8 * 16 * 4)
    return shapes


def make(norm: type[nn.Module] = FrozenBatchNorm2d, dtype: torch.dtype = torch.float32) -> Layers:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False)
    found = norm(8)
    for name, constant in found.state_dict().items():
        if constant.is_floating_point():
            constant.copy_(torch.rand(8) + 0.5 if name != "bias" else torch.randn(8))
    return conv.requires_grad_(False).to(dtype), found.requires_grad_(False).to(dtype), nn.MaxPool2d(3, 2, 1)


def folded(conv: nn.Conv2d, norm: nn.Module, pool: nn.MaxPool2d) -> Layers:
    assert isinstance(norm, FrozenBatchNorm2d)
    return FoldedConv2d(conv, *fold(conv, norm, conv.weight)), nn.Identity(), pool


@pytest.mark.parametrize(
    ("batch", "height", "width", "itemsize", "expected"),
    [
        (1, 240, 320, 4, None),  # 19 MiB: heap memory, which torch's maximum may as well fill with indices
        (1, 240, 320, 2, Bands(1, 240)),
        (1, 400, 672, 4, Bands(1, 80)),
        (1, 400, 672, 2, Bands(1, 134)),
        (2, 400, 672, 4, Bands(1, 80)),
        (8, 240, 320, 2, Bands(1, 240)),
        (256, 112, 112, 4, Bands(5, 112)),
        (1, 4, 10**6, 4, Bands(1, 2)),
    ],
)
def test_whole_images_are_taken_where_they_fit(
    batch: int, height: int, width: int, itemsize: int, expected: Bands | None
) -> None:
    assert plan_bands(batch, height, width, 64, itemsize) == expected


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize(
    "shape", [(1, 3, 4, 4), (1, 3, 64, 32), (3, 3, 64, 32), (5, 3, 16, 16), (1, 3, 100, 20)], ids=str
)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_bands_give_what_the_modules_give(
    dtype: torch.dtype, shape: tuple[int, ...], layout: str, seen: list[tuple[int, int]]
) -> None:
    conv, norm, pool = make(dtype=dtype)
    images = torch.randn(shape).to(dtype)
    if layout == "channels_last":
        images = images.contiguous(memory_format=torch.channels_last)
    elif layout == "transposed":
        images = images.transpose(2, 3).contiguous().transpose(2, 3)
    found = stem(images, conv, norm, pool)
    expected = pool(F.relu(norm.double()(conv.double()(images.double()))))
    assert found.dtype == dtype
    assert found.shape == expected.shape
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(found.double(), expected) <= LIMITS[dtype]
    assert sum(images for images, _ in seen) >= shape[0]


def test_only_large_images_are_cut(seen: list[tuple[int, int]]) -> None:
    stem(torch.randn(3, 3, 64, 32), *make())
    assert seen == [(1, 34), (1, 36)] * 3  # two bands of 16 rows and what the convolution sees around them
    seen.clear()
    stem(torch.randn(5, 3, 16, 16), *make())
    assert seen == [(4, 16), (1, 16)]


@pytest.mark.parametrize("is_folded", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_goes_as_far_as_in_one_pass(
    dtype: torch.dtype, autocast: bool, is_folded: bool, seen: list[tuple[int, int]]
) -> None:
    layers = folded(*make(dtype=dtype)) if is_folded else make(dtype=dtype)
    images = torch.randn(1, 3, 64, 32).to(dtype)
    images[0, 1, 31, 7] = torch.nan
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        found = stem(images, *layers)
        features = conv_norm_act(images, *layers[:2], act=RELU)
        expected = layers[-1](F.relu(layers[1](layers[0](images))) if features is None else features)
    assert torch.equal(found.isnan(), expected.isnan())
    assert found.dtype == expected.dtype
    assert relative_error(found.nan_to_num(), expected.nan_to_num()) <= LIMITS[found.dtype]
    assert len(seen) == 1  # not in bands: their maximum knows no NaN
    assert found.isnan().any()


def test_an_inference_copy_goes_by_bands_as_well(seen: list[tuple[int, int]]) -> None:
    model = build().eval()
    copy = optimize_for_inference(model)
    images = torch.randn(1, 3, 64, 96)
    expected = model(images)
    seen.clear()
    with torch.no_grad():
        for _ in range(4):  # its weights are packed meanwhile
            found = copy(images)
    assert len(seen) > 4
    for name, feature in found.items():
        assert relative_error(feature, expected[name]) <= 1e-5


class OtherPool(nn.MaxPool2d):
    """Somebody else's."""


def hooked(module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: None)


def small_kernel(conv: nn.Conv2d) -> None:
    conv.weight, conv.kernel_size = nn.Parameter(conv.weight[..., :3, :3], requires_grad=False), (3, 3)


REASONS: dict[str, Callable[[nn.Conv2d, nn.Module, nn.MaxPool2d], object]] = {
    "a gradient is needed": lambda conv, norm, pool: conv.requires_grad_(),
    "the convolution is watched": lambda conv, norm, pool: hooked(conv),
    "the norm is watched": lambda conv, norm, pool: hooked(norm),
    "the maximum is watched": lambda conv, norm, pool: hooked(pool),
    "the maximum is of another class": lambda conv, norm, pool: setattr(pool, "__class__", OtherPool),
    "the maximum is another": lambda conv, norm, pool: setattr(pool, "ceil_mode", True),
    "the kernel is another": lambda conv, norm, pool: small_kernel(conv),
    "the dilation is another": lambda conv, norm, pool: setattr(conv, "dilation", (3, 3)),
}


@pytest.mark.parametrize("reason", REASONS)
def test_one_pass_where_bands_would_show(reason: str, seen: list[tuple[int, int]]) -> None:
    conv, norm, pool = make()
    REASONS[reason](conv, norm, pool)
    images = torch.randn(1, 3, 64, 32)
    assert relative_error(stem(images, conv, norm, pool), pool(F.relu(norm(conv(images))))) <= 1e-5
    assert len(seen) <= 1


class Onlooker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation, as a counter of them does, without a hook on any module."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_one_pass_where_operations_are_seen(seen: list[tuple[int, int]]) -> None:
    with Onlooker():  # type: ignore[no-untyped-call]
        stem(torch.randn(1, 3, 64, 32), *make())
    assert len(seen) == 0


def test_statistics_are_taken_of_whole_images(seen: list[tuple[int, int]]) -> None:
    with torch.no_grad():
        stem(torch.randn(1, 3, 64, 32), *make(nn.BatchNorm2d))
    assert len(seen) == 1


def test_sizes_round_up(seen: list[tuple[int, int]]) -> None:
    assert stem(torch.randn(1, 3, 63, 34), *make()).shape == (1, 8, 16, 9)
    assert len(seen) == 1
