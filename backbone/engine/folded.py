"""The layers of an inference copy: their weights in the layout of their kernel, prepared once a shape comes again."""

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Final, NamedTuple, Self
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone.engine.calls import is_autocast, is_plain, is_traced, needs_grad
from backbone.engine.finite import is_finite
from backbone.engine.kernels import Geometry, conv_bias_act, has_onednn, layout_depends_on, pack, unpack
from backbone.engine.products import HAS_LINEAR, linear
from backbone.engine.winograd import WinogradConv, suits

_PATIENCE: Final = 8  # calls of smaller shapes in a row


class Prepared(NamedTuple):
    """What is kept of a weight for inputs of one shape.

    Attributes:
        weight: The plain weight it was made from; None where the layer keeps none.
        bias: The bias; both are held, so that no other tensor can take their place in memory.
        shape: What the layout depends on.
        values: Where weight and bias lie and how often they were written.
        held: The memory they lie in, so that a new ``.data`` cannot come to lie there.
        size: Numbers in the input.
        is_finite: Whether weight and bias are.
        packed: The weight in its kernel's layout, once the shape has come again.
        winograd: The convolution by fewer products, once it has come a third time, where that pays.
    """

    weight: Tensor | None
    bias: Tensor
    shape: object
    values: tuple[object, ...]
    held: tuple[Tensor, ...]
    size: int
    is_finite: bool
    packed: Tensor | None = None
    winograd: WinogradConv | None = None


class Follows:
    """What a layer of an inference copy may do besides: compute the layers after it, too."""

    def followed_by(self, act: nn.Module, last: nn.Module, x: Tensor) -> Tensor | None:
        """Return ``last(act(self(x)))``; None where the modules are to be called."""
        return None


def mlp(x: Tensor, first: nn.Module, act: nn.Module, last: nn.Module) -> Tensor | None:
    """Return ``last(act(first(x)))`` of a block's two linear layers; None where the modules are to be called."""
    return first.followed_by(act, last, x) if isinstance(first, Follows) else None


class MayDropWeight(nn.Module):
    """A layer whose plain weight may be dropped where it is held in another form; it is there again for who asks."""

    keep_weight: bool

    def prepared_bytes(self) -> int:
        """Return the bytes kept beside the parameters."""
        return 0

    def _is_packed_only(self) -> bool:
        """Whether there is no plain weight, but the other form."""
        return False

    def _unpacked(self) -> Tensor:
        """Return the plain weight of a layer that keeps none."""
        raise NotImplementedError

    def _forget(self) -> None:
        """Hold nothing prepared."""

    def _restore(self) -> None:
        """Have the plain weight again, and nothing prepared."""
        with turn:
            if self._is_packed_only():
                with torch.inference_mode(False):
                    self._parameters["weight"] = nn.Parameter(self._unpacked(), requires_grad=False)
            self._forget()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        with turn:  # or another thread drops it again before
            self._restore()
            return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        with turn:
            self._restore()
            super()._load_from_state_dict(*args, **kwargs)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        with turn:
            if self._is_packed_only():
                destination[f"{prefix}weight"] = self._unpacked()
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        if name != "weight" or not self._is_packed_only():
            return super().__getattr__(name)
        with turn:
            self._restore()  # who asks may edit it
            return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:  # noqa: ANN401
        if name != "weight" or not self._is_packed_only():
            super().__setattr__(name, value)
            return
        with turn:
            self._restore()
            super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        """Have the plain weight in it."""
        with turn:
            parameters = dict(self._parameters)
            if self._is_packed_only():
                parameters = {"weight": nn.Parameter(self._unpacked(), requires_grad=False), **parameters}
            return {**self.__dict__, "_parameters": parameters}


