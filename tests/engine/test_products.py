"""The convolutions of training, by either way, against autograd's."""

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from torch import Tensor

from backbone.engine import products
from backbone.engine.kernels import Geometry, has_onednn
from backbone.engine.products import conv_backward, convolve

LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
GEOMETRIES = {
    "1x1": (1, Geometry((1, 1), (0, 0), (1, 1), 1)),
    "1x1, strides 2 and 1": (1, Geometry((2, 1), (0, 0), (1, 1), 1)),
    "1x1, stride 2": (1, Geometry((2, 2), (0, 0), (1, 1), 1)),
    "1x1, padded": (1, Geometry((1, 1), (1, 1), (1, 1), 1)),
    "1x1, grouped": (1, Geometry((2, 2), (0, 0), (1, 1), 4)),
    "3x3": (3, Geometry((1, 1), (1, 1), (1, 1), 1)),
    "3x3, strides 2 and 1": (3, Geometry((2, 1), (1, 1), (1, 1), 1)),
    "3x3, dilated": (3, Geometry((1, 1), (2, 3), (2, 3), 1)),
    "3x3, grouped": (3, Geometry((1, 1), (1, 1), (1, 1), 4)),
}


def make(name: str, size: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Geometry]:
    """An input, a weight, a gradient of the output that is dense in no layout, and the geometry."""
    kernel, geometry = GEOMETRIES[name]
    x = torch.randn(size[0], 16, *size[1:]).to(dtype, memory_format=torch.channels_last)
    weight = torch.randn(24, 16 // geometry.groups, kernel, kernel).to(dtype)
    output = F.conv2d(x, weight, None, *geometry)
    return x, weight, torch.randn_like(output.repeat(1, 2, 1, 1))[:, ::2], geometry


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("size", [(1, 1, 1), (1, 2, 9), (2, 9, 7)], ids=str)  # large and small weights
@pytest.mark.parametrize("name", GEOMETRIES)
def test_values_equal_a_convolutions(name: str, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, weight, _, geometry = make(name, size, dtype)
    actual = convolve(x, weight, geometry)
    assert actual.dtype == dtype
    assert relative_error(actual.double(), F.conv2d(x.double(), weight.double(), None, *geometry)) <= LIMITS[dtype]


NEEDS = ((True, True), (True, False), (False, True))
SIZES = ((1, 1, 1), (1, 2, 9), (2, 9, 7))
# Every geometry with every size and dtype, and every pair of these with what is needed and whether it is added.
GRADIENTS = [
    (name, size, dtype, *NEEDS[(i + j + k) % 3], (i + j) % 2 == 1)
    for i, name in enumerate(GEOMETRIES)
    for j, size in enumerate(SIZES)
    for k, dtype in enumerate(LIMITS)
]


@pytest.mark.parametrize(("name", "size", "dtype", "needs_x", "needs_weight", "adds"), GRADIENTS, ids=str)
def test_gradients_equal_autograds(
    name: str, size: tuple[int, int, int], dtype: torch.dtype, needs_x: bool, needs_weight: bool, adds: bool
) -> None:
    x, weight, grad, geometry = make(name, size, dtype)
    onto = torch.randn_like(x) if adds else None
    leaf_x, leaf_weight = (tensor.double().requires_grad_() for tensor in (x, weight))
    output = F.conv2d(leaf_x, leaf_weight, None, *geometry)
    of_x, of_weight = torch.autograd.grad(output, (leaf_x, leaf_weight), grad.double())
    if onto is not None:
        of_x = of_x + onto.double()
    actual = conv_backward(grad, x, weight, geometry, needs_x=needs_x, needs_weight=needs_weight, onto=onto)
    if needs_x and onto is not None:
        assert actual[0] is onto
    for needed, ours, expected in zip((needs_x, needs_weight), actual, (of_x, of_weight), strict=True):
        assert (ours is not None) is needed
        if ours is not None:
            assert ours.dtype == dtype
            assert relative_error(ours.double(), expected) <= LIMITS[dtype]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The shapes of the products that were taken."""
    shapes: list[tuple[int, int]] = []

    def watched(a: Tensor, b: Tensor) -> Tensor:
        shapes.append((len(a), b.shape[1]))
        return a @ b

    monkeypatch.setattr(products, "_product", watched)
    monkeypatch.setattr(products, "HAS_LINEAR", True)
    return shapes


def test_a_large_weight_goes_by_products_and_a_small_one_does_not(taken: list[tuple[int, int]]) -> None:
    for size in [(1, 1, 1), (1, 16, 16)]:
        x, weight, grad, geometry = make("3x3", size, torch.float32)
        conv_backward(grad, x, weight, geometry, needs_x=True, needs_weight=True)
    assert taken == [(24, 9 * 16)]


@pytest.mark.parametrize(
    ("pixels", "dtype", "goes_by_product"),
    [
        (4, torch.float32, True),
        (8, torch.float32, False),
        (8, torch.bfloat16, True),
        (64, torch.bfloat16, False),
    ],
)
def test_a_1x1_goes_by_product_where_pixels_are_few_and_in_bfloat16_where_they_are_more(
    pixels: int, dtype: torch.dtype, goes_by_product: bool, taken: list[tuple[int, int]]
) -> None:
    x, weight, grad, geometry = make("1x1", (1, pixels, pixels), dtype)
    conv_backward(grad, x, weight, geometry, needs_x=False, needs_weight=True)
    assert bool(taken) is (goes_by_product and has_onednn(x))


@pytest.mark.parametrize(("precision", "products_taken"), [("highest", 1), ("medium", 0)])
def test_a_lower_precision_of_products_does_not_lower_that_of_convolutions(
    precision: str, products_taken: int, taken: list[tuple[int, int]]
) -> None:
    x, weight, _, geometry = make("1x1", (1, 1, 1), torch.float32)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        convolve(x, weight, geometry)
    finally:
        torch.set_float32_matmul_precision(before)
    assert len(taken) == products_taken
