"""Every name of torch that it does not promise to keep: resolved once, tried once, and done without where it fails.

Each path of the engine lists the names it stands on and a trial: a tiny case whose answer is known. Where a name is
missing, raises or answers otherwise, that path is off, one warning says so, and torch's public operations run instead.
The path ``calls`` tells what kind of call is going on; without it nobody could know when to stay out, so all is off.
"""

import functools
import operator
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight
from torch.overrides import TorchFunctionMode

Kernel: TypeAlias = Callable[..., Tensor]
_TOLERANCE: Final = 1e-5
_TF32: Final = 3e-2  # what is left of a convolution in TF32, on numbers up to some units


@dataclass(slots=True)
class Path:
    """One way of the engine around torch's modules.

    Attributes:
        names: What it stands on, as dotted names below ``torch``.
        trial: Raises, or returns False, where these do not do what they should.
        needs_onednn: Whether it is silently off in a build of torch without oneDNN.
        needs: Another path that it stands on.
        reason: Why it is off; None while it is on.
        found: The objects behind the names, by the last part of the name.
        needs_vnni: Whether it is silently off on a CPU that does not multiply 8-bit integers into 32-bit sums.
    """

    names: tuple[str, ...]
    trial: Callable[[], bool]
    needs_onednn: bool = False
    needs: "Path | None" = None
    reason: str | None = None
    found: dict[str, Any] = field(default_factory=dict)
    needs_vnni: bool = False

    @property
    def is_on(self) -> bool:
        """Whether its names were found and did what they should."""
        return self.reason is None


def _resolve(dotted: str) -> Any:  # noqa: ANN401
    return functools.reduce(getattr, dotted.split("."), torch)


def _try(title: str, path: Path) -> None:
    """Resolve the names of ``path`` and run its trial; note the reason where either fails, and say it once."""
    if path.needs_onednn and not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call] # as on a Mac: nothing is wrong
        path.reason = "this build of torch has no oneDNN"
        return
    if path.needs_vnni and not _has_vnni():
        path.reason = "this CPU has no VNNI, which multiplies 8-bit integers into 32-bit sums"
        return
    if path.needs is not None and not path.needs.is_on:  # said already
        path.reason = f"it needs what is off: {path.needs.reason}"
        return
    for name in path.names:
        try:
            path.found[name.rpartition(".")[2]] = _resolve(name)
        except (AttributeError, RuntimeError) as error:
            path.reason = f"torch.{name} is missing in torch {torch.__version__} ({error})"
    if path.reason is None:
        try:
            with torch.no_grad():
                passed = path.trial()
            if not passed:
                path.reason = f"{_listed(path)} of torch {torch.__version__} gave a wrong answer in a trial"
        except Exception as error:  # whatever a changed internal may raise
            path.reason = f"{_listed(path)} of torch {torch.__version__} failed in a trial: {error!r}"
    if path.reason is not None:
        warnings.warn(f"the engine's {title} is off, plain PyTorch runs instead: {path.reason}", stacklevel=2)


def _has_vnni() -> bool:
    """Whether torch sees one of the three extensions that multiply 8-bit integers without saturation."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in ("avx512_vnni", "avx_vnni", "avx10_1", "amx_int8"))


def _listed(path: Path) -> str:
    return ", ".join(f"torch.{name}" for name in path.names)


# --- what kind of call is going on ------------------------------------------------------------------------------------


def tracing_state() -> object:
    """What ``torch.jit.trace`` is at work on; None or empty outside of it."""
    return _calls["_get_tracing_state"]()


def num_dispatch_modes() -> int:
    """How many dispatch modes are active: they see, or stand in for, every operation."""
    return _calls["_len_torch_dispatch_stack"]()  # type: ignore[no-any-return]


def num_function_modes() -> int:
    """How many function modes are active, ``torch.device`` as a context among them."""
    return _calls["_len_torch_function_stack"]()  # type: ignore[no-any-return]


def function_modes() -> list[TorchFunctionMode]:
    """The active function modes."""
    return _calls["_get_current_function_mode_stack"]()  # type: ignore[no-any-return]


def is_transformed() -> bool:
    """Whether one of ``torch.func``'s transforms is going on: vmap, grad, jvp."""
    return bool(_calls["_are_functorch_transforms_active"]())


