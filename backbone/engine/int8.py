"""A convolution or a matrix product in 8 bits: signed weights, unsigned activations, sums of 32 bits.

A code ``q`` of an activation stands for ``scale * (q - zero_point)``, one of a weight for its channel's scale times it.
oneDNN multiplies the codes and ends in bias, residual, activation and rounding, in one kernel. Where that kernel is
not there, or the engine is off, the same numbers come from torch's float32, but for ties that round to the other side.
"""

import time
from collections.abc import Callable, Sequence
from typing import Final, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from backbone.engine import torch_internals
from backbone.engine.kernels import Geometry

Activation: TypeAlias = Literal["none", "relu", "relu6", "silu", "hardswish"]
Gelu: TypeAlias = Literal["none", "tanh"]
"""How it is approximated, as torch calls it."""

HIGHEST: Final = 255
"""Of an activation's code; the lowest is 0."""

_PEAK: Final = 127  # of a weight's code, on both sides of zero
_POST_OPS: Final[dict[Activation, tuple[str, list[float]]]] = {
    "none": ("none", []),
    "relu": ("relu", []),
    "relu6": ("hardtanh", [0.0, 6.0]),
    "silu": ("swish", []),
    "hardswish": ("hardswish", [1 / 6, 0.5]),
}
_ANY_SIDE: Final = 64
_TRIALS: Final = 3
_MUCH: Final = 2.0


class Codes(NamedTuple):
    """How numbers are written in 8 bits.

    Attributes:
        scale: The step from one code to the next.
        zero_point: The code of zero.
    """

    scale: float
    zero_point: int


class Means(NamedTuple):
    """What a layer's input is on average, by channel (C_in,).

    Attributes:
        value: The mean.
        lost: What codes lose of it: rounding and cut-off ends do not cancel out everywhere.
    """

    value: Tensor
    lost: Tensor