class FoldedConv2d(Follows, MayDropWeight, nn.Conv2d):
    """A convolution that carries its norm in weight and bias, for inference.

    ``optimize_for_inference`` puts it where a convolution was; the norm after it becomes an Identity.

    Args:
        conv: The convolution to replace.
        weight: Its weight times the norm's scale.
        bias: The norm's shift.
        keep_weight: Whether the plain weight stays beside the packed one. Without it the state dict is unpacked when
            somebody asks, and other shapes of input are repacked for; ``weight`` is there again from a look at it until
            it is packed anew.
    """

    _prepared: Prepared | None = None
    _passed_over: int = 0

    def __init__(self, conv: nn.Conv2d, weight: Tensor, bias: Tensor, *, keep_weight: bool = True) -> None:
        super().__init__(conv.in_channels, conv.out_channels, 1, groups=conv.groups, device="meta")
        self.kernel_size, self.padding_mode = conv.kernel_size, conv.padding_mode
        self.geometry = Geometry.of(conv)
        self.stride, self.padding, self.dilation, _ = self.geometry
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = nn.Parameter(bias.detach(), requires_grad=False)
        self.keep_weight = keep_weight

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, C_in, H, W) -> (N, C_out, H_out, W_out)."""
        if is_traced(x) or not self.takes(x):
            weight = self._unpacked() if self._is_packed_only() else self.weight
            if isinstance(x, Tensor) and x.dtype != weight.dtype and not is_autocast(x):  # a proxy has no dtype
                x = x.to(weight.dtype)
            return F.conv2d(x, weight, self.bias, *self.geometry)
        if is_finite(x):
            return self.fused(x)
        return F.conv2d(x.to(self.weight.dtype), self.weight, self.bias, *self.geometry)  # NaN goes no further

    def takes(self, x: Tensor) -> bool:
        """Whether ``fused`` computes what modules would, for an ``x`` that is not traced."""
        weight: Tensor | None = self._parameters.get("weight")  # 106 look-ups a pass: the short way
        bias: Tensor | None = self._parameters.get("bias")
        if weight is None or bias is None:  # in DataParallel's replicas, after pruning, or where none is kept
            bias = self.bias
            assert bias is not None
            weight = bias if self._is_packed_only() else self.weight
        if weight.requires_grad or bias.requires_grad:
            self._restore()  # an optimizer's fused step moves no version counter
        if is_autocast(x) and torch.get_autocast_dtype(x.device.type) != weight.dtype:
            return False
        return x.ndim == 4 and is_plain(weight) and is_plain(bias) and not needs_grad(x, weight, bias)  # noqa: PLR2004

    def fused(
        self, x: Tensor, residual: Tensor | None = None, *, relu: bool = False, reuse_residual: bool = False
    ) -> Tensor:
        """Return ``relu(conv(x) + bias + residual)`` in the dtype of the weight, for what ``takes`` accepts."""
        with nullcontext() if self.keep_weight else turn:
            weight, bias = self._weight_and_bias()
            if x.dtype != bias.dtype:
                x = x.to(bias.dtype)
            prepared = self._prepared_for(x, weight, bias)
            packed = None if prepared is None else prepared.packed
            best = (self.weight if weight is None else weight) if packed is None else packed
        if prepared is not None and prepared.winograd is not None and residual is None:
            return prepared.winograd(x, relu=relu)
        return conv_bias_act(x, best, bias, self.geometry, residual, relu=relu, reuse_residual=reuse_residual)

    def is_finite(self) -> bool:
        """Whether weight and bias are finite; of what is prepared it is known."""
        with nullcontext() if self.keep_weight else turn:
            weight, bias = self._weight_and_bias()
            sources = [bias] if weight is None else [weight, bias]
            kept = self._prepared
            if kept is None or any(map(Tensor.is_inference, sources)) or kept.values != _values(sources):
                return is_finite(*sources)
            return kept.is_finite

    def forget_shapes(self) -> None:
        """Compute the next input as if it were the first."""
        self._restore()
        self._passed_over = 0

    def prepared_bytes(self) -> int:
        """Return the bytes kept beside the parameters."""
        prepared = self._prepared
        if prepared is None:
            return 0
        packed = None if prepared.packed is prepared.weight else prepared.packed  # no kernel has a layout of its own
        tensors = (packed, None if prepared.winograd is None else prepared.winograd.weight)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)

    def _prepared_for(self, x: Tensor, weight: Tensor | None, bias: Tensor) -> Prepared | None:
        """Pack the weight once a shape comes twice, consider Winograd when it comes again; None where nothing is ready.

        Both pay only where shapes repeat; a detector whose images all differ runs on the plain weight. A smaller shape
        takes over only after some calls in a row: a head that all levels of a pyramid share is prepared for the finest.
        """
        sources = [bias] if weight is None else [weight, bias]
        if any(source.requires_grad or source.is_inference() for source in sources):
            return None  # these may change unseen
        kept, shape = self._prepared, layout_depends_on(x)
        values = _values(sources)
        if kept is not None and (kept.weight is not weight or kept.bias is not bias or kept.values != values):
            if weight is None:  # it came from no others: only the bias has changed, or the kernels
                self._restore()
                return None
            kept = None  # made from others
        if (kept is None or kept.shape != shape or kept.packed is None) and _is_captured(x):
            return kept if weight is None else None  # a graph would pack at every replay, and calls outside of it read
        if kept is None or kept.shape != shape:
            self._passed_over += 1
            if kept is not None and x.numel() < kept.size and self._passed_over <= _PATIENCE:
                return kept if weight is None else None
            packed = None if kept is None or weight is not None else pack(unpack(kept.packed), self.geometry, x)
            held = tuple(source.detach() for source in sources)
            kept = self._prepared = Prepared(
                weight, bias, shape, values, held, x.numel(), is_finite(weight, bias), packed
            )
            if x.device.type == "cpu" and self.keep_weight:
                return None
        if self._passed_over:  # setting a module's attribute is slow
            self._passed_over = 0
        return self._further_prepared(kept, x)

    def _further_prepared(self, kept: Prepared, x: Tensor) -> Prepared:
        """Take the next step of preparing, if there is one, and keep what comes of it."""
        weight = kept.weight
        if weight is None or kept.winograd is not None or not kept.is_finite:
            return kept
        if kept.packed is None:
            with torch.inference_mode(False), torch.no_grad():
                packed = pack(weight, self.geometry, x)
            is_enough = not self.keep_weight and packed.shape == weight.shape
            values = (kept.values[0], kept.values[-1]) if is_enough else kept.values
            kept = kept._replace(packed=packed, values=values)
            if is_enough:
                kept = kept._replace(weight=None, held=kept.held[-1:])
        elif self.keep_weight and suits(x, weight, self.geometry):
            kept = kept._replace(winograd=WinogradConv(weight, kept.bias, x))
        else:
            return kept
        self._prepared = kept  # before the weight goes: another thread may look
        remember_holder(self)
        if kept.weight is None:
            self._parameters.pop("weight", None)
        return kept

    def _weight_and_bias(self) -> tuple[Tensor | None, Tensor]:
        """Return what a call computes with; no weight where it is packed only. The short way: 106 look-ups a pass."""
        weight: Tensor | None = self._parameters.get("weight")
        bias: Tensor | None = self._parameters.get("bias")
        if weight is None or bias is None:
            weight, bias = (None if self._is_packed_only() else self.weight), self.bias
            assert bias is not None
        return weight, bias

    def _is_packed_only(self) -> bool:
        has_weight = "weight" in self._parameters or "weight" in self.__dict__  # the latter stands in for a call
        return not has_weight and self._prepared is not None and self._prepared.weight is None

    def _unpacked(self) -> Tensor:
        assert self._prepared is not None
        return unpack(self._prepared.packed).detach()

    def _forget(self) -> None:
        super()._forget()
        self._prepared = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is prepared, which can be neither copied nor pickled."""
        return {**super().__getstate__(), "_prepared": None, "_passed_over": 0}


