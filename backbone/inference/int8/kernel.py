"""A convolution of an int8 copy: its weight in 8 bits, made anew whenever the weight in floats has changed."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone.engine.calls import is_autocast
from backbone.engine.folded import FoldedConv2d, remember_holder, turn
from backbone.engine.int8 import Activation, Codes, Int8Weight, Means, convolve, int8_weight, packed, quickest, simulate
from backbone.inference.int8.source import Source

_MAX_SHAPES: Final = 8


class Int8Conv2d(FoldedConv2d):
    """A convolution whose weight may be held in 8 bits alone.

    ``optimize_for_inference`` makes one of every convolution that computes in 8 bits. Called by itself it computes in
    floats; the network's own call computes in 8 bits.
    """

    _int8: Int8Weight | None = None
    _holds_it_alone = False

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, C_in, H, W) -> (N, C_out, H_out, W_out)."""
        int8 = self._int8
        if int8 is None or not self._is_packed_only():
            return super().forward(x)
        x = padded(self, x, 0)
        x = x if is_autocast(x) else x.to(self.bias.dtype)  # type: ignore[union-attr]
        return F.conv2d(x, int8.restored().to(self.bias.dtype), self.bias, *self.geometry)  # type: ignore[union-attr]

    def hold(self, weight: Int8Weight) -> None:
        """Hold ``weight``, and where plain weights are not kept nothing else."""
        with turn:
            self._int8 = weight
            plain = self._parameters.get("weight")
            if not self.keep_weight and plain is not None and not plain.requires_grad:
                self._parameters.pop("weight")
                self._holds_it_alone = True
        remember_holder(self)

    def plain_again(self) -> None:
        """Become the convolution of a float copy again, in place."""
        floats: Any = next((floats for floats, int8 in IN_INT8.items() if type(self) is int8), None)
        require_own_class(self, floats)
        self._restore()
        self.__class__ = floats

    def prepared_bytes(self) -> int:
        """Return the bytes kept beside the parameters."""
        held = 0 if self._int8 is None else sum(each.numel() * each.element_size() for each in self._int8)
        return held + super().prepared_bytes()

    def _is_packed_only(self) -> bool:
        has_weight = "weight" in self._parameters or "weight" in self.__dict__
        return (not has_weight and self._holds_it_alone) or super()._is_packed_only()

    def _unpacked(self) -> Tensor:
        int8 = self._int8
        if int8 is None:
            return super()._unpacked()
        return int8.restored().to(self.bias.dtype)  # type: ignore[union-attr]

    def _forget(self) -> None:
        super()._forget()
        self._int8, self._holds_it_alone = None, False

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is held in 8 bits; the weight it stands for is there."""
        return {**super().__getstate__(), "_int8": None, "_holds_it_alone": False}


class SameConv2d(FoldedConv2d):
    """A folded convolution that pads as TensorFlow does: its output is the input size over the stride, rounded up."""

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, C_in, H, W) -> (N, C_out, H / stride, W / stride); sizes round up."""
        return super().forward(padded(self, x, 0))


class Int8SameConv2d(Int8Conv2d, SameConv2d):
    """The same in 8 bits."""


def require_same_modules(root: nn.Module, modules: Sequence[tuple[nn.Module, dict[str, Any]]]) -> None:
    """Refuse a network in 8 bits of which a module was replaced.

    Args:
        root: The network.
        modules: Each module in it with the children it had.

    Raises:
        RuntimeError: If one has others.
    """
    for module, children in modules:
        if module._modules != children:
            raise RuntimeError(
                f"the modules of {type(root).__name__} must stay those that were calibrated, got others in "
                f"{type(module).__name__} (weights may change); call optimize_for_inference on the changed model"
            )


def require_own_class(layer: nn.Module, floats: type[nn.Module] | None) -> None:
    """Refuse a layer that has become another since it was made: one with parametrizations, say."""
    if floats is None:
        raise ValueError(
            f"optimize_for_inference takes int8 copies with the layers it made, got a {type(layer).__name__}; remove "
            f"its parametrizations, or begin with the model itself"
        )


IN_INT8: Final[dict[type[FoldedConv2d], type[Int8Conv2d]]] = {FoldedConv2d: Int8Conv2d, SameConv2d: Int8SameConv2d}
"""What each class of an inference copy becomes."""


