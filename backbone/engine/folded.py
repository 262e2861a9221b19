"""The layers of an inference copy: their weights in the layout of their kernel, prepared once a shape comes again."""

from collections.abc import Callable
from typing import Any, Final, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone.engine.calls import is_autocast, is_seen_through, needs_grad
from backbone.engine.kernels import Geometry, conv_bias_act, has_onednn, layout_depends_on, pack
from backbone.engine.products import HAS_LINEAR, linear
from backbone.engine.winograd import WinogradConv, suits

_PATIENCE: Final = 8  # calls of smaller shapes in a row
_UNPREPARED: Final = {
    "_prepared_from": None,
    "_prepared_shape": None,
    "_prepared_values": None,
    "_prepared_size": 0,
    "_passed_over": 0,
    "_packed": None,
    "_winograd": None,
}


class FoldedConv2d(nn.Conv2d):
    """A convolution that carries its norm in weight and bias, for inference.

    ``optimize_for_inference`` puts it where a convolution was; the norm after it becomes an Identity.

    Args:
        conv: The convolution to replace.
        weight: Its weight times the norm's scale.
        bias: The norm's shift.
    """

    _prepared_from: tuple[Tensor, Tensor] | None
    _prepared_shape: object
    _prepared_values: object
    _prepared_size: int
    _passed_over: int
    _packed: Tensor | None
    _winograd: WinogradConv | None

    def __init__(self, conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
        super().__init__(conv.in_channels, conv.out_channels, 1, groups=conv.groups, device="meta")
        self.kernel_size, self.padding_mode = conv.kernel_size, conv.padding_mode
        self.geometry = Geometry.of(conv)
        self.stride, self.padding, self.dilation, _ = self.geometry
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = nn.Parameter(bias.detach(), requires_grad=False)
        self._forget()

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, C_in, H, W) -> (N, C_out, H_out, W_out)."""
        return self.fused(x)

    def fused(
        self, x: Tensor, residual: Tensor | None = None, *, relu: bool = False, reuse_residual: bool = False
    ) -> Tensor:
        """Return ``relu(conv(x) + bias + residual)`` in the dtype of the weight; arguments as ``conv_norm_act``."""
        weight: Tensor | None = self._parameters.get("weight")  # 106 look-ups a pass: the short way
        bias: Tensor | None = self._parameters.get("bias")
        if weight is None or bias is None:  # the long one in DataParallel's replicas, or after pruning
            weight, bias = self.weight, self.bias
            assert bias is not None
        if (weight.requires_grad or bias.requires_grad) and not torch.compiler.is_compiling():
            self._forget()  # an optimizer's fused step moves no version counter
        autocasts = is_autocast(x) and torch.get_autocast_dtype(x.device.type) != weight.dtype
        if not autocasts and x.dtype != weight.dtype:
            x = x.to(weight.dtype)
        if autocasts or x.ndim != 4 or is_seen_through(x) or needs_grad(x, weight, bias, residual):  # noqa: PLR2004
            out = F.conv2d(x, weight, bias, *self.geometry)
            out = out if residual is None else out + residual
            return F.relu(out) if relu else out
        # read once: another thread may prepare for another shape meanwhile
        packed, winograd = (self._packed, self._winograd) if self._prepare_for(x, weight, bias) else (None, None)
        if winograd is not None and residual is None:
            return winograd(x, relu=relu)
        best = weight if packed is None else packed
        return conv_bias_act(x, best, bias, self.geometry, residual, relu=relu, reuse_residual=reuse_residual)

    def _prepare_for(self, x: Tensor, weight: Tensor, bias: Tensor) -> bool:
        """Pack the weight once a shape comes twice, consider Winograd when it comes again; return whether it came.

        Both pay only where shapes repeat; a detector whose images all differ runs on the plain weight. A smaller shape
        takes over only after some calls in a row: a head that all levels of a pyramid share is prepared for the finest.
        """
        if weight.requires_grad or bias.requires_grad or weight.is_inference() or bias.is_inference():
            return False  # these may change unseen
        shape = layout_depends_on(x)
        values = (torch.backends.mkldnn.enabled, *[(of.data_ptr(), of._version) for of in (weight, bias)])
        source = self._prepared_from
        are_others = source is None or source[0] is not weight or source[1] is not bias
        is_new = are_others or self._prepared_shape != shape or self._prepared_values != values
        if (is_new or self._packed is None) and x.is_cuda and torch.cuda.is_current_stream_capturing():
            return False  # the graph's replays would pack, but calls outside of it use what is packed
        if is_new:
            self._passed_over += 1
            is_smaller = x.numel() < self._prepared_size and self._prepared_values == values and not are_others
            if is_smaller and self._passed_over <= _PATIENCE:
                return False
            self._forget()
            self._prepared_shape, self._prepared_values, self._prepared_size = shape, values, x.numel()
            self._prepared_from = weight, bias  # held, so that no other tensor can take their place in memory
            if x.device.type == "cpu":
                return False
        if self._passed_over:  # setting a module's attribute is slow
            self._passed_over = 0
        if self._packed is None:
            with torch.inference_mode(False), torch.no_grad():
                self._packed = pack(weight, self.geometry, x)
        elif self._winograd is None and suits(x, weight, self.geometry):
            self._winograd = WinogradConv(weight, bias, x)
        return True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._forget()
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)

    def _forget(self) -> None:
        self.__dict__.update(_UNPREPARED)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, **_UNPREPARED}  # what is prepared can be neither copied nor pickled


class QuickLinear(nn.Linear):
    """A linear layer for inference, which runs by oneDNN where that is the quicker library.

    ``optimize_for_inference`` makes every ``nn.Linear`` one.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        weight, bias = self.weight, self.bias
        plain = not HAS_LINEAR or x.dtype != torch.float32 or weight.dtype != torch.float32 or not has_onednn(x)
        plain = plain or x.layout is not torch.strided or x.is_nested
        if plain or is_autocast(x) or is_seen_through(x) or needs_grad(x, weight, bias):
            return F.linear(x, weight, bias)
        return linear(x, weight, bias)