def is_batched(tensor: Tensor) -> bool:
    """Whether ``tensor`` is one of a batch of gradients (``is_grads_batched=True``), which no mode tells of."""
    return bool(_calls["is_legacy_batchedtensor"](tensor))


def is_forward_ad() -> bool:
    """Whether a level of forward-mode differentiation is open."""
    return bool(_calls["forward_ad"]._current_level >= 0)


def has_global_hook() -> bool:
    """Whether a hook on all modules is registered."""
    return bool(_calls["_has_any_global_hook"]())


def hooks_of(module: nn.Module) -> tuple[object, ...]:
    """The hooks of ``module`` itself that would see its inputs or outputs, by kind; empty kinds are false."""
    state = module.__dict__
    return (
        state["_forward_hooks"],
        state["_forward_pre_hooks"],
        state["_backward_hooks"],
        state["_backward_pre_hooks"],
    )


def _calls_are_told_apart() -> bool:
    """Ask each question inside of what it tells of; one that always says yes costs time alone."""
    seen: list[bool] = []

    def look_for_tracing(x: Tensor) -> Tensor:
        seen.append(bool(tracing_state()))
        return x + 1

    def look_for_transform(x: Tensor) -> Tensor:
        seen.append(is_transformed())
        return x + 1

    zero = torch.zeros(1, device="cpu", dtype=torch.float32)
    num_modes = num_dispatch_modes(), num_function_modes()  # a default device is one
    with warnings.catch_warnings():  # torch.jit is deprecated, and still used
        warnings.simplefilter("ignore")
        torch.jit.trace(look_for_tracing, (zero,), check_trace=False)  # type: ignore[no-untyped-call]
    with _calls["TorchDispatchMode"]():
        seen.append(num_dispatch_modes() == num_modes[0] + 1)
    with torch.device("cpu"):
        seen.append(num_function_modes() == len(function_modes()) == num_modes[1] + 1)
    torch.func.vmap(look_for_transform)(zero)
    with torch.autograd.forward_ad.dual_level():
        seen.append(is_forward_ad())
    with torch.enable_grad():
        leaf = zero.clone().requires_grad_()
        double = leaf * 2
        leaf.register_hook(lambda grad: seen.append(is_batched(grad)))  # type: ignore[no-untyped-call]
        torch.autograd.grad(double, leaf, torch.ones(2, 1, device="cpu"), is_grads_batched=True)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    seen.append(has_global_hook())
    handle.remove()
    return len(seen) == 7 and all(seen) and _hooks_are_seen()  # noqa: PLR2004 (one for each question)


def _hooks_are_seen() -> bool:
    seen = []
    registrations: tuple[Callable[[nn.Module], object], ...] = (
        lambda module: module.register_forward_hook(lambda *_: None),
        lambda module: module.register_forward_pre_hook(lambda *_: None),
        lambda module: module.register_full_backward_hook(lambda *_: None),
        lambda module: module.register_full_backward_pre_hook(lambda *_: None),
    )
    for register in registrations:
        module = nn.Identity()
        before = any(hooks_of(module))
        register(module)
        seen.append(not before and any(hooks_of(module)))
    return all(seen)


def is_any_hooked(modules: Sequence[nn.Module]) -> bool:
    """Whether one of ``modules`` has such a hook, or a ``forward`` of its own; quicker than asking each."""
    for module in modules:
        state = module.__dict__
        if (
            state["_forward_hooks"]
            or state["_forward_pre_hooks"]
            or state["_backward_hooks"]
            or state["_backward_pre_hooks"]
            or "forward" in state
        ):
            return True
    return False


# --- kernels ----------------------------------------------------------------------------------------------------------


def _numbers(*shape: int) -> Tensor:
    """Numbers from -1 to 1 without order, which leave torch's random state alone."""
    size = functools.reduce(operator.mul, shape)
    return torch.sin(torch.arange(size, device="cpu", dtype=torch.float64) * 12.9898).float().view(shape)