class Int8Weight(NamedTuple):
    """The weight of a convolution, or of a linear layer as a 1x1 one, in 8 bits.

    Attributes:
        values: (C_out, C_in / groups, kh, kw), int8 from -127 to 127, as it is or in its kernel's layout.
        scale: (C_out,) float32.
        zero_point: (C_out,) zeros, which the kernel asks for.
        bias: (C_out,) float32, ``correction`` included.
        correction: (C_out,) what rounding takes from the mean of each output.
        rounded: (C_out,) the part of it that comes of the weight's rounding.
        mean: (groups, C_in / groups) mean of the input.
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor
    bias: Tensor
    correction: Tensor
    rounded: Tensor
    mean: Tensor

    @property
    def plain(self) -> Tensor:
        """The values in torch's own layout."""
        return self.values if self.values.layout is torch.strided else self.values.to_dense()

    def floats(self) -> Tensor:
        """Return the weight that the codes stand for, in float32."""
        return self.plain.float() * self.scale[:, None, None, None]

    def restored(self) -> Tensor:
        """Return a weight of the same codes and the same ``rounded``, which is spread over it.

        Where that would be half a step or more, less is.
        """
        plain = self.plain
        by_group = self.mean[:, None, :].expand(-1, len(plain) // len(self.mean), -1).reshape(plain.shape[:2])
        taps = by_group[:, :, None, None] * (plain.abs() < _PEAK)  # the largest make the scale
        square = (taps * by_group[:, :, None, None]).sum((1, 2, 3))
        share = torch.where(square > 0, self.rounded / square.clamp_min(torch.finfo(torch.float32).tiny), 0.0)
        step = self.scale[:, None, None, None]
        return self.floats() + (share[:, None, None, None] * taps).clamp(-0.4 * step, 0.4 * step)


def has_int8() -> bool:
    """Whether oneDNN's 8-bit convolution runs here."""
    return torch_internals.HAS_INT8 and bool(torch.backends.mkldnn.enabled)


def why_no_int8() -> str:
    """Return the reason why oneDNN's 8-bit convolution is not taken."""
    return torch_internals.PATHS[torch_internals.INT8].reason or "torch.backends.mkldnn is disabled"


def int8_weight(weight: Tensor, bias: Tensor, groups: int = 1, means: Means | None = None) -> Int8Weight:
    """Write a weight in 8 bits, symmetric, with a scale for each output channel.

    Args:
        weight: (C_out, C_in / groups, kh, kw).
        bias: (C_out,).
        groups: Of the convolution.
        means: Of its input: the bias takes up what rounding would take from the mean of each output.

    Raises:
        ValueError: If weight or bias has NaN or infinity.
    """
    floats, bias = weight.detach().float(), bias.detach().float()
    peak = floats.abs().flatten(1).amax(1)
    if not torch.isfinite(peak + bias).all():
        raise ValueError("weights must be finite to be written in 8 bits, got NaN or infinity; load others")
    scale = torch.where(peak > 0, peak / _PEAK, torch.ones_like(peak))
    step = scale[:, None, None, None]
    values = (floats / step).round_().clamp_(-_PEAK, _PEAK)
    mean = floats.new_zeros(groups, floats.shape[1])
    rounded = correction = torch.zeros_like(bias)
    if means is not None:
        mean = means.value.to(floats.device).view(groups, -1)
        rounded = _of_mean(floats - values * step, mean)
        correction = rounded + _of_mean(values * step, means.lost.to(floats.device).view(groups, -1))
    zeros = torch.zeros_like(scale, dtype=torch.int32)
    return Int8Weight(values.to(torch.int8), scale, zeros, bias + correction, correction, rounded, mean)


def _of_mean(weight: Tensor, mean: Tensor) -> Tensor:
    """Return what a convolution by ``weight`` makes of a constant image of ``mean`` (groups, C_in / groups)."""
    taps = weight.sum((2, 3)).view(len(mean), -1, weight.shape[1])
    return (taps @ mean[:, :, None]).flatten()


def encode(x: Tensor, codes: Codes, per_channel: Tensor | None = None) -> Tensor:
    """Return ``x`` in codes, uint8 and channels_last: values beyond the range become its ends.

    Args:
        x: Of any shape.
        codes: What they stand for.
        per_channel: (C,) what the numbers of each channel, the last dimension, are divided by first.
    """
    scaled = x.float() * (1 / codes.scale if per_channel is None else 1 / (codes.scale * per_channel))
    scaled = scaled.add_(codes.zero_point + 0.5).clamp_(0, HIGHEST + 0.5)  # truncated below: rounds to the nearest
    layout = torch.channels_last if scaled.ndim == 4 else torch.preserve_format  # noqa: PLR2004
    return scaled.to(torch.uint8, memory_format=layout)  # bytes are moved, not floats


def decode(x: Tensor, codes: Codes) -> Tensor:
    """Return the float32 numbers that codes stand for."""
    floats = x.float()
    if codes.zero_point:
        floats = floats.sub_(codes.zero_point)
    return floats.mul_(codes.scale)


def convolve(
    x: Tensor,
    of_x: Codes,
    weight: Int8Weight,
    geometry: Geometry,
    act: Activation,
    of_out: Codes | None,
    residual: Tensor | None = None,
    of_residual: Codes | None = None,
    *,
    reuse_residual: bool = False,
) -> Tensor:
    """Return ``act(conv(x) + bias + residual)`` by oneDNN, in codes, or in float32 where ``of_out`` is None.

    Args:
        x: Codes (N, C_in, H, W), uint8, channels_last.
        of_x: What they stand for; ``weight`` is packed for these.
        weight: From ``packed``.
        geometry: Stride, padding, dilation, groups.
        act: What follows the sum; with a residual none or relu.
        of_out: What the codes of the result stand for.
        residual: Codes (N, C_out, H_out, W_out).
        of_residual: What they stand for.
        reuse_residual: Whether the result may take their memory.
    """
    values, scale, zero_point, bias = weight[:4]
    stride, padding, dilation, groups = geometry
    where = (stride, padding, dilation, groups)
    out_scale, out_zero, dtype = (1.0, 0, torch.float32) if of_out is None else (*of_out, torch.uint8)
    if residual is None:
        attribute, scalars = _POST_OPS[act]
        return torch_internals.qconv2d_pointwise(
            x, *of_x, values, scale, zero_point, bias, *where, out_scale, out_zero, dtype, attribute, scalars, ""
        )
    assert of_residual is not None
    assert of_out is not None
    if not reuse_residual:
        residual = residual.clone()
    torch_internals.qconv2d_pointwise_binary(
        x, *of_x, values, scale, zero_point, residual, bias, *where, out_scale, out_zero, dtype,
        *of_residual, "sum", 1.0, act, [], "",
    )  # fmt: skip
    return residual  # it is written there, and a copy of it is returned


def simulate(
    x: Tensor,
    of_x: Codes,
    weight: Int8Weight,
    geometry: Geometry,
    act: Activation,
    of_out: Codes | None,
    residual: Tensor | None = None,
    of_residual: Codes | None = None,
) -> Tensor:
    """Return what ``convolve`` does, by torch's public operations in float32."""
    out = F.conv2d(decode(x, of_x), weight.floats(), weight.bias, *geometry)
    if residual is not None:
        assert of_residual is not None
        out = out + decode(residual, of_residual)
    out = ACTIVATIONS[act](out)
    return out if of_out is None else encode(out, of_out)


def has_int8_linear() -> bool:
    """Whether oneDNN's 8-bit matrix product runs here."""
    return torch_internals.HAS_INT8_LINEAR and bool(torch.backends.mkldnn.enabled)


def why_no_int8_linear() -> str:
    """Return the reason why it does not."""
    return torch_internals.PATHS[torch_internals.INT8_LINEAR].reason or "torch.backends.mkldnn is disabled"


def packed_linear(weight: Int8Weight) -> Int8Weight:
    """Return a weight (C_out, C_in, 1, 1) in the layout of the matrix product, for any number of rows."""
    rows = weight.plain.flatten(1).contiguous()  # the operation does not ask for strides
    return weight._replace(values=torch_internals.qlinear_prepack(rows, None))


def unpacked_linear(weight: Int8Weight) -> Int8Weight:
    """Return what ``packed_linear`` was given."""
    return weight._replace(values=weight.values.to_dense().T.contiguous()[:, :, None, None])


def multiply(
    rows: Tensor, of_rows: Codes, weight: Int8Weight, gelu: Gelu | None, of_out: Codes | None, *, kernels: bool
) -> Tensor:
    """Return ``gelu(rows @ weight.T + bias)``, in codes, or in float32 where ``of_out`` is None.

    Args:
        rows: Codes (M, C_in), uint8.
        of_rows: What they stand for.
        weight: From ``packed_linear``, or a plain one without kernels.
        gelu: What follows, if anything does.
        of_out: What the codes of the result stand for.
        kernels: Whether oneDNN multiplies, rather than torch in float32.
    """
    if kernels:
        out_scale, out_zero, dtype = (1.0, 0, torch.float32) if of_out is None else (*of_out, torch.uint8)
        act, algorithm = ("none", "") if gelu is None else ("gelu", gelu)
        return torch_internals.qlinear_pointwise(
            rows, *of_rows, *weight[:4], out_scale, out_zero, dtype, act, [], algorithm
        )
    out = F.linear(decode(rows, of_rows), weight.floats().flatten(1), weight.bias)
    out = out if gelu is None else F.gelu(out, approximate=gelu)
    return out if of_out is None else encode(out, of_out)


def packed(weight: Int8Weight, of_x: Codes, geometry: Geometry, shape: Sequence[int]) -> Int8Weight:
    """Return ``weight`` in the layout of the kernel for codes of this shape (N, C_in, H, W)."""
    stride, padding, dilation, groups = geometry
    values = torch_internals.qconv_prepack(
        weight.plain, weight.scale, *of_x, stride, padding, dilation, groups, list(shape)
    )
    return weight._replace(values=values)


def quickest(
    weight: Int8Weight, of_x: Codes, geometry: Geometry, shape: torch.Size, run: Callable[[Int8Weight], object]
) -> Int8Weight:
    """Return ``weight`` in the layout with which ``run`` is quickest for codes of this shape, found by trial.

    What oneDNN packs for is not always what it wants when it runs: then it rearranges the weight at every call, at many
    times the convolution's own cost. A layout made for another size is right in those cases.
    """
    sizes = [list(shape), [1, shape[1], _ANY_SIDE, _ANY_SIDE]]
    candidates = [packed(weight, of_x, geometry, size) for size in sizes]
    if weight.values.layout is not torch.strided:
        candidates.insert(0, weight)
    seconds = [_seconds(each, run) for each in candidates]
    return next(each for each, took in zip(candidates, seconds, strict=True) if took <= _MUCH * min(seconds))


def _seconds(weight: Int8Weight, run: Callable[[Int8Weight], object]) -> float:
    times = []
    for _ in range(_TRIALS):
        start = time.perf_counter()
        run(weight)
        times.append(time.perf_counter() - start)
    return min(times)


def max_pool(x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """Codes (N, C, H, W) -> the maxima of windows, of whatever zero point: beyond the edges there are no codes.

    torch's own refuses uint8 in channels_last with overlapping windows. Rows first, then columns.
    """
    return _max_along(_max_along(x, 2, kernel, stride, padding), 3, kernel, stride, padding)


def _max_along(x: Tensor, dim: int, kernel: int, stride: int, padding: int) -> Tensor:
    """Take the maxima along one dimension."""
    size = x.shape[dim]
    count = (size + 2 * padding - kernel) // stride + 1
    taken: list[tuple[int, Tensor]] = []  # for each tap the first window it falls into, and what the windows see there
    for tap in range(kernel):
        first = max(0, -(-(padding - tap) // stride))
        last = min(count - 1, (size - 1 + padding - tap) // stride)
        if first <= last:
            start = first * stride + tap - padding
            taken.append((first, x.narrow(dim, start, (last - first) * stride + 1)[_every(stride, dim)]))
    taken.sort(key=lambda each: -each[1].shape[dim])  # stable: those that all windows see come first
    if taken[0][1].shape[dim] < count:  # no tap falls into all windows; the lowest code is no larger than any
        shape = list(x.shape)
        shape[dim] = count
        out = x.new_zeros(shape).contiguous(memory_format=torch.channels_last)
    elif len(taken) > 1 and taken[1][1].shape[dim] == count:
        out = torch.maximum(taken.pop(0)[1], taken.pop(0)[1])
    else:
        out = taken.pop(0)[1].clone(memory_format=torch.channels_last)
    for first, values in taken:
        part = out.narrow(dim, first, values.shape[dim])
        torch.maximum(part, values, out=part)
    return out


def _every(stride: int, dim: int) -> tuple[slice, ...]:
    return (*[slice(None)] * dim, slice(None, None, stride))


ACTIVATIONS: Final[dict[Activation, Callable[[Tensor], Tensor]]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
}
