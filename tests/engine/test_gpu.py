"""What only a GPU can show: the cuDNN kernels' values, gradients, memory, and graphs around the model."""

import pytest
import torch
from conftest import build, randomise_norms, relative_error
from torch import Tensor

from backbone import Backbone, optimize_for_inference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]
HALF = {torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.fixture(autouse=True)
def _exact_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def pair(name: str = "resnet50", **settings: object) -> tuple[Backbone, Backbone]:
    """A model with trainable norms, which runs unfused, and one with frozen norms of the same weights."""
    plain = build(name, norm="bn", **settings).cuda().eval()
    randomise_norms(plain)
    frozen = build(name, norm="frozen_bn", **settings).cuda().eval()
    frozen.load_state_dict(plain.state_dict())
    return plain, frozen


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
@torch.no_grad()
def test_float32_features_equal_plain_pytorch(name: str, layout: torch.memory_format) -> None:
    plain, frozen = pair(name, output_stride=16)
    images = torch.randn(2, 3, 97, 129, device="cuda").to(memory_format=layout)
    for model in (frozen, optimize_for_inference(frozen)):
        actual, expected = model(images), plain(images)
        assert max(relative_error(actual[level], expected[level]) for level in expected) <= 1e-5


# Groups, attention, pooled shortcuts, depthwise convolutions, channels that are no multiple of 8.
@pytest.mark.parametrize("name", ["regnetx_002", "regnety_002", "resnet26d", "ghostnet_050", "hrnet_w18_small"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@torch.no_grad()
def test_timms_features_equal_plain_pytorch(name: str, dtype: torch.dtype) -> None:
    plain, frozen = pair(f"timm/{name}")
    images = torch.randn(2, 3, 96, 128, device="cuda").to(memory_format=torch.channels_last)
    expected = plain(images)
    with torch.autocast("cuda", dtype, enabled=dtype in HALF):
        ours = frozen(images)
    for actual in (ours, optimize_for_inference(frozen, dtype=dtype)(images)):
        errors = [relative_error(actual[level], expected[level]) for level in expected]
        assert max(errors) <= HALF.get(dtype, 1e-5)


@pytest.mark.parametrize("dtype", HALF)
@torch.no_grad()
def test_half_precision_features_are_right(dtype: torch.dtype) -> None:
    plain, frozen = pair()
    images = torch.randn(2, 3, 97, 129, device="cuda")
    expected = plain(images)
    with torch.autocast("cuda", dtype):
        ours = frozen(images)
    for actual in (ours, optimize_for_inference(frozen, dtype=dtype)(images)):
        assert {feature.dtype for feature in actual.values()} == {dtype}
        assert max(relative_error(actual[level], expected[level]) for level in expected) <= HALF[dtype]


def gradients(model: Backbone, images: Tensor, **autocast: object) -> dict[str, Tensor]:
    model.zero_grad()
    with torch.autocast("cuda", **autocast):  # type: ignore[arg-type]
        features = model(images)
    torch.stack([feature.float().square().mean() for feature in features.values()]).sum().backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and "conv" in name}


def test_gradients_equal_plain_pytorch() -> None:
    plain, frozen = pair()
    images = torch.randn(2, 3, 96, 128, device="cuda")
    expected = gradients(plain, images, enabled=False)
    for name, actual in gradients(frozen, images, enabled=False).items():
        assert relative_error(actual, expected[name]) <= 1e-4, name


def test_bfloat16_gradients_are_as_good_as_plain_ones() -> None:
    plain, frozen = pair()
    images = torch.randn(2, 3, 96, 128, device="cuda")
    exact = gradients(plain, images, enabled=False)

    def worst(candidate: dict[str, Tensor]) -> float:
        return max(float((candidate[name] - exact[name]).norm() / exact[name].norm()) for name in exact)

    half = {"dtype": torch.bfloat16, "enabled": True}
    assert worst(gradients(frozen, images, **half)) <= 1.3 * worst(gradients(plain, images, **half))


@torch.no_grad()
def test_a_replayed_graph_sees_new_weights() -> None:
    model = build("resnet18", norm="frozen_bn").cuda().eval()
    images = torch.randn(1, 3, 64, 64, device="cuda")
    model(images)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        features = model(images)
    model.get_parameter("conv1.weight").mul_(0.5)
    graph.replay()
    assert relative_error(features["c5"], model(images)["c5"]) <= 1e-5


@torch.no_grad()
def test_weights_changed_on_the_gpu_are_used() -> None:
    plain, frozen = pair("resnet18")
    images = torch.randn(1, 3, 64, 64, device="cuda")
    frozen(images)
    for model in (plain, frozen):
        model.get_parameter("layer3.0.conv1.weight").mul_(2)
    assert relative_error(frozen(images)["c5"], plain(images)["c5"]) <= 1e-5


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # inside torch 2.11's compiler
@pytest.mark.parametrize("training", [False, True])
def test_the_compiled_model_gives_the_same_features(training: bool) -> None:
    _, frozen = pair("resnet18")
    images = torch.randn(2, 3, 64, 96, device="cuda")
    with torch.set_grad_enabled(training):
        actual, expected = torch.compile(frozen, fullgraph=True)(images), frozen(images)
    assert max(relative_error(actual[level], expected[level]) for level in expected) <= 1e-5


@torch.no_grad()
def test_graphs_of_several_shapes_give_the_same_features_again_and_again() -> None:
    _, frozen = pair("resnet18")
    fast = optimize_for_inference(frozen)
    graphed = optimize_for_inference(frozen, cuda_graphs=True)
    kept = []
    for size in ((64, 96), (65, 33), (64, 96), (96, 64)):
        images = torch.randn(2, 3, *size, device="cuda")
        kept.append((graphed(images), fast(images)))
    for actual, expected in kept:  # all of them, after the last replay
        assert all(torch.equal(actual[level], expected[level]) for level in expected)


@torch.no_grad()
def test_graphs_see_a_newly_loaded_state() -> None:
    graphed, other = (optimize_for_inference(pair("resnet18")[1], cuda_graphs=True) for _ in range(2))
    images = torch.randn(1, 3, 64, 64, device="cuda")
    graphed(images)
    graphed.load_state_dict(other.state_dict())
    assert relative_error(graphed(images)["c5"], other(images)["c5"]) <= 1e-5


@pytest.mark.parametrize("size", [(64, 64), (65, 97), (1, 2)])
@pytest.mark.parametrize("in_channels", [1, 3, 4])
@torch.no_grad()
def test_the_stem_is_right_at_odd_sizes_in_half_precision(in_channels: int, size: tuple[int, int]) -> None:
    plain, frozen = pair("resnet18", in_channels=in_channels)
    images = torch.randn(2, in_channels, *size, device="cuda")
    fast = optimize_for_inference(frozen, dtype=torch.float16)
    assert relative_error(fast(images)["c2"], plain(images)["c2"]) <= HALF[torch.float16]


# Stems that are called as modules of their own, before the norm that stays or the ReLU.
@pytest.mark.parametrize(("name", "norm"), [("timm/resnet50", "frozen_bn"), ("resnet50", "gn")])
@pytest.mark.parametrize("dtype", HALF)
@torch.no_grad()
def test_an_inference_copy_is_right_whoever_calls_its_stem(name: str, norm: str, dtype: torch.dtype) -> None:
    model = build(name, norm=norm).cuda().eval()
    images = torch.randn(2, 3, 97, 129, device="cuda")
    expected = model(images)
    fast = optimize_for_inference(model, dtype=dtype)
    for _ in range(2):
        assert relative_error(fast(images)["c2"], expected["c2"]) <= HALF[dtype]


@torch.no_grad()
def test_double_precision_is_double_precision() -> None:
    plain, frozen = pair("resnet18")
    images = torch.randn(1, 3, 64, 64, device="cuda")
    actual, expected = optimize_for_inference(frozen, dtype=torch.float64)(images), plain.double()(images.double())
    assert max(relative_error(actual[level], expected[level]) for level in expected) <= 1e-6  # of the weights' rounding


@pytest.mark.parametrize(
    "device",
    [0, pytest.param(1, marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"))],
)
def test_a_graph_follows_its_images_in_every_mode(device: int) -> None:
    _, frozen = pair("resnet18")
    fast = optimize_for_inference(frozen).to(f"cuda:{device}")
    graphed = optimize_for_inference(frozen, cuda_graphs=True).to(f"cuda:{device}")
    for mode in (torch.inference_mode, torch.no_grad):
        for is_half in (False, True, False):
            images = torch.randn(2, 3, 64, 96, device=f"cuda:{device}")
            with mode(), torch.autocast("cuda", torch.bfloat16, enabled=is_half):
                actual, expected = graphed(images), fast(images)
            assert all(torch.equal(actual[level], expected[level]) for level in expected)
            assert {feature.dtype for feature in actual.values()} == {torch.bfloat16 if is_half else torch.float32}