def _close(actual: Tensor, expected: Tensor, tolerance: float = _TOLERANCE) -> bool:
    return actual.shape == expected.shape and bool((actual - expected).abs().max() <= tolerance)


_WHERE: Final = ((1, 1), (2, 2), (1, 1), 1)  # padding, stride, dilation, groups


def _case() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, weight, bias and ``F.conv2d`` of them: 3x3, padding 1, stride 2."""
    x = _numbers(2, 8, 6, 5).contiguous(memory_format=torch.channels_last)
    weight, bias = _numbers(8, 8, 3, 3), _numbers(8)
    return x, weight, bias, F.conv2d(x, weight, bias, (2, 2), (1, 1))


def _onednn_convolves() -> bool:
    ops = _onednn.found
    x, weight, bias, plain = _case()
    residual = _numbers(*plain.shape).contiguous(memory_format=torch.channels_last)
    relu = ops["_convolution_pointwise"](x, weight, bias, *_WHERE, "relu", [], "")
    none = ops["_convolution_pointwise"](x, weight, bias, *_WHERE, "none", [], "")
    both: tuple[object, ...] = ("add", 1.0, "relu", [], None)
    added = ops["_convolution_pointwise"](x, residual, weight, bias, *_WHERE, *both)
    expected = F.relu(plain + residual)
    in_place = ops["_convolution_pointwise_"](residual, x, weight, bias, *_WHERE, *both)
    return (
        _close(relu, F.relu(plain)) and _close(none, plain) and _close(added, expected) and _close(in_place, expected)
    )


def _onednn_packs() -> bool:
    x, weight, bias, plain = _case()
    packed = _packing.found["_reorder_convolution_weight"](weight, *_WHERE, list(x.shape))
    out = _onednn.found["_convolution_pointwise"](x, packed, bias, *_WHERE, "none", [], "")
    return _close(out, plain) and torch.equal(packed.to_dense(), weight)


def _onednn_multiplies() -> bool:
    x, weight, bias = _numbers(5, 8), _numbers(6, 8), _numbers(6)
    return _close(_linear.found["_linear_pointwise"](x, weight, bias, "none", [], ""), F.linear(x, weight, bias))


def _eight_bits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, weight, its scales and bias, with sums of products beyond 16 bits: without VNNI they would saturate."""
    x = torch.full((1, 8, 6, 5), 255, dtype=torch.uint8, device="cpu")
    x[:, ::3] = 17
    weight = (_numbers(8, 8, 3, 3) * 127).to(torch.int8)
    weight[0] = 127
    return (
        x.contiguous(memory_format=torch.channels_last),
        weight,
        _numbers(8).abs() / 1e3 + 1e-4,
        _numbers(8),
    )


