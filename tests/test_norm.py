"""FrozenBatchNorm2d against BatchNorm2d.eval(), and the swaps between the two."""

import copy

import pytest
import torch
from conftest import build, randomise_norms, relative_error
from torch import Tensor, nn

from backbone import FrozenBatchNorm2d, freeze_norms, thaw_norms
from backbone.config import NormName
from backbone.norm import norm_layer, register_frozen_form

EPS = (1e-5, 1e-3, 0.0)
HALF_DTYPES = (torch.float16, torch.bfloat16)


def random_batch_norm(channels: int = 8, eps: float = 1e-5) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, eps=eps).eval()
    randomise_norms(norm)
    norm.num_batches_tracked.fill_(7)  # type: ignore[union-attr]
    return norm


@pytest.mark.parametrize("eps", [*EPS, 0.1, 1e-8])
def test_a_fresh_frozen_norm_is_an_exact_identity(eps: float) -> None:
    x = torch.randn(2, 8, 5, 7) * 100
    assert torch.equal(FrozenBatchNorm2d(8, eps=eps)(x), x)


@pytest.mark.parametrize("eps", EPS)
def test_it_equals_batch_norm_in_eval(eps: float) -> None:
    norm, x = random_batch_norm(eps=eps), torch.randn(2, 8, 5, 7)
    frozen = FrozenBatchNorm2d(8, eps=eps)
    frozen.load_state_dict(norm.state_dict(), strict=True)
    if eps == 0:  # torch before 2.14 refuses to run its own layer without eps
        norm.eps = 1e-30
    torch.testing.assert_close(frozen(x), norm(x), rtol=1e-5, atol=1e-6)


def test_batch_norm_loads_its_state_strictly() -> None:
    frozen, norm = FrozenBatchNorm2d(8), random_batch_norm()
    frozen.load_state_dict(norm.state_dict(), strict=True)
    other = nn.BatchNorm2d(8)
    other.load_state_dict(frozen.state_dict(), strict=True)
    assert all(torch.equal(other.state_dict()[key], value) for key, value in norm.state_dict().items())


def test_a_state_without_batch_counter_loads_strictly_and_stays_unchanged() -> None:
    state = {key: value for key, value in random_batch_norm().state_dict().items() if key != "num_batches_tracked"}
    keys = list(state)
    FrozenBatchNorm2d(8).load_state_dict(state, strict=True)
    assert list(state) == keys


@pytest.mark.parametrize("missing", ["weight", "running_var"])
def test_a_state_without_statistics_is_refused(missing: str) -> None:
    state = {key: value for key, value in random_batch_norm().state_dict().items() if key != missing}
    with pytest.raises(RuntimeError, match=missing):
        FrozenBatchNorm2d(8).load_state_dict(state, strict=True)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_half_precision_in_gives_the_same_dtype_out(dtype: torch.dtype) -> None:
    x = torch.randn(1, 8, 4, 4, dtype=dtype)
    norm = random_batch_norm()
    out = freeze_norms(copy.deepcopy(norm))(x)
    assert out.dtype == dtype
    assert relative_error(out, norm(x.float())) < 2e-2


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_autocast_keeps_half_precision(dtype: torch.dtype) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), freeze_norms(random_batch_norm()))
    with torch.autocast("cpu", dtype):
        assert network(torch.randn(1, 3, 8, 8)).dtype == dtype


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_a_half_precision_module_works(dtype: torch.dtype) -> None:
    frozen = freeze_norms(random_batch_norm()).to(dtype)
    assert frozen(torch.randn(1, 8, 4, 4, dtype=dtype)).dtype == dtype


def test_no_gradient_reaches_its_parameters_even_when_asked_for() -> None:
    frozen = FrozenBatchNorm2d(4).requires_grad_(True)
    x = torch.randn(1, 4, 2, 2, requires_grad=True)
    frozen(x).sum().backward()
    assert frozen.weight.grad is None
    assert x.grad is not None


def test_the_swaps_keep_every_parameter_and_buffer_object() -> None:
    norm = random_batch_norm()
    before = [*norm.parameters(), *norm.buffers()]
    frozen = freeze_norms(norm)
    thawed = thaw_norms(frozen)
    for swapped in (frozen, thawed):
        assert all(a is b for a, b in zip([*swapped.parameters(), *swapped.buffers()], before, strict=True))


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(4, eps=1e-3, momentum=0.01), nn.SyncBatchNorm(4), nn.BatchNorm2d(4, momentum=None)]
)
def test_thawing_gives_back_what_was_frozen(norm: nn.BatchNorm2d) -> None:
    thawed = thaw_norms(freeze_norms(norm))
    assert thawed is norm
    assert all(parameter.requires_grad for parameter in thawed.parameters())


def test_the_swaps_keep_train_and_eval() -> None:
    assert not thaw_norms(freeze_norms(nn.BatchNorm2d(4).eval())).training
    assert thaw_norms(freeze_norms(nn.BatchNorm2d(4).train())).training


def test_a_norm_used_twice_stays_shared() -> None:
    norm = nn.BatchNorm2d(4)
    network = freeze_norms(nn.ModuleDict({"a": norm, "b": norm}))
    assert network["a"] is network["b"]  # type: ignore[index]


class BatchNormWithActivation(nn.BatchNorm2d):
    """Computes more than a batch norm: a swap would lose it."""


@pytest.mark.parametrize(
    "norm",
    [
        BatchNormWithActivation(4),
        nn.BatchNorm2d(4, affine=False),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.BatchNorm3d(4),
    ],
)
def test_a_norm_that_cannot_be_swapped_is_refused_before_any_is(norm: nn.Module) -> None:
    network = nn.Sequential(nn.BatchNorm2d(4), norm)
    with pytest.raises(ValueError, match="can be frozen"):
        freeze_norms(network)
    assert type(network[0]) is nn.BatchNorm2d


def test_sync_batch_norm_conversion_leaves_it_alone() -> None:
    network: nn.Sequential = nn.SyncBatchNorm.convert_sync_batchnorm(  # type: ignore[no-untyped-call]
        nn.Sequential(FrozenBatchNorm2d(4), nn.BatchNorm2d(4))
    )
    assert [type(norm) for norm in network] == [FrozenBatchNorm2d, nn.SyncBatchNorm]


def test_print_tells_frozen_from_trainable() -> None:
    text = str(build(freeze_at=2))
    assert "(bn1): FrozenBatchNorm2d(64, eps=1e-05)" in text
    assert "(bn1): BatchNorm2d(128" in text


def test_a_form_that_hides_what_it_computes_is_refused() -> None:
    class Shifted(FrozenBatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    with pytest.raises(TypeError, match=r"must define remainder\(\), got Shifted"):
        register_frozen_form(nn.BatchNorm2d, Shifted)


@pytest.mark.parametrize("norm", ["frozen_bn", "bn_eval"])
def test_a_norm_on_meta_takes_a_state_without_counters(norm: NormName) -> None:
    state = {key: value for key, value in nn.BatchNorm2d(4).state_dict().items() if key != "num_batches_tracked"}
    with torch.device("meta"):
        layer = norm_layer(norm)(4)
    layer.load_state_dict(state, strict=True, assign=True)
    assert int(layer.to("cpu").num_batches_tracked) == 0  # type: ignore[arg-type]
