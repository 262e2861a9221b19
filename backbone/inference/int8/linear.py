"""Linear layers and 1x1 convolutions in 8 bits, called as the modules they are: for networks whose norms do not fold.

Each writes its input in codes and gives floats. Of the two layers of an MLP the first gives codes, behind its GELU, and
the second takes them.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Final, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone.engine import switch
from backbone.engine.calls import compute_dtype, has_hook, is_autocast, is_plain, is_watched, needs_grad
from backbone.engine.folded import FoldedConv2d, MayDropWeight, QuickLinear, remember_holder, turn
from backbone.engine.int8 import (
    Codes,
    Gelu,
    Int8Weight,
    Means,
    encode,
    has_int8_linear,
    int8_weight,
    multiply,
    packed_linear,
    unpacked_linear,
)
from backbone.inference.int8.kernel import require_own_class
from backbone.inference.int8.source import Source

_OWNED: Final = tuple(
    (owner, name, getattr(owner, name))
    for owner, name in ((nn.GELU, "forward"), (nn.Linear, "forward"), (F, "gelu"), (F, "linear"))
)
"""What is not called where 8 bits stand in. A tool that counts or explains may put something else in its place."""

_GELUS: Final[dict[str, Gelu]] = {
    "timm.layers.activations.GELU": "none",
    "timm.layers.activations.GELUTanh": "tanh",
}


class Written(NamedTuple):
    """How a layer's input is written in 8 bits.

    Attributes:
        codes: What codes stand for.
        per_channel: (C_in,) what the input is divided by first, and the weight multiplied by; None for nothing.
        means: Of what is written, by channel.
    """

    codes: Codes
    per_channel: Tensor | None
    means: Means


def rows_of(x: Tensor, layer: object) -> Tensor:
    """Return what ``layer`` takes, (..., C) or features (N, C, H, W) of a convolution, as rows (M, C)."""
    return (x.permute(0, 2, 3, 1) if isinstance(layer, nn.Conv2d) else x).reshape(-1, _channels(x, layer))


def _channels(x: Tensor, layer: object) -> int:
    return x.shape[1 if isinstance(layer, nn.Conv2d) else -1]


def _like(x: Tensor, rows: Tensor, layer: object) -> Tensor:
    """Return ``rows`` (M, C_out), which came of those of ``x``, as ``layer`` gives them."""
    if isinstance(layer, nn.Conv2d):
        return rows.view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)  # channels_last
    return rows.view(*x.shape[:-1], -1)


def _without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """What is written in 8 bits is not to be rounded to another dtype before."""
    return torch.autocast(x.device.type, enabled=False) if is_autocast(x) else nullcontext()


class InRows(MayDropWeight):
    """What both kinds of layers have in common."""

    in_floats: ClassVar[type[nn.Module]]
    written: Written
    keep_weight: bool
    _int8: Int8Weight | None = None
    _source: Source | None = None
    _held_alone: torch.dtype | None = None  # of a weight that is held in 8 bits alone

    def takes(self, x: Tensor) -> bool:
        """Whether 8 bits may stand in for the layer's floats: nobody watches, and no gradient is wanted."""
        if is_watched(x) or x.device.type != "cpu" or not x.is_floating_point():
            return False
        if isinstance(self, nn.Conv2d) and x.ndim != 4:  # noqa: PLR2004
            return False
        if any(getattr(owner, name) is not own for owner, name, own in _OWNED):
            return False
        weight, bias = self._parameters.get("weight"), self._parameters.get("bias")
        if "bias" not in self._parameters or (weight is None and not self._is_packed_only()):  # pruned, say
            return False
        return all(each is None or is_plain(each) for each in (weight, bias)) and not needs_grad(x, weight, bias)

    def forward(self, input: Tensor) -> Tensor:
        """As the layer in floats."""
        if not self.takes(input):
            return super().forward(input)  # type: ignore[no-any-return]
        with torch.no_grad(), _without_autocast(input):
            out = _like(input, self.product(self.codes_of(input), None, None), self)
        return out.to(compute_dtype(input))

    def followed_by(self, act: nn.Module, last: nn.Module, x: Tensor) -> Tensor | None:
        """Return ``last(act(self(x)))``, with codes in between; None where the modules are to be called."""
        gelu = gelu_of(act)
        if gelu is None or not isinstance(last, InRows) or last.written.per_channel is not None:
            return None
        if not self.takes(x) or not last.takes(x) or any(map(has_hook, (self, act, last))):
            return None
        with torch.no_grad(), _without_autocast(x):
            hidden = self.product(self.codes_of(x), gelu, last.written.codes)
            out = _like(x, last.product(hidden, None, None), last)
        return out.to(compute_dtype(x))

    def codes_of(self, x: Tensor) -> Tensor:
        """Return the input in codes (M, C_in)."""
        return encode(rows_of(x, self), self.written.codes, self.written.per_channel)

    def product(self, codes: Tensor, gelu: Gelu | None, of_out: Codes | None) -> Tensor:
        """Codes (M, C_in) -> codes or float32 (M, C_out)."""
        kernels = switch.is_on() and has_int8_linear()
        with turn, torch.inference_mode(False), torch.no_grad():
            weight = self._weight_in_8_bits()
            is_packed = weight.values.layout is not torch.strided
            if kernels and not is_packed:
                weight = self._int8 = packed_linear(weight)
            elif is_packed and not kernels:
                weight = unpacked_linear(weight)
        return multiply(codes, self.written.codes, weight, gelu, of_out, kernels=kernels)

    def plain_again(self) -> None:
        """Become the layer of a float copy again, in place."""
        require_own_class(self, self.in_floats if type(self) in IN_ROWS.values() else None)
        self._restore()
        for name in ("written", "_int8", "_source", "_held_alone"):
            self.__dict__.pop(name, None)
        self.__class__ = self.in_floats  # type: ignore[assignment]

    def prepared_bytes(self) -> int:
        """Return the bytes kept beside the parameters."""
        held = 0 if self._int8 is None else sum(each.numel() * each.element_size() for each in self._int8)
        return held + super().prepared_bytes()

    def _weight_in_8_bits(self) -> Int8Weight:
        """Return the weight in 8 bits, written anew where it has changed since; the ranges stay."""
        int8, source, bias = self._int8, self._source, self._parameters.get("bias")
        weight = self._parameters.get("weight") if int8 is not None else self.weight  # floats may have dropped it
        if int8 is not None and source is not None and source.is_still(weight, bias):
            return int8
        if weight is not None:
            int8 = in_8_bits(weight, bias, self.written)
            if not self.keep_weight and not weight.requires_grad:
                self._held_alone = weight.dtype
                self._parameters.pop("weight")
        else:  # held in 8 bits alone: only the bias has changed
            assert int8 is not None
            given = torch.zeros_like(int8.bias) if bias is None else bias.detach().float()
            int8 = int8._replace(bias=given + int8.correction)
        self._int8, self._source = int8, Source.of(self._parameters.get("weight"), bias)
        remember_holder(self)
        return int8

    def _is_packed_only(self) -> bool:
        has_weight = "weight" in self._parameters or "weight" in self.__dict__
        return (not has_weight and self._held_alone is not None) or super()._is_packed_only()

    def _unpacked(self) -> Tensor:
        int8 = self._int8
        if int8 is None or self._held_alone is None:
            return super()._unpacked()
        plain = int8 if int8.values.layout is torch.strided else unpacked_linear(int8)
        weight = plain.restored().flatten(1)
        weight = weight if self.written.per_channel is None else weight / self.written.per_channel
        weight = weight.to(self._held_alone)
        return weight[:, :, None, None] if isinstance(self, nn.Conv2d) else weight

    def _forget(self) -> None:
        super()._forget()
        self._int8 = self._source = self._held_alone = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is made again."""
        return {**super().__getstate__(), "_int8": None, "_source": None, "_held_alone": None}


class Int8Linear(InRows, QuickLinear):
    """A linear layer in 8 bits: (..., C_in) -> (..., C_out)."""

    in_floats = QuickLinear

    def forward(self, input: Tensor) -> Tensor:
        """(..., C_in) -> (..., C_out)."""
        if self._is_packed_only() and not self.takes(input):  # a trace must not find another parameter afterwards
            return F.linear(input, self._unpacked(), self.bias)
        return super().forward(input)


class Int8Pointwise(InRows, FoldedConv2d):
    """A 1x1 convolution in 8 bits: features (N, C_in, H, W) -> (N, C_out, H, W)."""

    in_floats = FoldedConv2d


Layer: TypeAlias = QuickLinear | FoldedConv2d
IN_ROWS: Final[dict[type[nn.Module], type[InRows]]] = {QuickLinear: Int8Linear, FoldedConv2d: Int8Pointwise}
"""What each class of an inference copy becomes."""


def as_linear(weight: Tensor) -> Tensor:
    """Return the weight of a linear layer or of a 1x1 convolution as (C_out, C_in)."""
    return weight.detach().float().flatten(1)


def in_8_bits(weight: Tensor, bias: Tensor | None, written: Written) -> Int8Weight:
    """Return a weight in 8 bits, for an input that is written so."""
    floats = as_linear(weight)
    floats = floats if written.per_channel is None else floats * written.per_channel
    given = floats.new_zeros(len(floats)) if bias is None else bias
    return int8_weight(floats[:, :, None, None], given, 1, written.means)


def gelu_of(act: nn.Module) -> Gelu | None:
    """Return how ``act`` approximates GELU; None where it is none."""
    if type(act) is nn.GELU:
        return act.approximate  # type: ignore[return-value]
    return _GELUS.get(f"{type(act).__module__}.{type(act).__qualname__}")
