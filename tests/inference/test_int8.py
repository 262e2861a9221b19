"""int8 copies: close to floats, equal to simulated quantisation, never stale, never silent."""

import copy
import io
import itertools
import pickle
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import build, randomise_norms, relative_error
from torch import Tensor, nn
from torch.nn.utils.prune import random_unstructured

from backbone import Backbone, FeaturePyramid, engine_enabled, optimize_for_inference
from backbone.engine import int8 as engine_int8
from backbone.engine import torch_internals
from backbone.engine.int8 import Codes, decode, encode, has_int8, max_pool
from backbone.engine.kernels import Geometry
from backbone.inference.int8.kernel import Int8Conv2d
from backbone.inference.int8.ranges import Histogram

needs_int8 = pytest.mark.skipif(not has_int8(), reason="this CPU has no 8-bit convolutions")
pytestmark = pytest.mark.filterwarnings("ignore:8-bit convolutions do not run here:UserWarning")

CASES: dict[str, dict[str, Any]] = {
    "frozen_bn": {"norm": "frozen_bn"},
    "bn": {"norm": "bn"},
    "bn_eval": {"norm": "bn_eval"},
    "sync_bn": {"norm": "sync_bn"},
    "c1": {"out_features": ["c1", "c2", "c5"]},
    "output stride 16": {"output_stride": 16},
    "output stride 8, as detectron2": {"output_stride": 8, "dilate_first_block": True},
    "bottlenecks": {"name": "resnet50"},
    "stride in 1x1": {"name": "resnet50", "stride_in_1x1": True},
    "groups": {"name": "resnext50_32x4d"},
    "a deep stem and pooled shortcuts": {"name": "resnet50d", "output_stride": 16},
    "logits": {"num_classes": 10},
    "timm: 1x1, depthwise, linear": {"name": "timm/mobilenetv2_050"},
    "timm: padding by size": {"name": "timm/tf_efficientnet_lite0"},
    "timm: squeeze and excite": {"name": "timm/efficientnet_b0"},
    "timm: hard-swish": {"name": "timm/mobilenetv3_small_100"},
    "timm: groups": {"name": "timm/regnetx_002"},
    "timm: blocks": {"name": "timm/resnet18"},
    "timm: branches that add up": {"name": "timm/repvgg_a0"},
}


def trained(name: str = "resnet18", **settings: object) -> Backbone:
    torch.manual_seed(0)
    model = build(name, **settings)
    randomise_norms(model)
    return model.eval()