def padded(conv: FoldedConv2d, x: Tensor, zero: int) -> Tensor:
    """Return ``x`` with as much ``zero`` around it as ``conv`` adds by itself, one more on the right and below."""
    if not isinstance(conv, SameConv2d):
        return x
    stride, _, dilation, _ = conv.geometry
    sides = []
    for size, kernel, step, spread in zip(x.shape[2:], conv.kernel_size, stride, dilation, strict=True):
        total = max((-(-size // step) - 1) * step + (kernel - 1) * spread + 1 - size, 0)
        sides.append((total // 2, total - total // 2))
    (top, bottom), (left, right) = sides
    return F.pad(x, (left, right, top, bottom), value=zero) if top + bottom + left + right else x


def output_size(conv: FoldedConv2d, x: Tensor) -> list[int]:
    """Return height and width of what ``conv`` makes of ``x`` (N, C_in, H, W)."""
    (strides, paddings, dilations, _), sizes = conv.geometry, x.shape[2:]
    if isinstance(conv, SameConv2d):
        return [-(-size // stride) for size, stride in zip(sizes, strides, strict=True)]
    reaches = [dilation * (kernel - 1) + 1 for dilation, kernel in zip(dilations, conv.kernel_size, strict=True)]
    walks = zip(sizes, paddings, reaches, strides, strict=True)
    return [(size + 2 * padding - reach) // stride + 1 for size, padding, reach, stride in walks]


class Kernel:
    """A convolution at one place of the network.

    Args:
        module: The convolution.
        of_x: What codes of the input stand for.
        act: What follows.
        of_out: What codes of the output stand for; None for an output in float32.
        of_residual: What codes of the residual stand for, if there is one.
        means: Of the input.
    """

    def __init__(
        self,
        module: Int8Conv2d,
        of_x: Codes,
        act: Activation,
        of_out: Codes | None,
        of_residual: Codes | None,
        means: Means,
    ) -> None:
        self.module, self.of_x, self.act, self.of_out, self.of_residual = module, of_x, act, of_out, of_residual
        self.means = means
        self._source: Source | None = None
        self._weight: Int8Weight | None = None
        self._packs: OrderedDict[torch.Size, Int8Weight] = OrderedDict()
        self._once: torch.Size | None = None

    def refresh(self) -> None:
        """Write the weight in 8 bits anew where it has changed since; the ranges stay."""
        module, source = self.module, self._source
        parameters = module._parameters
        is_known = "weight" in parameters or module._is_packed_only()  # or it is a tensor that somebody put there
        if is_known and source is not None and source.is_still(parameters.get("weight"), parameters.get("bias")):
            return
        with turn, torch.inference_mode(False), torch.no_grad():
            self._packs.clear()
            self._once = None
            if module._is_packed_only() and module._int8 is not None:  # held by another call of this module
                plain = module._int8
                self._weight = plain._replace(bias=module.bias.detach().float() + plain.correction)  # type: ignore[union-attr]
            else:
                whole = module.weight
                self._weight = int8_weight(whole, module.bias, module.groups, self.means)  # type: ignore[arg-type]
            self._remember()

    def __call__(self, x: Tensor, residual: Tensor | None, reuse_residual: bool, kernels: bool) -> Tensor:
        """Codes (N, C_in, H, W) -> codes or float32 (N, C_out, H_out, W_out)."""
        weight, geometry = self._weight, self.module.geometry
        assert weight is not None
        x = padded(self.module, x, self.of_x.zero_point)
        if not kernels:
            return simulate(x, self.of_x, weight, geometry, self.act, self.of_out, residual, self.of_residual)
        pack = self._packs.get(x.shape)
        if pack is None:
            pack = self._packed(x, residual)
        return self._run(pack, x, residual, reuse_residual)

    def _run(self, weight: Int8Weight, x: Tensor, residual: Tensor | None, reuse_residual: bool) -> Tensor:
        """Run oneDNN."""
        return convolve(
            x, self.of_x, weight, self.module.geometry, self.act, self.of_out, residual, self.of_residual,
            reuse_residual=reuse_residual,
        )  # fmt: skip

    def _packed(self, x: Tensor, residual: Tensor | None) -> Int8Weight:
        """Return the weight in its kernel's layout; the best one is looked for once a shape comes again."""
        with turn, torch.inference_mode(False), torch.no_grad():
            weight = self._weight
            assert weight is not None
            if weight.values.layout is torch.strided:
                weight = packed(weight, self.of_x, self.module.geometry, x.shape)
            elif self._once == x.shape:
                weight = quickest(
                    weight, self.of_x, self.module.geometry, x.shape, lambda each: self._run(each, x, residual, False)
                )
                self._packs[x.shape] = weight
                if len(self._packs) > _MAX_SHAPES:
                    self._packs.popitem(last=False)
            self._once, self._weight = x.shape, weight
            self.module.hold(weight)
            self._remember()
            return weight

    def _remember(self) -> None:
        parameters = self.module._parameters
        self._source = Source.of(parameters.get("weight"), parameters.get("bias"))
