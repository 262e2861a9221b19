"""int8 copies of networks with LayerNorm: linear layers one by one, each equal to simulated quantisation."""

import copy
import pickle
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import build, relative_error
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from torch.nn.utils.prune import random_unstructured

from backbone import Backbone, FeaturePyramid, engine_enabled, optimize_for_inference
from backbone.engine import torch_internals
from backbone.engine.int8 import has_int8_linear
from backbone.features import FeatureSpec
from backbone.inference.int8.linear import InRows, Int8Linear

timm_mlp = pytest.importorskip("timm.layers.mlp", reason="timm is an extra")
fused: Any = pytest.importorskip("backbone.providers.timm.fused")

UNPACKS_IN_TRACES = torch.__version__ >= "2.14"  # 2.11 refuses, for weights of float copies too
needs_int8 = pytest.mark.skipif(not has_int8_linear(), reason="this CPU has no 8-bit products")
pytestmark = pytest.mark.filterwarnings("ignore:8-bit products do not run here:UserWarning")

NAMES = {
    "timm/convnext_atto": 24,  # 1x1 convolutions
    "timm/convnext_tiny": 36,
    "timm/vit_tiny_patch16_224": 48,
    "timm/swin_tiny_patch4_window7_224": 51,
    "timm/pvt_v2_b0": 40,  # MLPs with a convolution inside
    "timm/maxvit_rmlp_pico_rw_256": 132,  # batch norms, too
}