def batches(count: int = 2, height: int = 96, width: int = 128) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(count, 2, 3, height // 8, width // 8, generator=generator)
    return [F.interpolate(each, (height, width), mode="bicubic") for each in coarse]


def in_int8(model: nn.Module, **settings: Any) -> Any:
    return optimize_for_inference(
        model, dtype=torch.int8, calibration=settings.pop("calibration", batches()), **settings
    )


def cosine(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float(F.cosine_similarity(actual.double().flatten(), expected.double().flatten(), 0))


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_features_are_those_of_floats(case: str) -> None:
    model = trained(**CASES[case])
    fast = in_int8(model)
    assert sum(choice.dtype == torch.int8 for choice in fast.optimization.int8) > 0.85 * len(fast.optimization.int8)
    for images in (batches()[0], torch.cat(batches(2, 64, 96)), batches(1, 72, 104)[0][:1, :, :65, :97]):
        expected = model(images)
        for _ in range(3):
            actual = fast(images)
        assert list(actual) == list(expected)
        assert {feature.dtype for feature in actual.values()} == {torch.float32}
        assert min(cosine(actual[name], expected[name]) for name in expected) > 0.98


@pytest.mark.parametrize("case", ["frozen_bn", "bottlenecks", "groups", "timm: padding by size", "timm: hard-swish"])
@needs_int8
@torch.no_grad()
def test_without_the_engine_nothing_changes_but_the_time(case: str) -> None:
    fast = in_int8(trained(**CASES[case]), max_error=1.0)
    images = batches()[1]
    actual = fast(images)
    with engine_enabled(False):
        expected = fast(images)
    assert min(cosine(actual[name], expected[name]) for name in expected) > 0.999


# --- the reference: simulated quantisation, written by hand for two blocks of a ResNet-18 ----------------------------


def rounded(x: Tensor, codes: Codes) -> Tensor:
    """What is left of ``x`` in 8 bits."""
    scale, zero = codes
    return (torch.clamp(torch.round(x / scale) + zero, 0, 255) - zero) * scale


def rounded_weight(weight: Tensor) -> Tensor:
    scale = weight.abs().amax((1, 2, 3), keepdim=True) / 127
    scale = torch.where(scale > 0, scale, 1.0)
    return torch.round(weight / scale) * scale


def reference(fast: Any, images: Tensor) -> Tensor:
    """C2 of a ResNet-18 in float64, from the weights that ``fast`` has now and the ranges it was calibrated to."""
    state = {name: value.double() for name, value in fast.state_dict().items()}
    codes = fast.calibration.codes

    def conv(name: str, x: Tensor, of: str, stride: int, padding: int) -> Tensor:
        whole = state[f"{name}.weight"]
        weight = rounded_weight(whole.float()).double()
        mean, lost = (torch.tensor(each, dtype=torch.float64) for each in fast.calibration.means[of])
        correction = (whole - weight).sum((2, 3)) @ mean + weight.sum((2, 3)) @ lost
        return F.conv2d(x, weight, state[f"{name}.bias"] + correction, stride, padding)

    x = conv("conv1", rounded(images.double(), codes["images"]), "images", 2, 3)
    x = F.max_pool2d(rounded(F.relu(x), codes["relu"]), 3, 2, 1)
    of = "maxpool"
    for number in range(2):
        inner = rounded(F.relu(conv(f"layer1.{number}.conv1", x, of, 1, 1)), codes[f"layer1_{number}_relu"])
        x = F.relu(conv(f"layer1.{number}.conv2", inner, f"layer1_{number}_relu", 1, 1) + x)
        of = f"layer1_{number}_relu_1"
        x = rounded(x, codes[of])
    return x


def share_of_others(actual: Tensor, expected: Tensor, step: float) -> float:
    """How many have another code: float32 may round a number between two to the other side, and more come of it.

    One such number in the first layer moves thousands in the last, none of them by more than two steps.
    """
    steps = (actual.double() - expected).abs() / step
    assert steps.max() < 2.5
    return float((steps > 0.5).double().mean())


def c2() -> Any:
    return in_int8(trained(out_features=["c2"]), calibration=batches(1, 48, 64), max_error=1.0)


def double_weight(fast: Any) -> Any:
    fast.layer1[0].conv1.weight.mul_(-1.5)
    return fast


def shift_bias(fast: Any) -> Any:
    fast.layer1[1].conv2.bias[3].add_(0.5)
    return fast


def new_parameter(fast: Any) -> Any:
    conv = fast.layer1[0].conv2
    conv.weight = nn.Parameter(conv.weight.flip(0), requires_grad=False)
    return fast


def new_data(fast: Any) -> Any:
    conv = fast.conv1
    conv.weight.data = conv.weight.data.flip(1) * 0.9
    return fast


def one_channel(fast: Any) -> Any:
    fast.conv1.weight[5].zero_()
    return fast


def load(fast: Any) -> Any:
    state = {name: value * 0.95 for name, value in fast.state_dict().items()}
    fast.load_state_dict(state)
    return fast


def look(fast: Any) -> Any:
    assert fast.layer1[0].conv1.weight.dtype == torch.float32
    return fast


def pickled(fast: Any) -> Any:
    return pickle.loads(pickle.dumps(fast))


def saved(fast: Any) -> Any:
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def recalibrated(fast: Any) -> Any:
    keeps = random.random() < 0.5
    return optimize_for_inference(
        fast, dtype=torch.int8, calibration=fast.calibration, max_error=1.0, keep_weights=keeps
    )


def by_double(fast: Any) -> Any:
    return fast.double().float()


def trained_weights(fast: Any) -> Any:
    weight = fast.layer1[1].conv1.weight
    weight.requires_grad_(True)
    fast(batches(1, 48, 64)[0])
    with torch.no_grad():
        weight.add_(0.01)
    return fast


EDITS: list[Callable[[Any], Any]] = [
    double_weight, shift_bias, new_parameter, new_data, one_channel, load, look, pickled, saved, copy.deepcopy,
    recalibrated, by_double, trained_weights,
]  # fmt: skip


@pytest.mark.parametrize("seed", range(10))
@torch.no_grad()
def test_20_random_edits_equal_simulated_quantisation(seed: int) -> None:
    choices = random.Random(seed)
    fast, shares = c2(), []
    for _ in range(20):
        fast = choices.choice(EDITS)(fast)
        height, width = choices.choice([(48, 64), (32, 40), (33, 47)])
        images = torch.randn(choices.choice([1, 2]), 3, height, width)
        for _ in range(choices.choice([1, 3])):
            with engine_enabled(choices.random() < 0.8):
                actual = fast(images)["c2"]
        step = fast.calibration.codes["layer1_1_relu_1"].scale
        shares.append(share_of_others(actual, reference(fast, images), step))
    assert sorted(shares)[-2] < 0.05
    assert sum(shares) / len(shares) < 0.02


@needs_int8
@pytest.mark.parametrize("seed", range(8))
@torch.no_grad()
def test_a_kernel_equals_its_simulation_on_random_convolutions(seed: int) -> None:
    choices, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    for _ in range(25):
        groups, kernel = choices.choice([1, 2, 8]), choices.choice([1, 3, 5])
        in_channels, out_channels = groups * choices.choice([1, 3, 8]), groups * choices.choice([1, 4, 9])
        step, spread = choices.choice([1, 2]), choices.choice([1, 2])
        where = ((step, step), (choices.choice([0, kernel // 2]),) * 2, (spread, spread), groups)
        geometry = Geometry(*where)
        size = (choices.choice([1, 2]), in_channels, choices.choice([11, 16]), choices.choice([12, 17]))
        x = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
        x = x.contiguous(memory_format=torch.channels_last)
        of_x = Codes(0.02, choices.choice([0, 3, 120]))
        weight = torch.randn(out_channels, in_channels // groups, kernel, kernel, generator=generator)
        means = engine_int8.Means(*torch.randn(2, in_channels, generator=generator))
        int8 = engine_int8.int8_weight(weight, torch.randn(out_channels, generator=generator), groups, means)
        pack = engine_int8.packed(int8, of_x, geometry, x.shape)
        assert torch.equal(pack.plain, int8.values)
        plain = engine_int8.simulate(x, of_x, int8, geometry, "none", None)
        codes = Codes(float(plain.abs().max()) / 100, choices.choice([0, 100]))
        residual = None
        acts = ["none", "relu", "relu6", "silu", "hardswish"]
        if choices.random() < 0.5:
            residual = torch.randint(0, 256, plain.shape, generator=generator, dtype=torch.uint8)
            residual, acts = residual.contiguous(memory_format=torch.channels_last), acts[:2]
        other = None if residual is None else Codes(codes.scale * 1.3, 7)
        act: Any = choices.choice(acts)
        out = codes if residual is not None or choices.random() < 0.7 else None
        before = None if residual is None else residual.clone()
        actual = engine_int8.convolve(x, of_x, pack, geometry, act, out, residual, other)
        expected = engine_int8.simulate(x, of_x, int8, geometry, act, out, residual, other)
        if out is None:
            assert relative_error(actual, expected) < 1e-5
        else:
            wrong = (actual.int() - expected.int()).abs()
            assert wrong.max() <= 1
            assert (wrong > 0).float().mean() < 0.01
        assert residual is None or before is None or torch.equal(residual, before)


@pytest.mark.parametrize("groups", [1, 4, 16])
def test_a_restored_weight_has_the_same_codes_and_the_same_correction(groups: int) -> None:
    torch.manual_seed(groups)
    means = engine_int8.Means(torch.rand(16), torch.zeros(16))
    int8 = engine_int8.int8_weight(torch.randn(32, 16 // groups, 3, 3), torch.randn(32), groups, means)
    again = engine_int8.int8_weight(int8.restored(), int8.bias - int8.correction, groups, means)
    assert torch.equal(again.values, int8.values)
    assert relative_error(again.scale, int8.scale) < 1e-6
    assert relative_error(again.rounded, int8.rounded) < 1e-3
    assert int8.rounded.abs().max() > 0


def test_corrections_keep_the_mean_of_every_output() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.rand(4, 8, 32, 32) + 0.5, torch.randn(24, 8, 3, 3), torch.zeros(24)
    means = engine_int8.Means(x.mean((0, 2, 3)), torch.zeros(8))
    exact = F.conv2d(x, weight).mean((0, 2, 3))
    errors = []
    for given in (None, means):
        int8 = engine_int8.int8_weight(weight, bias, 1, given)
        errors.append(float((F.conv2d(x, int8.floats(), int8.bias).mean((0, 2, 3)) - exact).abs().max()))
    assert errors[1] < errors[0] / 20


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(2, 2, 0), (3, 2, 1), (3, 1, 1), (5, 3, 2), (3, 3, 0), (2, 1, 1)]
)
def test_the_maximum_of_codes_is_torchs(kernel: int, stride: int, padding: int) -> None:
    for height, width in itertools.product((5, 6, 7, 12), (5, 8, 9)):
        x = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8).contiguous(
            memory_format=torch.channels_last
        )
        actual = max_pool(x, kernel, stride, padding)
        assert torch.equal(actual.float(), F.max_pool2d(x.float(), kernel, stride, padding))
        assert actual.is_contiguous(memory_format=torch.channels_last)


# --- ranges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0.0, 3.0, -50.0])
def test_codes_write_gaussians_with_little_error(shift: float) -> None:
    histogram, values = Histogram(), torch.randn(4, 3, 50, 60) + shift
    for part in values:
        histogram.add(part)
    codes = histogram.codes()
    error = (decode(encode(values, codes), codes) - values).square().mean().sqrt()
    assert error / values.square().mean().sqrt() < 0.02


def test_far_numbers_are_cut_off_where_that_loses_less_and_zero_is_exact() -> None:
    histogram, values, times = Histogram(), torch.linspace(0, 1, 2**16), 200
    for part in [values] * times + [torch.tensor([1.15])]:
        histogram.add(part)
    codes, uncut = histogram.codes(), Codes(1.15 / 255, 0)
    assert codes.zero_point == 0
    assert codes.scale < 0.9 * uncut.scale

    def error(of: Codes) -> float:
        far = torch.tensor([1.15])
        parts = [(decode(encode(each, of), of) - each).abs().double().pow(3).sum() for each in (values, far)]
        return float(times * parts[0] + parts[1])

    assert error(codes) < error(uncut)
    assert decode(encode(torch.zeros(1), codes), codes) == 0


def test_the_largest_numbers_are_cut_less_than_least_squares_would() -> None:
    torch.manual_seed(0)
    histogram, values = Histogram(), torch.randn(1, 8, 64, 128) ** 2
    histogram.add(values)
    assert histogram.codes().scale * 255 > 0.975 * values.max()  # 0.94 by least squares


@pytest.mark.parametrize("value", [0.0, 1e-30, -7.0, 3e38])
def test_constants_have_codes(value: float) -> None:
    histogram = Histogram()
    histogram.add(torch.full((1, 2, 4, 4), value))
    codes = histogram.codes()
    assert codes.scale > 0
    assert 0 <= codes.zero_point <= 255
    assert torch.isfinite(decode(encode(torch.full((3,), value), codes), codes)).all()


# --- calibration -----------------------------------------------------------------------------------------------------


def broken() -> Iterator[Tensor]:
    yield batches()[0]
    raise OSError("the disk is gone")


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "none at all": (None, ValueError, "needs calibration: 50 to 300 images"),
    "an empty list": ([], ValueError, "at least one batch of images, got none"),
    "a generator that has ended": (iter([]), ValueError, "a generator gives them once"),
    "a tensor": (torch.zeros(1, 3, 64, 64), ValueError, "must be an iterable of batches, got a Tensor"),
    "a number": (3, ValueError, "must be an iterable of batches, got a int"),
    "NaN": ([torch.full((1, 3, 64, 64), torch.nan)], ValueError, "NaN or infinity in the images after 0 images"),
    "infinity later": ([batches()[0], batches()[0] / 0], ValueError, "in the images after 2 images"),
    "images without a batch": ([torch.zeros(3, 64, 64)], ValueError, r"must be a floating-point tensor \(N, 3, H, W\)"),
    "integers": ([torch.zeros(1, 3, 64, 64, dtype=torch.uint8)], ValueError, "must be a floating-point tensor"),
    "other channels": ([torch.zeros(1, 4, 64, 64)], ValueError, "images must be a floating-point tensor"),
    "pairs": ([(torch.zeros(1, 3, 64, 64), 1)], ValueError, "images must be a floating-point tensor"),
    "an error of its own": (broken(), OSError, "the disk is gone"),
    "no file": ("/nowhere/ranges.json", FileNotFoundError, "ranges.json"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_calibration_is_one_clear_error(case: str) -> None:
    calibration, error, message = BAD[case]
    with pytest.raises(error, match=message):
        optimize_for_inference(trained(), dtype=torch.int8, calibration=calibration)


def test_weights_that_are_not_finite_are_one_clear_error() -> None:
    model = trained()
    with torch.no_grad():
        model.get_parameter("layer2.0.conv1.weight")[0] = torch.nan
    with pytest.raises(ValueError, match=r"weights must be finite .* in layer2\.0\.conv1"):
        in_int8(model)


@torch.no_grad()
def test_one_image_is_enough_to_run() -> None:
    model = trained()
    fast = in_int8(model, calibration=[batches()[0][:1]])
    assert fast.calibration.num_images == 1
    assert cosine(fast(batches()[0])["c5"], model(batches()[0])["c5"]) > 0.95


@pytest.mark.parametrize(("settings", "message"), [
    ({"dtype": torch.int8, "max_error": 0.0}, "max_error must be above 0"),
    ({"dtype": torch.float32}, "calibration is for dtype=torch.int8, got dtype=torch.float32"),
    ({"dtype": torch.uint8}, "dtype must be one of .*torch.int8"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimize_for_inference(trained(), calibration=batches(), **settings)


@pytest.mark.parametrize("settings", [{"norm": "gn"}, {"name": "timm/convnextv2_atto"}], ids=["gn", "convnextv2"])
def test_norms_that_depend_on_their_input_are_refused_where_all_layers_are_convolutions(
    settings: dict[str, Any],
) -> None:
    with pytest.raises(ValueError, match=r"needs linear layers, or norms that fold into convolutions, got .*bfloat16"):
        in_int8(trained(**settings))


def test_a_model_without_a_backbone_of_ours_is_refused() -> None:
    with pytest.raises(ValueError, match="needs one backbone of this package in the model, got 0 in Sequential"):
        in_int8(nn.Sequential(nn.Conv2d(3, 4, 3)))


def test_hooks_are_refused() -> None:
    model = trained()
    model.get_submodule("layer1.0.relu").register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"modules that nobody watches, got hooks on layer1\.0\.relu"):
        in_int8(model)


@torch.no_grad()
def test_constant_and_saturated_layers_give_no_nan() -> None:
    model = trained()
    model.get_parameter("layer1.0.bn1.weight").zero_()
    model.get_parameter("layer1.0.bn1.bias").fill_(-1)  # nothing but zeros after the ReLU
    model.get_parameter("layer3.0.conv1.weight")[:40].zero_()
    fast = in_int8(model)
    for scale in (0.0, 1.0, 1e4):
        assert all(torch.isfinite(feature).all() for feature in fast(batches()[0] * scale).values())
    assert cosine(fast(batches()[0])["c5"], model(batches()[0])["c5"]) > 0.99


# --- what it says and keeps ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_layers_that_lose_too_much_stay_in_floats_and_are_named() -> None:
    model = trained()
    every = {choice.name: choice.error for choice in in_int8(model, max_error=1.0).optimization.int8}
    assert len(every) == 20
    assert all(0 < error < 0.1 for error in every.values())
    limit = sorted(every.values())[10]
    fast = in_int8(model, max_error=limit)
    left = {choice.name for choice in fast.optimization.int8 if choice.dtype == torch.float32}
    assert left == {name for name, error in every.items() if error > limit}
    assert "computes in int8 in 11 of 20 layers" in str(fast.optimization)
    assert all(name in str(fast.optimization) for name in left)
    assert isinstance(fast.get_submodule(min(left)), nn.Conv2d)
    assert not isinstance(fast.get_submodule(min(left)), Int8Conv2d)
    images = batches()[0]
    assert cosine(fast(images)["c5"], model(images)["c5"]) > 0.99
    nothing = in_int8(model, max_error=1e-9)
    assert relative_error(nothing(images)["c5"], model(images)["c5"]) < 1e-5


@torch.no_grad()
def test_ranges_are_saved_and_serve_instead_of_images(tmp_path: Path) -> None:
    model, images = trained(), batches()[1]
    fast = in_int8(model)
    path = fast.calibration.save(tmp_path / "ranges.json")
    for calibration in (path, str(path), fast.calibration):
        again: Any = optimize_for_inference(model, dtype=torch.int8, calibration=calibration)
        assert torch.equal(again(images)["c5"], fast(images)["c5"])
    with pytest.raises(ValueError, match="must be of the same network"):
        optimize_for_inference(trained("resnet34"), dtype=torch.int8, calibration=path)
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"must be what Calibration\.save wrote"):
        optimize_for_inference(model, dtype=torch.int8, calibration=path)


@torch.no_grad()
def test_the_original_stays_and_a_float_copy_can_be_made_of_an_int8_one() -> None:
    model, images = trained("timm/tf_efficientnet_lite0"), batches()[0]
    expected = model(images)["c5"]
    fast = in_int8(model, keep_weights=False)
    fast(images)
    assert torch.equal(model(images)["c5"], expected)
    floats: Any = optimize_for_inference(fast)
    assert not [module for module in floats.modules() if isinstance(module, Int8Conv2d)]
    assert cosine(floats(images)["c5"], expected) > 0.99  # of weights that went through 8 bits
    assert floats.optimization.dtype == torch.float32


@needs_int8
@torch.no_grad()
@pytest.mark.engine
def test_without_plain_weights_a_copy_holds_a_quarter() -> None:
    model, images = trained("resnet50"), batches()[0]
    beside = in_int8(model)
    fast, expected = in_int8(model, calibration=beside.calibration, keep_weights=False), beside(images)
    for _ in range(3):
        assert torch.equal(fast(images)["c5"], expected["c5"])
    convs = [module for module in fast.modules() if isinstance(module, Int8Conv2d)]
    assert len(convs) == 53
    assert not any("weight" in dict(conv.named_parameters()) for conv in convs)
    whole = sum(p.numel() * 4 for p in model.parameters())
    assert sum(conv.prepared_bytes() for conv in convs) < 0.27 * whole
    state = fast.state_dict()
    assert relative_error(state["conv1.weight"], optimize_for_inference(model).state_dict()["conv1.weight"]) < 0.005
    assert torch.equal(fast(images)["c5"], expected["c5"])


class Gated(Backbone):
    """Adds maps of different shapes before a ReLU, and calls one convolution twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.pool, self.relu = nn.AdaptiveAvgPool2d(1), nn.ReLU()
        self.in_channels = 3

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = self.relu(self.conv1(images))
        x = self.relu(self.conv2(self.pool(x)) + x)
        return {"c1": self.relu(self.conv2(x) + x), "pooled": self.pool(x).flatten(1)}


@pytest.mark.parametrize("keep_weights", [True, False])
@torch.no_grad()
def test_sums_of_different_shapes_and_a_convolution_called_twice(keep_weights: bool) -> None:
    torch.manual_seed(0)
    model, images = Gated().eval(), batches()[0]
    fast, expected = in_int8(model, keep_weights=keep_weights), model(images)
    assert [choice.name for choice in fast.optimization.int8] == ["conv1", "conv2", "conv2:2"]
    for _ in range(3):
        actual = fast(images)
    assert min(cosine(actual[name], expected[name]) for name in expected) > 0.999
    for network in (model, fast):
        assert network.get_submodule("conv2").weight is not None  # made anew where it was dropped
        network.get_parameter("conv2.weight").mul_(0.5)
    actual, expected = fast(images), model(images)
    assert min(cosine(actual[name], expected[name]) for name in expected) > 0.999


@torch.no_grad()
def test_swapped_modules_are_refused() -> None:
    fast, images = in_int8(trained()), batches()[0]
    fast(images)
    fast.layer1[0].relu = nn.SiLU()
    with pytest.raises(RuntimeError, match="must stay those that were calibrated"):
        fast(images)


@torch.no_grad()
def test_hooks_set_afterwards_see_the_modules_in_floats() -> None:
    model, images = trained(), batches()[0]
    fast = in_int8(model)
    before, seen = fast(images)["c5"], []
    handle = fast.layer3[0].conv1.register_forward_hook(lambda *_: seen.append(1))
    assert relative_error(fast(images)["c5"], model(images)["c5"]) < 1e-5
    assert seen
    handle.remove()
    assert torch.equal(fast(images)["c5"], before)


def test_gradients_of_images_and_traces_are_those_of_floats() -> None:
    model, images = trained(), batches()[0]
    fast = in_int8(model)
    leaf = images.clone().requires_grad_()
    fast(leaf)["c5"].sum().backward()
    assert leaf.grad is not None
    with torch.no_grad():
        traced = torch.fx.symbolic_trace(fast)
        exported = torch.export.export(fast, (images,)).module()
        for form in (traced, exported):
            assert relative_error(form(images)["c5"], model(images)["c5"]) < 1e-5


def test_inference_mode_autocast_and_other_floats_change_nothing() -> None:
    fast, images = in_int8(trained()), batches()[0]
    with torch.no_grad():
        expected = fast(images)["c5"]
        for network in (copy.deepcopy(fast), fast):  # one that has never run, too
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(network(images)["c5"], expected)
            assert torch.equal(network(images)["c5"], expected)
        assert torch.equal(fast(images.double())["c5"], expected)
        assert torch.equal(fast(images.contiguous(memory_format=torch.channels_last))["c5"], expected)
    with torch.inference_mode():
        assert torch.equal(fast(images)["c5"], expected)
        fast.get_parameter("conv1.weight").mul_(1.5)
    with torch.no_grad():
        assert not torch.equal(fast(images)["c5"], expected)
    assert torch.equal(fast(images)["c5"], copy.deepcopy(fast)(images)["c5"])


@torch.no_grad()
def test_features_of_one_call_survive_the_next() -> None:
    fast, (first, second) = in_int8(trained(out_features=["c1", "c2", "c3"])), batches()
    features = fast(first)
    kept = {name: feature.clone() for name, feature in features.items()}
    fast(second)
    assert all(torch.equal(features[name], kept[name]) for name in kept)


@torch.no_grad()
def test_threads_share_a_copy() -> None:
    fast = in_int8(trained(), keep_weights=False)
    images = [each[:1, :, :side, :side] for each in batches() for side in (64, 96)]
    expected = [copy.deepcopy(fast)(image)["c5"] for image in images]

    def run(number: int) -> bool:
        return torch.equal(fast(images[number % 4])["c5"], expected[number % 4])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(40)))


@torch.no_grad()
def test_where_the_kernels_are_missing_it_says_so_and_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = trained(), batches()[0]
    expected = in_int8(model)(images)["c5"]
    monkeypatch.setattr(torch_internals, "HAS_INT8", False)
    monkeypatch.setattr(torch_internals.PATHS[torch_internals.INT8], "reason", "this CPU has no VNNI")
    with pytest.warns(UserWarning, match="8-bit convolutions do not run here.*this CPU has no VNNI"):
        fast = in_int8(model)
    assert cosine(fast(images)["c5"], expected) > 0.999


# --- in larger models ------------------------------------------------------------------------------------------------


PYRAMIDS: dict[str, dict[str, Any]] = {
    "P2 to P6": {"extra_levels": "maxpool"},
    "P7 of P5": {"extra_levels": "p6p7"},
    "P7 of C5": {"extra_levels": "p6p7", "p6_from": "c5"},
    "norms": {"norm": "frozen_bn"},
    "means": {"average": True},
}


@pytest.mark.parametrize("name", ["resnet18", "timm/resnet18", "timm/tf_efficientnet_lite0"])
@pytest.mark.parametrize("case", PYRAMIDS)
@torch.no_grad()
def test_a_pyramid_computes_in_8_bits_with_its_backbone(case: str, name: str) -> None:
    model = FeaturePyramid(trained(name), out_channels=32, **PYRAMIDS[case]).eval()
    fast = in_int8(model)
    of_pyramid = [choice for choice in fast.optimization.int8 if choice.name.startswith("fpn.")]
    assert len(of_pyramid) == (10 if "p6p7" in PYRAMIDS[case].values() else 8)
    assert {choice.dtype for choice in of_pyramid} == {torch.int8}
    assert fast.feature_specs == model.feature_specs
    for images in (batches()[0], batches(1, 72, 104)[0][:1, :, :65, :97]):
        expected = model(images)
        for _ in range(3):
            actual = fast(images)
        assert list(actual) == list(expected)
        assert {level.dtype for level in actual.values()} == {torch.float32}
        assert min(cosine(actual[name], expected[name]) for name in expected) > 0.99


class Steps(Backbone):
    """What a hand-written forward may do to values that others read."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.a, self.b, self.c = (nn.Conv2d(3 if n == 0 else 8, 8, 3, padding=1) for n in range(4))
        self.kind, self.in_channels = kind, 3

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        y = F.relu(self.first(images))
        if self.kind == "a slice that crops nothing":
            out = F.relu(self.b(F.relu(self.a(y))) + y[..., :, :])
            return {"c1": self.c(out) + self.a(y)}
        if self.kind == "a slice":
            return {"c1": self.c(y[..., 1:, :-1])}
        if self.kind == "an enlarged map":
            return {"c1": self.c(F.interpolate(self.a(y)[..., ::2, ::2], y.shape[-2:])) + y}
        y = self.a(y)
        if self.kind == "in place by keyword":
            F.relu(y, inplace=True)
        elif self.kind == "in place by name":
            torch.relu_(y)
        elif self.kind == "in place by a view":
            F.relu(y.view(y.shape), inplace=True)
        elif self.kind == "in place by a part":
            y.chunk(2, 1)[0].mul_(0)
        elif self.kind == "in place by a slice":
            y[:, :4].add_(y[:, 4:])
        elif self.kind == "in place by out":
            torch.add(y, 3, out=y)
        else:
            z = y
            z += 3
        return {"c1": self.b(y)}


@pytest.mark.parametrize(
    "kind",
    [
        "a slice that crops nothing",
        "a slice",
        "an enlarged map",
        "in place by keyword",
        "in place by name",
        "in place by a view",
        "in place by a part",
        "in place by a slice",
        "in place by out",
        "in place by an alias",
    ],
)
@torch.no_grad()
def test_values_that_others_read_stay_theirs(kind: str) -> None:
    torch.manual_seed(0)
    model, images = Steps(kind).eval(), batches()[0]
    try:
        fast = in_int8(model, max_error=1.0)
    except ValueError as error:
        assert "in place" in kind
        assert "needs values that no other step overwrites" in str(error)  # noqa: PT017 - one of two good answers
        return
    for _ in range(3):
        assert cosine(fast(images)["c1"], model(images)["c1"]) > 0.998


def prune_weight(conv: nn.Module) -> None:
    random_unstructured(conv, "weight", 0.5)  # type: ignore[no-untyped-call]


@torch.no_grad()
def test_a_layer_that_is_pruned_after_the_first_call_is_pruned() -> None:
    model, images = trained(out_features=["c2"]), batches()[0]
    floats: Any = optimize_for_inference(model)
    fast = in_int8(model)
    fast(images)
    for network in (floats, fast):
        torch.manual_seed(0)
        prune_weight(network.layer1[0].conv1)
    assert cosine(fast(images)["c2"], floats(images)["c2"]) > 0.999


@torch.no_grad()
def test_a_tensor_in_the_place_of_a_weight_is_the_one_that_computes() -> None:
    fast, images = in_int8(trained(out_features=["c2"])), batches()[0]
    fast(images)
    conv, other = fast.layer1[0].conv1, copy.deepcopy(fast)
    for factor in (-1.0, 0.5):
        weight = conv._parameters.pop("weight") if "weight" in conv._parameters else conv.weight
        conv.weight = weight.detach() * factor  # as replicas have it
        other.layer1[0].conv1.weight.mul_(factor)
        for _ in range(2):
            assert cosine(fast(images)["c2"], other(images)["c2"]) > 0.9999


def test_a_trainable_weight_is_not_dropped() -> None:
    fast, images = in_int8(trained(), keep_weights=False), batches()[0]
    weight = fast.conv1.weight.requires_grad_(True)
    with torch.no_grad():
        fast(images)
    fast(images)["c5"].mean().backward()
    assert fast.conv1.weight is weight
    assert weight.grad is not None


@pytest.mark.parametrize("extra_levels", ["maxpool", "p6p7"])
@torch.no_grad()
def test_a_pyramid_is_saved_and_copied(extra_levels: Any) -> None:
    fast, images = in_int8(FeaturePyramid(trained(), out_channels=32, extra_levels=extra_levels).eval()), batches()[0]
    expected = fast(images)
    for again in (pickled(fast), saved(fast), copy.deepcopy(fast)):
        assert all(torch.equal(level, expected[name]) for name, level in again(images).items())


@needs_int8
@torch.no_grad()
def test_a_pyramid_is_the_same_without_the_engine() -> None:
    fast, images = in_int8(FeaturePyramid(trained(), out_channels=32, extra_levels="p6p7").eval()), batches()[1]
    actual = fast(images)
    with engine_enabled(False):
        expected = fast(images)
    assert min(cosine(actual[name], expected[name]) for name in expected) > 0.999


@torch.no_grad()
def test_a_pyramid_that_does_not_suit_stays_in_floats() -> None:
    for model in (
        FeaturePyramid(trained(), out_channels=32, norm="gn").eval(),
        FeaturePyramid(trained(), out_channels=32).eval(),
    ):
        if model.settings["norm"] is None:
            model.fpn.register_forward_hook(lambda *_: None)
        fast = in_int8(model)
        assert {choice.name.partition(".")[0] for choice in fast.optimization.int8} >= {"conv1", "layer4"}
        assert not any(isinstance(module, Int8Conv2d) for module in fast.fpn.modules())
        assert cosine(fast(batches()[0])["p2"], model(batches()[0])["p2"]) > 0.99


@torch.no_grad()
def test_a_pyramids_weights_change_and_hooks_see_it_in_floats() -> None:
    model, images = FeaturePyramid(trained(), out_channels=32).eval(), batches()[0]
    fast = in_int8(model)
    fast(images)
    for each in (model, fast):
        each.get_parameter("fpn.inner_blocks.1.0.weight").mul_(-0.7)
    expected = model(images)
    assert cosine(fast(images)["p3"], expected["p3"]) > 0.99
    seen: list[int] = []
    fast.body.register_forward_hook(lambda *_: seen.append(1))
    assert relative_error(fast(images)["p3"], expected["p3"]) < 1e-5
    assert seen


@torch.no_grad()
def test_the_backbone_in_a_pyramid_called_by_itself_computes_in_floats() -> None:
    model, images = FeaturePyramid(trained(), out_channels=32).eval(), batches()[0]
    fast = in_int8(model, keep_weights=False)
    fast(images)
    assert cosine(fast.body(images)["c5"], model.body(images)["c5"]) > 0.999
    fast = in_int8(model)
    fast(images)
    assert relative_error(fast.body(images)["c5"], model.body(images)["c5"]) < 1e-5


@torch.no_grad()
def test_inside_torchvisions_detector() -> None:
    from torchvision.models.detection import RetinaNet

    from backbone.hosts.torchvision import as_torchvision

    body = as_torchvision(
        FeaturePyramid(trained(out_features=["c3", "c4", "c5"]), out_channels=32, extra_levels="p6p7")
    )
    detector = RetinaNet(body, 3, min_size=96, max_size=128, score_thresh=0.0).eval()
    images = [list(batch) for batch in batches()]
    fast = in_int8(detector, calibration=images)
    assert fast.calibration.num_images == 4
    assert any(choice.name == "fpn.extra_blocks.p7" for choice in fast.optimization.int8)
    found, expected = fast(images[0]), detector(images[0])
    assert [list(each) for each in found] == [list(each) for each in expected]
    maps, wanted = fast.backbone(batches()[0]), detector.backbone(batches()[0])
    assert min(cosine(maps[name], wanted[name]) for name in wanted) > 0.99
    with torch.autocast("cpu", torch.bfloat16):  # is for the heads
        fast(images[0])
        again = fast.backbone(batches()[0])
    assert all(torch.equal(again[name], maps[name]) for name in maps)
    with pytest.raises(ValueError, match="batches as RetinaNet takes them, got dict as batch 0"):
        in_int8(detector, calibration=[{"pixel_values": batches()[0]}])


@pytest.mark.engine
@torch.no_grad()
@pytest.mark.parametrize("where", ["weight", "image"])
def test_layers_that_stay_in_floats_keep_nan(where: str) -> None:
    batches = [torch.randn(2, 3, 64, 64)] * 2
    fast: Any = optimize_for_inference(
        build("resnet18", norm="frozen_bn").eval(), dtype=torch.int8, calibration=batches, max_error=1e-4
    )
    images = batches[0].clone()
    if where == "weight":
        fast.conv1.weight[0, 0, 0, 0] = torch.nan
    else:
        images[0, 0, 20, 20] = torch.nan
    found = fast(images)
    with engine_enabled(False):
        expected = fast(images)
    assert expected["c2"].isnan().any()
    assert all(torch.equal(found[name].isnan(), features.isnan()) for name, features in expected.items())


def test_a_copy_that_is_trained_gets_its_gradients() -> None:
    batches = [torch.randn(2, 3, 64, 64)]
    fast = optimize_for_inference(build("resnet18").eval(), dtype=torch.int8, calibration=batches)
    fast.requires_grad_(True)
    fast(batches[0])["c5"].mean().backward()
    assert all(parameter.grad is not None for parameter in fast.parameters())
