"""What exports are made of, without a runtime: fixed shapes, folding, pixels."""

from pathlib import Path
from typing import Any

import pytest
import torch
from cells import backbone, detector
from conftest import relative_error
from torch import Tensor, nn

from backbone.export.affine import PixelAffine
from backbone.export.detection.core import DetectorCore, fixed_shapes
from backbone.export.detection.operators import NOTHING, select_best, suppress
from backbone.export.folding import fold_norms, for_export
from backbone.export.network import strides_of, understand
from backbone.export.request import Request
from backbone.export.resizing import AntialiasingAsProducts, resize
from backbone.export.tracing import trace
from backbone.features import Preprocessing


@pytest.mark.parametrize("name", ["faster_rcnn", "mask_rcnn", "keypoint_rcnn", "retinanet", "fcos"])
def test_fixed_shapes_find_what_torchvision_finds(name: str) -> None:
    model: Any = detector(name)
    images = torch.rand(2, 3, 128, 160)
    core = DetectorCore(model, strides_of(model.backbone, 3))
    resized, _ = model.transform(list(images))
    size = torch.tensor(resized.image_sizes[0], dtype=torch.float32)
    ratio = torch.tensor([160 / size[1], 128 / size[0]]).repeat(2)
    with torch.no_grad():
        expected = model(list(images))
        boxes, scores, labels, count, *others = core(resized.tensors, size, ratio)
    for index, each in enumerate(expected):
        found = int(count[index])
        assert found == len(each["boxes"]) > 0
        assert torch.allclose(boxes[index, :found], each["boxes"], atol=0.1)
        assert torch.allclose(scores[index, :found], each["scores"], atol=1e-3)
        assert torch.equal(labels[index, :found], each["labels"])
        assert not boxes[index, found:].any()
    names = [*fixed_shapes(model)][4:]
    assert [tensor.ndim for tensor in others] == [len(fixed_shapes(model)[key]) + 1 for key in names]


def test_the_best_of_too_few_are_followed_by_nothing() -> None:
    values, places = select_best(torch.tensor([[1.0, 3.0, 2.0]]), 5)
    assert values.tolist() == [[3.0, 2.0, 1.0, pytest.approx(NOTHING), pytest.approx(NOTHING)]]
    assert places.tolist() == [[1, 2, 0, 0, 0]]


def test_boxes_suppress_only_those_of_their_group_and_none_below_zero() -> None:
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 10], [0, 0, 10, 10]]])
    scores, groups = torch.tensor([[0.9, 0.8, 0.7, -1.0]]), torch.tensor([[0, 0, 1, 2]])
    assert suppress(boxes, scores, groups, 3, 0.5).tolist() == [[True, False, True, False]]


def test_every_norm_after_a_convolution_is_folded_into_it() -> None:
    model = for_export(backbone("resnet18"))
    images = torch.rand(1, 3, 64, 64)
    program = torch.export.export(model, (images,), strict=False)
    assert fold_norms(program) == 20
    assert all(node.target is not torch.ops.aten.batch_norm.default for node in program.graph.nodes)
    with torch.no_grad():
        assert relative_error(program.module()(images)["c5"], model(images)["c5"]) < 1e-5


def test_a_norm_is_left_alone_where_its_convolution_serves_another_layer() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.first, self.second = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
            self.alone, self.used_twice = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.alone(self.first(self.conv(x)) + self.second(self.conv(x)))
            return self.used_twice(y) + y  # type: ignore[no-any-return]

    model = Shared().eval()
    nn.init.uniform_(model.second.running_var, 2, 3)  # type: ignore[arg-type]
    images = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        program = torch.export.export(model, (images,), strict=False)
        assert fold_norms(program) == 0
        assert torch.equal(program.module()(images), model(images))


@pytest.mark.parametrize("bicubic", [False, True], ids=["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(40, 61), (100, 100)], ids=["smaller", "larger"])
def test_resizing_by_products_is_torchs_antialiased_resizing(size: tuple[int, int], bicubic: bool) -> None:
    pixels = torch.randint(0, 256, (1, 3, 71, 90)).float()
    mode = "bicubic" if bicubic else "bilinear"
    expected = nn.functional.interpolate(pixels, size, mode=mode, antialias=True).clamp(0, 255)
    assert (resize(pixels, size, bicubic=bicubic) - expected).abs().max() < 1e-2


def test_bgr_weights_of_0_to_255_get_rgb_bytes_in_their_own_order() -> None:
    bgr = Preprocessing((103.53, 116.28, 123.675), (1.0, 1.0, 1.0), "bgr", (0.0, 255.0))
    affine = PixelAffine.from_preprocessing(bgr, 3)
    image = torch.tensor([10.0, 20.0, 30.0])
    prepared = image[list(affine.order)] * affine.scale(takes_bytes=True) + affine.offset
    expected = torch.tensor([30 - 103.53, 20 - 116.28, 10 - 123.675])
    assert torch.allclose(prepared.float(), expected, atol=1e-5)


def test_a_preparation_that_mixes_channels_is_refused() -> None:
    with pytest.raises(ValueError, match="got one that mixes them"):
        PixelAffine.of(lambda image: image.mean(0, keepdim=True).expand(3, 1, 1), 3)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_antialiased_resizing_is_traced_as_products_and_any_other_as_it_is(mode: str) -> None:
    embedding = torch.randn(1, 8, 14, 14)
    with AntialiasingAsProducts():
        products = nn.functional.interpolate(embedding, size=(10, 17), mode=mode, antialias=True)
        plain = nn.functional.interpolate(embedding, size=(10, 17), mode=mode)
    assert relative_error(products, nn.functional.interpolate(embedding, (10, 17), mode=mode, antialias=True)) < 1e-5
    assert torch.equal(plain, nn.functional.interpolate(embedding, (10, 17), mode=mode))


@pytest.mark.parametrize("size", [(65, 97), (64, 96), (96, 33)])
def test_a_network_that_pads_its_images_is_traced_for_sizes_that_need_it_and_for_those_that_do_not(
    size: tuple[int, int],
) -> None:
    pytest.importorskip("timm", reason="pip install 'backbone[timm]'")
    model = backbone("timm/convnext_atto", norm="bn", out_features=("c2",)).eval()
    request = Request(Path("model.pt2"), "torch-export")
    traced = trace(understand(model, request), request)
    images = torch.rand(2, 3, *size)
    with torch.no_grad():
        assert relative_error(traced.program.module()(images)["c2"], model(images)["c2"]) < 1e-5