def _values(sources: Sequence[Tensor]) -> tuple[object, ...]:
    """Where weight and bias lie and how often they were written, and whose kernels they are for."""
    return torch.backends.mkldnn.enabled, *[(source.data_ptr(), source._version) for source in sources]


def _is_captured(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


turn: Final = threading.RLock()
"""Whose turn it is to drop a plain weight, have it again, or find one of the two."""

_holders: WeakSet[Any] = WeakSet()
"""The layers that have ever prepared something: for ``prepared_bytes`` alone."""


def remember_holder(layer: MayDropWeight) -> None:
    """Count what ``layer`` prepares among ``prepared_bytes``."""
    _holders.add(layer)


def prepared_bytes() -> int:
    """Return the bytes that inference copies keep beside their parameters, in the whole process."""
    return sum(conv.prepared_bytes() for conv in list(_holders))


class QuickLinear(Follows, nn.Linear):
    """A linear layer for inference, which runs by oneDNN where that is the quicker library.

    ``optimize_for_inference`` makes every ``nn.Linear`` one.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        weight, bias = self.weight, self.bias
        if is_traced(x) or not HAS_LINEAR or not is_plain(weight) or (bias is not None and not is_plain(bias)):
            return F.linear(x, weight, bias)
        is_float = x.dtype == weight.dtype == torch.float32 and has_onednn(x)
        if not is_float or is_autocast(x) or needs_grad(x, weight, bias):
            return F.linear(x, weight, bias)
        return linear(x, weight, bias)
