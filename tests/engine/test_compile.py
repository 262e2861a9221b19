"""torch.compile and torch.export see one graph and compute the same features."""

import copy
import shutil

import pytest
import torch
from conftest import build, randomise_norms, relative_error
from torch.export import Dim, export

from backbone import Backbone, optimize_for_inference

NORMS = ("bn", "frozen_bn", "gn")


def randomised(norm: str) -> Backbone:
    model = build(norm=norm).eval()
    randomise_norms(model)
    return model


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(actual) == list(expected)
    assert max(relative_error(actual[name], expected[name]) for name in expected) <= 1e-5


@pytest.mark.skipif(
    torch.__version__ < "2.14", reason="older torch ties an export of its own max_pool2d to odd or even sizes"
)
@pytest.mark.parametrize("norm", NORMS)
@torch.no_grad()
def test_export_with_dynamic_sizes_gives_the_same_features(norm: str) -> None:
    model = randomised(norm)
    # 33: torch specialises on feature maps of a single pixel, in torchvision's own networks too
    dynamic = {0: Dim("batch"), 2: Dim("height", min=33), 3: Dim("width", min=33)}
    program = export(model, (torch.randn(2, 3, 64, 96),), dynamic_shapes={"images": dynamic})
    for size in [(2, 64, 96), (3, 65, 77), (5, 128, 33)]:
        images = torch.randn(size[0], 3, *size[1:])
        assert_close(program.module()(images), model(images))


@pytest.mark.parametrize("norm", NORMS)
def test_the_whole_network_compiles_to_one_graph(norm: str) -> None:
    model = randomised(norm).train()
    images = torch.randn(2, 3, 64, 64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    assert_close(compiled(images), model(images))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # inside torch 2.11's compiler
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's CPU code generator needs g++")
@torch.no_grad()
def test_generated_code_gives_the_same_features() -> None:
    model = randomised("frozen_bn")
    images = torch.randn(1, 3, 64, 64)
    assert_close(torch.compile(model, fullgraph=True)(images), model(images))


def test_a_frozen_prefix_compiles() -> None:
    model = build(freeze_at=2)
    images = torch.randn(2, 3, 64, 64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(images)["c5"].sum().backward()
    assert model.get_parameter("layer1.0.conv1.weight").grad is None
    assert model.get_parameter("layer2.0.conv1.weight").grad is not None


def test_an_inference_copy_compiles() -> None:
    model = optimize_for_inference(build(num_classes=10).eval())
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_close(compiled(images), model(images))


@pytest.mark.parametrize("norm", ["frozen_bn", "bn"])
def test_stages_that_recompute_compile_and_export_in_training_mode(norm: str) -> None:
    model = build(norm=norm, checkpoint_stages=["c2"], out_features=["c2"]).train()
    plain = copy.deepcopy(model)
    images = torch.randn(2, 3, 32, 32)
    losses = []
    for network in (torch.compile(model, backend="aot_eager", fullgraph=True), plain):
        losses.append(network(images)["c2"].square().mean())
        losses[-1].backward()
    assert relative_error(*losses) <= 1e-5
    for (name, ours), reference in zip(model.named_parameters(), plain.parameters(), strict=True):
        if reference.grad is not None:
            assert ours.grad is not None
            assert relative_error(ours.grad, reference.grad) <= 1e-4, name
    for buffer, expected in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected)
    exported = torch.export.export(copy.deepcopy(plain), (images,)).module()
    assert relative_error(exported(images)["c2"], plain(images)["c2"]) <= 1e-4