def _onednn_convolves_in_int8() -> bool:
    """With zero points on both sides, a residual, an activation, and in float32."""
    ops = _int8.found
    x, weight, scale, bias = _eight_bits()
    zeros, where = torch.zeros(8, dtype=torch.int32, device="cpu"), ((2, 2), (1, 1), (1, 1), 1)
    values = ops["qconv_prepack"](weight, scale, 0.02, 13, *where, list(x.shape))
    given = (x, 0.02, 13, values, scale, zeros)
    plain = F.conv2d((x.float() - 13) * 0.02, weight.float() * scale[:, None, None, None], bias, (2, 2), (1, 1))
    floats = ops["qconv2d_pointwise"](*given, bias, *where, 1.0, 0, torch.float32, "none", [], "")
    step = float(plain.abs().max()) / 100
    codes = ops["qconv2d_pointwise"](*given, bias, *where, step, 120, torch.uint8, "none", [], "")
    residual = torch.full(plain.shape, 90, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    ops["qconv2d_pointwise"].binary(
        *given, residual, bias, *where, step, 0, torch.uint8, step, 40, "sum", 1.0, "relu", [], ""
    )
    unpacked = values.to_dense()
    return (
        _close(floats, plain, 1e-4 * float(plain.abs().max()))
        and _close(codes.float(), (plain / step).round() + 120, 1)
        and _close(residual.float(), (plain / step + 50).round().clamp(0, 255), 1)
        and torch.equal(unpacked, weight)
    )


def _onednn_multiplies_in_int8() -> bool:
    """With a zero point, in float32 and, behind a GELU, in codes."""
    ops = _int8_linear.found
    x, weight, scale, bias = _eight_bits()
    x, weight = x.flatten(2)[0].T.contiguous(), weight.flatten(1)[:, :8].contiguous()
    zeros = torch.zeros(8, dtype=torch.int32, device="cpu")
    values = ops["qlinear_prepack"](weight, None)
    given = (x, 0.02, 13, values, scale, zeros, bias)
    plain = F.linear((x.float() - 13) * 0.02, weight.float() * scale[:, None], bias)
    floats = ops["qlinear_pointwise"](*given, 1.0, 0, torch.float32, "none", [], "")
    step = float(plain.abs().max()) / 100
    codes = ops["qlinear_pointwise"](*given, step, 120, torch.uint8, "gelu", [], "none")
    return (
        _close(floats, plain, 1e-4 * float(plain.abs().max()))
        and _close(codes.float(), (F.gelu(plain) / step).round() + 120, 1)
        and torch.equal(values.to_dense().T, weight)
    )


def _half_precision_answers() -> bool:
    return all(type(supported()) is bool for supported in _half.found.values())


def _gradients_are_right() -> bool:
    x, weight, _, plain = _case()
    grad = _numbers(*plain.shape)
    geometry = ((2, 2), (1, 1), (1, 1))
    of_x, of_weight, _ = _backward.found["convolution_backward"](
        grad, x, weight, None, *geometry, False, (0, 0), 1, (True, True, False)
    )
    masked = _backward.found["threshold_backward"](grad, plain, 0)
    return (
        _close(of_x, conv2d_input(x.shape, weight, grad, *geometry))  # type: ignore[no-untyped-call]
        and _close(of_weight, conv2d_weight(x, weight.shape, grad, *geometry))  # type: ignore[no-untyped-call]
        and torch.equal(masked, grad * (plain > 0))
    )


def _looked_up() -> bool:
    return True  # tried by ``has_cudnn`` where there is a device: a trial here would initialise CUDA at import


@functools.cache
def has_cudnn(device: torch.device) -> bool:
    """Whether cuDNN's fused convolutions are there and did what they should on ``device``; tried at the first call."""
    if not _cudnn.is_on:
        return False
    try:
        with torch.no_grad(), torch.inference_mode(False):
            x, weight, bias, plain = (tensor.to(device) for tensor in _case())
            where = ((2, 2), (1, 1), (1, 1), 1)
            relu = _cudnn.found["cudnn_convolution_relu"](x, weight, bias, *where)
            added = _cudnn.found["cudnn_convolution_add_relu"](x, weight, plain.contiguous(), 1.0, bias, *where)
        passed = _close(relu, F.relu(plain), _TF32) and _close(added, F.relu(plain + plain), _TF32)
        _cudnn.reason = None if passed else f"{_listed(_cudnn)} gave a wrong answer in a trial"
    except Exception as error:  # whatever a changed internal may raise
        _cudnn.reason = f"{_listed(_cudnn)} failed in a trial: {error!r}"
    if _cudnn.reason is not None:
        warnings.warn(f"the engine's cuDNN kernels are off, plain PyTorch runs instead: {_cudnn.reason}", stacklevel=2)
    return _cudnn.is_on


_told_apart = Path(
    (
        "_C._get_tracing_state",
        "_C._len_torch_dispatch_stack",
        "_C._len_torch_function_stack",
        "_C._are_functorch_transforms_active",
        "_C._functorch.is_legacy_batchedtensor",
        "overrides._get_current_function_mode_stack",
        "autograd.forward_ad",
        "nn.modules.module._has_any_global_hook",
        "utils._python_dispatch.TorchDispatchMode",
    ),
    _calls_are_told_apart,
)
_onednn = Path(
    ("ops.mkldnn._convolution_pointwise", "ops.mkldnn._convolution_pointwise_"), _onednn_convolves, needs_onednn=True
)
_packing = Path(("ops.mkldnn._reorder_convolution_weight",), _onednn_packs, needs_onednn=True, needs=_onednn)
_linear = Path(("ops.mkldnn._linear_pointwise",), _onednn_multiplies, needs_onednn=True)
_int8 = Path(
    ("ops.onednn.qconv2d_pointwise", "ops.onednn.qconv_prepack"),
    _onednn_convolves_in_int8,
    needs_onednn=True,
    needs_vnni=True,
)
_int8_linear = Path(
    ("ops.onednn.qlinear_pointwise", "ops.onednn.qlinear_prepack"),
    _onednn_multiplies_in_int8,
    needs_onednn=True,
    needs_vnni=True,
)
_half = Path(
    ("ops.mkldnn._is_mkldnn_bf16_supported", "ops.mkldnn._is_mkldnn_fp16_supported"),
    _half_precision_answers,
    needs_onednn=True,
)
_backward = Path(("ops.aten.convolution_backward", "ops.aten.threshold_backward"), _gradients_are_right)
_cudnn = Path(("cudnn_convolution_relu", "cudnn_convolution_add_relu"), _looked_up)
_calls: Final = _told_apart.found

INT8: Final = "8-bit convolution of oneDNN"
INT8_LINEAR: Final = "8-bit matrix product of oneDNN"
PATHS: Final[dict[str, Path]] = {
    "look at calls": _told_apart,
    "fused convolution of oneDNN": _onednn,
    "weight packing of oneDNN": _packing,
    "matrix product of oneDNN": _linear,
    INT8: _int8,
    INT8_LINEAR: _int8_linear,
    "half precision of oneDNN": _half,
    "gradient": _backward,
    "fused convolution of cuDNN": _cudnn,
}

for _title, _path in PATHS.items():
    _try(_title, _path)

LOOKS_AT_CALLS: Final = _told_apart.is_on
HAS_ONEDNN: Final = _onednn.is_on
PACKS: Final = _onednn.is_on and _packing.is_on
HAS_LINEAR: Final = _linear.is_on
HAS_INT8: Final = _int8.is_on
HAS_INT8_LINEAR: Final = _int8_linear.is_on
HAS_GRADIENT: Final = _backward.is_on


def _unavailable(*_: object) -> Tensor:
    raise AssertionError("a path of the engine that is off was taken")


convolution_pointwise: Final[Kernel] = _onednn.found.get("_convolution_pointwise", _unavailable)
convolution_pointwise_: Final[Kernel] = _onednn.found.get("_convolution_pointwise_", _unavailable)
reorder_convolution_weight: Final[Kernel] = _packing.found.get("_reorder_convolution_weight", _unavailable)
linear_pointwise: Final[Kernel] = _linear.found.get("_linear_pointwise", _unavailable)
qconv2d_pointwise: Final[Kernel] = getattr(_int8.found.get("qconv2d_pointwise"), "default", _unavailable)
qconv2d_pointwise_binary: Final[Kernel] = getattr(_int8.found.get("qconv2d_pointwise"), "binary", _unavailable)
qconv_prepack: Final[Kernel] = _int8.found.get("qconv_prepack", _unavailable)
qlinear_pointwise: Final[Kernel] = getattr(_int8_linear.found.get("qlinear_pointwise"), "default", _unavailable)
qlinear_prepack: Final[Kernel] = _int8_linear.found.get("qlinear_prepack", _unavailable)
convolution_backward: Final[Any] = _backward.found.get("convolution_backward", _unavailable)
threshold_backward: Final[Any] = _backward.found.get("threshold_backward", _unavailable)
cudnn_convolution_relu: Final[Kernel] = _cudnn.found.get("cudnn_convolution_relu", _unavailable)
cudnn_convolution_add_relu: Final[Kernel] = _cudnn.found.get("cudnn_convolution_add_relu", _unavailable)


def onednn_dtypes() -> frozenset[torch.dtype]:
    """The dtypes that oneDNN's fused convolution takes on this CPU."""
    if not HAS_ONEDNN:
        return frozenset()
    half = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    supported = {dtype for dtype, name in half.items() if _half.is_on and _half.found[name]()}
    return frozenset({torch.float32, *supported})