def images(count: int = 2, side: int = 64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(count, 2, 3, side // 8, side // 8, generator=generator)
    return [F.interpolate(each, (side, side), mode="bicubic") for each in coarse]


def uneven(model: nn.Module) -> Any:
    """Scales of layers and channels like trained ones; ConvNeXt's start at a millionth."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            parameter.data.uniform_(0.2, 0.6, generator=generator)
        elif parameter.ndim == 1 and "norm" in name and name.endswith("weight"):
            parameter.data.uniform_(0.3, 1.5, generator=generator)
        elif parameter.ndim == 1 and name.endswith("bias"):
            parameter.data.normal_(0, 0.1, generator=generator)
    return model.eval()


def in_int8(model: nn.Module, **settings: Any) -> Any:
    return optimize_for_inference(
        model, dtype=torch.int8, calibration=settings.pop("calibration", images()), **settings
    )


def cosine(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float(F.cosine_similarity(actual.double().flatten(), expected.double().flatten(), 0))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_features_are_those_of_floats(name: str) -> None:
    torch.manual_seed(0)
    side = 256 if "maxvit" in name else 224 if "vit_tiny" in name else 64
    model = uneven(build(name))
    shown = images(2, side)
    fast = in_int8(model, calibration=shown)
    assert len(fast.optimization.int8) == NAMES[name]
    assert {choice.dtype for choice in fast.optimization.int8} == {torch.int8}
    assert 0 < max(choice.error for choice in fast.optimization.int8) < 0.1
    assert f"computes in int8 in {NAMES[name]} of {NAMES[name]} layers" in str(fast.optimization)
    inputs = shown[1][:1]
    expected = model(inputs)
    for _ in range(3):
        actual = fast(inputs)
    assert {feature.dtype for feature in actual.values()} == {torch.float32}
    assert min(cosine(actual[level], expected[level]) for level in expected) > 0.99
    assert max(relative_error(actual[level], expected[level]) for level in expected) > 1e-5


class Blocks(Backbone):
    """A patch, a linear layer by itself, and an MLP behind a norm."""

    def __init__(self, gelu: nn.Module, *, drop: float = 0.0) -> None:
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, 16, 4, 4), nn.LayerNorm(16)
        self.linear, self.alone = nn.Linear(16, 16, bias=False), nn.Linear(16, 8)
        self.mlp = timm_mlp.Mlp(16, 48, drop=drop)
        self.mlp.act = gelu
        fused.fuse(self)
        self.in_channels, self.feature_specs = 3, {"c2": FeatureSpec(8, 4)}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = self.patch(images).permute(0, 2, 3, 1)
        x = x + self.linear(self.norm(x))
        x = x + self.mlp(self.norm(x))
        return {"c2": self.alone(x).permute(0, 3, 1, 2)}


def blocks(gelu: nn.Module | None = None, **settings: Any) -> Blocks:
    torch.manual_seed(3)
    return uneven(Blocks(gelu or nn.GELU(), **settings))  # type: ignore[no-any-return]


# --- the reference: simulated quantisation in float64 -----------------------------------------------------------------


def reference(fast: Any, inputs: Tensor) -> Tensor:
    """What ``Blocks`` computes of the weights that ``fast`` has now, in the ranges it was calibrated to."""
    state = {name: value.double() for name, value in fast.state_dict().items()}
    ranges = fast.calibration

    def rounded(x: Tensor, path: str) -> Tensor:
        scale, zero = ranges.codes[path]
        written: Tensor = (torch.clamp(torch.round(x / scale) + zero, 0, 255) - zero) * scale
        return written

    def linear(path: str, x: Tensor) -> Tensor:
        by = torch.tensor(ranges.per_channel.get(path, 1.0), dtype=torch.float64)
        whole, bias = state[f"{path}.weight"] * by, state.get(f"{path}.bias", torch.zeros(1, dtype=torch.float64))
        step = whole.abs().amax(1, keepdim=True) / 127
        weight = torch.round(whole / step) * step
        mean, lost = (torch.tensor(each, dtype=torch.float64) for each in ranges.means[path])
        return F.linear(rounded(x / by, path), weight, bias + (whole - weight) @ mean + weight @ lost)

    def norm(x: Tensor) -> Tensor:
        return F.layer_norm(x, (16,), state["norm.weight"], state["norm.bias"])

    x = F.conv2d(inputs.double(), state["patch.weight"], state["patch.bias"], 4).permute(0, 2, 3, 1)
    x = x + linear("linear", norm(x))
    x = x + linear("mlp.fc2", F.gelu(linear("mlp.fc1", norm(x)), approximate=approximation(fast)))
    return linear("alone", x).permute(0, 3, 1, 2)


def approximation(fast: Any) -> str:
    return str(getattr(fast.mlp.act, "approximate", "none"))


def negate(fast: Any) -> Any:
    fast.mlp.fc1.weight.mul_(-1.3)
    return fast


def shift(fast: Any) -> Any:
    fast.alone.bias[2].add_(0.5)
    return fast


def new_parameter(fast: Any) -> Any:
    fast.mlp.fc2.weight = nn.Parameter(fast.mlp.fc2.weight.flip(0), requires_grad=False)
    return fast


def other_strides(fast: Any) -> Any:
    weight = fast.mlp.fc1.weight
    fast.mlp.fc1.weight = nn.Parameter(weight.t().contiguous().t() * 0.8, requires_grad=False)
    return fast


def new_data(fast: Any) -> Any:
    fast.linear.weight.data = fast.linear.weight.data.flip(1) * 0.9
    return fast


def load(fast: Any) -> Any:
    fast.load_state_dict({name: value * 0.97 for name, value in fast.state_dict().items()})
    return fast


def recalibrated(fast: Any) -> Any:
    keeps = random.random() < 0.5
    return optimize_for_inference(
        fast, dtype=torch.int8, calibration=fast.calibration, max_error=1.0, keep_weights=keeps
    )


def pickled(fast: Any) -> Any:
    return pickle.loads(pickle.dumps(fast))


EDITS: list[Callable[[Any], Any]] = [
    negate, shift, new_parameter, other_strides, new_data, load, recalibrated, pickled, copy.deepcopy,
]  # fmt: skip


@pytest.mark.parametrize("seed", range(10))
@torch.no_grad()
def test_20_random_edits_equal_simulated_quantisation(seed: int) -> None:
    choices = random.Random(seed)
    fast = in_int8(blocks(choices.choice([nn.GELU(), nn.GELU("tanh")])), max_error=1.0)
    assert len(fast.optimization.int8) == 4
    for _ in range(20):
        fast = choices.choice(EDITS)(fast)
        inputs = torch.randn(choices.choice([1, 2]), 3, choices.choice([16, 24]), 32)
        with engine_enabled(choices.random() < 0.8):
            actual = fast(inputs)["c2"]
        # a number between two codes may round to the other side, and moves others by what a code is worth
        wrong = (actual - reference(fast, inputs)).abs() / reference(fast, inputs).abs().max()
        assert wrong.max() < 0.02
        assert wrong.mean() < 5e-4


# --- modules are called -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_hooks_see_the_modules_and_change_little() -> None:
    fast, inputs = in_int8(blocks()), images()[0]
    before, seen = fast(inputs)["c2"], []
    handles = [
        layer.register_forward_hook(lambda module, _, out: seen.append((type(module).__name__, out)))
        for layer in (fast.mlp.act, fast.mlp.fc2, fast.linear)
    ]
    assert relative_error(fast(inputs)["c2"], before) < 0.01
    assert [name for name, _ in seen] == ["Int8Linear", "GELU", "Int8Linear"]
    assert {out.dtype for _, out in seen} == {torch.float32}
    for handle in handles:
        handle.remove()
    assert torch.equal(fast(inputs)["c2"], before)


@torch.no_grad()
def test_replaced_modules_are_refused() -> None:
    for path in ("mlp.act", "norm", "alone"):
        fast = in_int8(blocks())
        fast(images()[0])
        fast.set_submodule(path, nn.Identity())
        for network in (fast, copy.deepcopy(fast), pickled(fast)):
            with pytest.raises(RuntimeError, match="must stay those that were calibrated"):
                network(images()[0])
        assert optimize_for_inference(fast)(images()[0])["c2"].shape == (2, 8 if path != "alone" else 16, 16, 16)


class Scaled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def prune(layer: nn.Module, name: str) -> None:
    random_unstructured(layer, name, 0.5)  # type: ignore[no-untyped-call]


def parametrise(layer: nn.Module, name: str) -> None:
    register_parametrization(layer, name, Scaled())


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("change", [prune, parametrise])
@torch.no_grad()
def test_pruned_and_parametrised_layers_compute_in_floats(change: Callable[..., None], name: str) -> None:
    model, inputs = blocks(), images()[0]
    model.alone.bias.fill_(5.0)
    fast = in_int8(model)
    fast(inputs)
    torch.manual_seed(1)
    change(model.alone, name)
    again = in_int8(model)
    assert [choice.name for choice in again.optimization.int8] == ["linear", "mlp.fc1", "mlp.fc2"]
    assert relative_error(again(inputs)["c2"], model(inputs)["c2"]) < 0.05
    torch.manual_seed(1)
    change(fast.alone, name)
    if change is prune:
        assert relative_error(fast(inputs)["c2"], model(inputs)["c2"]) < 0.05
    else:  # it brings a module
        with pytest.raises(RuntimeError, match="got others in ParametrizedInt8Linear"):
            fast(inputs)


@torch.no_grad()
def test_a_copy_that_became_parametrised_is_no_base_of_another() -> None:
    fast = in_int8(blocks())
    register_parametrization(fast.alone, "weight", Scaled())
    with pytest.raises(ValueError, match="got a ParametrizedInt8Linear; remove its parametrizations"):
        optimize_for_inference(fast)


@torch.no_grad()
def test_a_tool_that_replaces_gelu_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = blocks(), images()[0]
    fast = in_int8(model)
    before = fast(inputs)["c2"]
    monkeypatch.setattr(nn.GELU, "forward", lambda _, x: F.relu(x))
    assert relative_error(fast(inputs)["c2"], model(inputs)["c2"]) < 1e-5
    assert relative_error(fast(inputs)["c2"], before) > 1e-3


@torch.no_grad()
def test_networks_in_training_keep_timms_classes() -> None:
    network: Any = build("timm/convnext_atto")
    assert all(type(block.mlp) is timm_mlp.Mlp for stage in network.network.stages for block in stage.blocks)
    fast: Any = in_int8(network.eval())
    assert type(fast.network.stages[0].blocks[0].mlp) is fused.FusedMlp
    floats: Any = optimize_for_inference(fast)
    assert type(floats.network.stages[0].blocks[0].mlp) is timm_mlp.Mlp


def test_gradients_and_traces_are_those_of_floats() -> None:
    model, inputs = blocks(), images()[0]
    fast = in_int8(model)
    leaves = [inputs.clone().requires_grad_() for _ in range(2)]
    for network, leaf in zip((model, fast), leaves, strict=True):
        network(leaf)["c2"].square().sum().backward()
    assert relative_error(leaves[1].grad, leaves[0].grad) < 1e-4  # type: ignore[arg-type]
    with torch.no_grad():
        exported = torch.export.export(fast, (inputs,)).module()
        traced = torch.fx.symbolic_trace(fast)
        for form in (exported, traced):
            assert relative_error(form(inputs)["c2"], model(inputs)["c2"]) < 1e-5


@pytest.mark.parametrize("keep_weights", [True, False])
def test_trained_weights_are_seen(keep_weights: bool) -> None:
    fast, inputs = in_int8(blocks(), keep_weights=keep_weights), images()[0]
    weight = fast.mlp.fc1.weight.requires_grad_(True)
    with torch.no_grad():
        fast(inputs)
    fast(inputs)["c2"].mean().backward()
    assert fast.mlp.fc1.weight is weight
    assert weight.grad is not None
    with torch.no_grad():
        fast(inputs)
        fast.mlp.fc1.weight.mul_(-1.0)
        actual = fast(inputs)["c2"]
        assert relative_error(actual.double(), reference(fast, inputs)) < 0.02


@torch.no_grad()
def test_under_autocast_the_rest_computes_in_bf16() -> None:
    fast, inputs = in_int8(blocks()), images()[0]
    expected = fast(inputs)["c2"]
    first = copy.deepcopy(fast)
    for network in (first, fast):  # one that has never run, too
        for on in (True, False):
            with torch.autocast("cpu", torch.bfloat16), engine_enabled(on):
                actual = network(inputs)["c2"]
            assert actual.dtype == torch.bfloat16
            assert cosine(actual, expected) > 0.999
    assert torch.equal(first(inputs)["c2"], expected)


@torch.no_grad()
def test_a_drop_layer_at_work_is_called() -> None:
    fast, inputs = in_int8(blocks(drop=0.5)), images()[0]
    before = fast(inputs)["c2"]
    fast.mlp.drop1.train()
    torch.manual_seed(0)
    assert relative_error(fast(inputs)["c2"], before) > 0.05


@torch.no_grad()
def test_a_norm_within_an_mlp_is_called() -> None:
    model, inputs = blocks(), images()[0]
    model.mlp.norm = nn.LayerNorm(48)
    model.mlp.norm.weight.fill_(0.05)
    fast = in_int8(model)
    assert {choice.dtype for choice in fast.optimization.int8} == {torch.int8}
    assert max(choice.error for choice in fast.optimization.int8) < 0.03
    assert cosine(fast(inputs)["c2"], model(inputs)["c2"]) > 0.999


@torch.no_grad()
def test_float_copies_come_of_int8_ones() -> None:
    model, inputs = blocks(), images()[0]
    fast = in_int8(model)
    fast(inputs)
    floats = optimize_for_inference(fast)
    assert not [module for module in floats.modules() if isinstance(module, InRows)]
    assert relative_error(floats(inputs)["c2"], model(inputs)["c2"]) < 1e-5


@torch.no_grad()
def test_threads_share_a_copy() -> None:
    fast = in_int8(blocks())
    inputs = [torch.randn(1, 3, side, 32) for side in (16, 32, 48, 64)]
    expected = [copy.deepcopy(fast)(each)["c2"] for each in inputs]
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda n: torch.equal(fast(inputs[n % 4])["c2"], expected[n % 4]), range(80)))


# --- memory -----------------------------------------------------------------------------------------------------------


@needs_int8
@pytest.mark.engine
@pytest.mark.parametrize("make", [blocks, lambda: uneven(build("timm/convnext_atto"))], ids=["linear", "1x1"])
@torch.no_grad()
def test_without_plain_weights_a_copy_holds_a_quarter(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, inputs = make(), images()[0]
    beside = in_int8(model)
    fast = in_int8(model, calibration=beside.calibration, keep_weights=False)
    layers = {name: layer for name, layer in fast.named_modules() if isinstance(layer, InRows)}
    for _ in range(3):
        assert all(torch.equal(fast(inputs)[level], feature) for level, feature in beside(inputs).items())
    assert len(layers) == len(fast.optimization.int8)
    assert not any(f"{name}.weight" in dict(fast.named_parameters()) for name in layers)
    if len(layers) > 4:  # not of a few channels, whose scales count
        whole = sum(4 * model.get_parameter(f"{name}.weight").numel() for name in layers)
        assert sum(layer.prepared_bytes() for layer in layers.values()) < 0.3 * whole
    state = fast.state_dict()
    assert state.keys() == model.state_dict().keys() or len(layers) > 4  # a convolution's fold adds a bias
    for name in layers:
        held, plain = state[f"{name}.weight"].flatten(1), model.get_parameter(f"{name}.weight").flatten(1)
        by = torch.tensor(fast.calibration.per_channel.get(name, 1.0))  # channels that were evened out, more or less
        assert ((held - plain) * by).abs().max() < 0.006 * (plain * by).abs().max()
    assert all(layer._parameters.get("weight") is None for layer in layers.values())
    assert all(torch.equal(fast(inputs)[level], feature) for level, feature in beside(inputs).items())
    for copied in (pickled(fast), copy.deepcopy(fast)):
        again, expected = copied(inputs), fast(inputs)
        assert max(relative_error(again[level], expected[level]) for level in expected) < 5e-3


@torch.no_grad()
def test_without_plain_weights_a_trace_leaves_the_copy_as_it_was() -> None:
    model, inputs = blocks(), images()[0]
    fast = in_int8(model, keep_weights=False)
    expected = fast(inputs)["c2"]
    traces: list[Callable[[], Any]] = [
        lambda: torch.export.export(fast, (inputs,)).module(),
        lambda: torch.compile(fast, backend="eager", fullgraph=True),
    ]
    for trace in traces:
        with nullcontext() if UNPACKS_IN_TRACES else suppress(Exception):
            found = trace()(inputs)["c2"]
            assert relative_error(found, model(inputs)["c2"]) < 0.02  # of weights that went through 8 bits
    assert torch.equal(fast(inputs)["c2"], expected)
    assert all(type(value) is Tensor for value in fast.state_dict().values())


@torch.no_grad()
def test_without_plain_weights_threads_may_look_at_them() -> None:
    fast, inputs = in_int8(blocks(), keep_weights=False), images()[0]
    expected = fast(inputs)["c2"]

    def work(number: int) -> bool:
        if number % 3 == 0:
            return fast.alone.weight.shape == (8, 16) and "alone.weight" in fast.state_dict()
        return relative_error(fast(inputs)["c2"], expected) < 5e-3

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(600)))


class Shared(Backbone):
    """Two MLPs of 1x1 convolutions with one first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, 16, 4, 4), nn.GroupNorm(2, 16)
        self.a, self.b = timm_mlp.Mlp(16, 32, use_conv=True), timm_mlp.Mlp(16, 32, use_conv=True)
        self.b.fc1 = self.a.fc1
        self.in_channels = 3

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = self.norm(self.patch(images))
        return {"c2": x + self.a(x) + self.b(x)}


@torch.no_grad()
def test_a_layer_in_two_mlps() -> None:
    torch.manual_seed(0)
    model, inputs = Shared().eval(), images()[0]
    fast = in_int8(model)
    assert [choice.name for choice in fast.optimization.int8] == ["a.fc1", "a.fc2", "b.fc2"]
    assert cosine(fast(inputs)["c2"], model(inputs)["c2"]) > 0.999


@pytest.mark.parametrize("make", [blocks, lambda: uneven(build("timm/convnext_atto"))], ids=["linear", "1x1"])
def test_without_plain_weights_floats_still_compute(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, inputs = make(), images()[0]
    fast = in_int8(model, keep_weights=False)
    for _ in range(4):
        leaf = inputs.clone().requires_grad_()
        out = fast(leaf)
        sum(each.mean() for each in out.values()).backward()
        with torch.no_grad():
            expected = model(inputs)
            assert min(cosine(out[level], expected[level]) for level in expected) > 0.999
            actual = fast(inputs)
            assert min(cosine(actual[level], expected[level]) for level in expected) > 0.99


# --- calibration ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_an_outlier_channel_is_evened_out() -> None:
    model, inputs = blocks(), images()[0]
    model.norm.weight[3] = 60.0  # as in trained transformers
    model.linear.weight[:, 3] *= 0.02
    fast = in_int8(model, max_error=1.0)
    assert "linear" in fast.calibration.per_channel
    errors = {choice.name: choice.error for choice in fast.optimization.int8}
    assert errors["linear"] < 0.02
    assert cosine(fast(inputs)["c2"], model(inputs)["c2"]) > 0.999


@torch.no_grad()
def test_layers_that_lose_too_much_stay_in_floats_and_are_named() -> None:
    model, inputs = blocks(), images()[0]
    every = {choice.name: choice.error for choice in in_int8(model, max_error=1.0).optimization.int8}
    assert sorted(every) == ["alone", "linear", "mlp.fc1", "mlp.fc2"]
    limit = sorted(every.values())[1]
    fast = in_int8(model, max_error=limit)
    left = {choice.name for choice in fast.optimization.int8 if choice.dtype == torch.float32}
    assert left == {name for name, error in every.items() if error > limit}
    assert all(name in str(fast.optimization) for name in left)
    assert not any(isinstance(fast.get_submodule(name), Int8Linear) for name in left)
    assert cosine(fast(inputs)["c2"], model(inputs)["c2"]) > 0.999
    nothing = in_int8(model, max_error=1e-9)
    assert relative_error(nothing(inputs)["c2"], model(inputs)["c2"]) < 1e-5


@torch.no_grad()
def test_ranges_are_saved_and_serve_instead_of_images(tmp_path: Path) -> None:
    model, inputs = blocks(), images()[0]
    model.norm.weight[3] = 60.0
    fast = in_int8(model)
    path = fast.calibration.save(tmp_path / "ranges.json")
    again = in_int8(model, calibration=path)
    assert torch.equal(again(inputs)["c2"], fast(inputs)["c2"])
    assert again.calibration == fast.calibration
    with pytest.raises(ValueError, match="must be of the same network"):
        in_int8(uneven(build("timm/convnext_atto")), calibration=path)


@pytest.mark.parametrize(("shown", "message"), [
    ([], "at least one batch of images, got none"),
    ([torch.full((1, 3, 32, 32), torch.nan)], "NaN or infinity in the images after 0 images"),
    ([torch.zeros(3, 32, 32)], "calibration must give batches as Blocks takes them"),
])  # fmt: skip
def test_bad_calibration_is_one_clear_error(shown: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        in_int8(blocks(), calibration=shown)


def test_weights_that_are_not_finite_are_one_clear_error() -> None:
    model = blocks()
    with torch.no_grad():
        model.mlp.fc1.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"weights must be finite .* in mlp\.fc1"):
        in_int8(model)


@torch.no_grad()
def test_batches_may_be_mappings() -> None:
    model, inputs = blocks(), images()[0]
    fast = in_int8(model, calibration=[{"images": each} for each in images()])
    assert fast.calibration == in_int8(model).calibration
    assert torch.equal(fast(images=inputs)["c2"], in_int8(model)(inputs)["c2"])


class Uncalled(Blocks):
    """Takes its layers' weights, and calls none of them."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = self.norm(self.patch(images).permute(0, 2, 3, 1))
        return {"c2": F.linear(x, self.alone.weight).permute(0, 3, 1, 2)}


def test_layers_that_nobody_calls_are_one_clear_error() -> None:
    model = Uncalled(nn.GELU()).eval()
    with pytest.raises(ValueError, match="called as modules, got Uncalled, which calls none of its 4"):
        in_int8(model)


@torch.no_grad()
def test_many_batches_are_all_looked_at() -> None:
    model = blocks()
    shown = [torch.randn(1, 3, 32, 32) for _ in range(40)]
    fast = in_int8(model, calibration=[*shown, shown[0] * 30])
    assert fast.calibration.num_images == 41
    scale = fast.calibration.codes["alone"].scale
    assert scale > 2 * in_int8(model, calibration=shown).calibration.codes["alone"].scale


@torch.no_grad()
def test_constant_inputs_give_no_nan() -> None:
    model = blocks()
    model.norm.weight.zero_()
    model.norm.bias.zero_()
    model.mlp.fc1.weight[:5].zero_()
    fast = in_int8(model, max_error=10.0)
    for scale in (0.0, 1.0, 1e4):
        assert torch.isfinite(fast(images()[0] * scale)["c2"]).all()


@torch.no_grad()
def test_where_the_kernels_are_missing_it_says_so_and_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = blocks(), images()[0]
    expected = in_int8(model)(inputs)["c2"]
    monkeypatch.setattr(torch_internals, "HAS_INT8_LINEAR", False)
    monkeypatch.setattr(torch_internals.PATHS[torch_internals.INT8_LINEAR], "reason", "this CPU has no VNNI")
    with pytest.warns(UserWarning, match="8-bit products do not run here.*this CPU has no VNNI"):
        fast = in_int8(model)
    assert relative_error(fast(inputs)["c2"], expected) < 0.01


@needs_int8
@torch.no_grad()
@pytest.mark.engine
def test_an_mlp_is_two_products_with_codes_between(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, run = [], torch_internals.qlinear_pointwise

    def counted(*given: Any) -> Tensor:
        calls.append((given[9], given[10]))
        return run(*given)

    monkeypatch.setattr(torch_internals, "qlinear_pointwise", counted)
    fast = in_int8(blocks())
    fast(images()[0])
    floats = (torch.float32, "none")
    assert calls == [floats, (torch.uint8, "gelu"), floats, floats]


@torch.no_grad()
def test_below_a_pyramid() -> None:
    torch.manual_seed(0)
    model = FeaturePyramid(uneven(build("timm/convnext_atto")), out_channels=32).eval()
    fast = in_int8(model)
    assert len(fast.optimization.int8) == 24
    actual, expected = fast(images()[0]), model(images()[0])
    assert min(cosine(actual[level], expected[level]) for level in expected) > 0.99
