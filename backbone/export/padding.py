"""Padding of sides whose length is open, written so that lengths cancel instead of growing with each layer.

Networks of windows pad a side h by ``(w - h % w) % w``. torch.export cannot see that what comes of it divides by w, and
each layer wraps the expression once more, until these take most of the time. ``(h + w - 1) // w * w - h`` is the same,
and the padded side is ``(h + w - 1) // w * w`` at once. So it is with the ``ceil`` and ``max`` of TensorFlow's padding.
Padding written in another way is traced as it is.
"""

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import SymInt
from torch.overrides import TorchFunctionMode

SamePadding = Callable[[int, int, int, int], int]

_turn: Final = threading.RLock()
_TIMM: Final = "timm.layers.padding"
_TRIED: Final = ((3, 1, 1), (3, 2, 1), (5, 2, 1), (3, 2, 2), (1, 2, 1), (2, 3, 1), (4, 4, 1))
"""Kernels, strides and dilations for which timm's function and ours must agree before ours stands in."""


@contextmanager
def cancelling_sizes() -> Iterator[None]:
    """Let padding be traced with sizes that cancel, one trace at a time; its numbers stay the same."""
    with _turn, PaddingToMultiples():
        module: Any = sys.modules.get(_TIMM)
        theirs: SamePadding | None = getattr(module, "get_same_padding", None)
        if theirs is None or not _agree(theirs):
            yield
            return

        def stand_in(x: int, kernel_size: int, stride: int, dilation: int) -> int:
            return (same_padding if isinstance(x, SymInt) else theirs)(x, kernel_size, stride, dilation)

        module.get_same_padding = stand_in
        try:
            yield
        finally:
            module.get_same_padding = theirs


def _agree(theirs: SamePadding) -> bool:
    """Whether timm's function of this version is the one that ours stands in for."""
    try:
        return all(theirs(side, *window) == same_padding(side, *window) for window in _TRIED for side in range(1, 10))
    except Exception:  # it takes or means something else now: the trace is slow, and right
        return False


def same_padding(side: int, kernel_size: int, stride: int, dilation: int) -> int:
    """Return what TensorFlow adds to ``side`` for an output of ``side / stride``, rounded up."""
    more = (kernel_size - 1) * dilation + 1 - stride
    missing = (side + stride - 1) // stride * stride - side + more
    return missing if more >= 0 else torch.sym_max(missing, 0)  # type: ignore[return-value]


class PaddingToMultiples(TorchFunctionMode):
    """While it is on, ``F.pad`` up to a multiple of a number is traced with sizes that cancel."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        """Rewrite the amounts of that one call."""
        if func is F.pad and len(args) > 1:
            image, pad, *rest = args
            args = (image, cancelling(image.shape, pad), *rest)
        return func(*args, **dict(kwargs or {}))


def cancelling(shape: Sequence[int], pad: Sequence[int]) -> Sequence[int | SymInt]:
    """Return ``pad``, as ``F.pad`` takes it, with what fills a side up to a multiple written so that it cancels."""
    amounts: list[int | SymInt] = list(pad)
    for index, amount in enumerate(amounts):
        if index % 2 and isinstance(amount, SymInt):
            amounts[index] = _filling(shape[-1 - index // 2], amount)
    return amounts


def _filling(side: int, amount: SymInt) -> int | SymInt:
    numbers = {int(atom) for atom in amount.node.expr.atoms() if atom.is_Integer}
    for multiple in sorted(number for number in numbers if number > 1):
        rest = side % multiple
        forms = [(multiple - rest) % multiple, -side % multiple, *([rest] if multiple == 2 else [])]  # noqa: PLR2004
        if any(isinstance(form, SymInt) and form.node.expr == amount.node.expr for form in forms):
            filled = (side + multiple - 1) // multiple * multiple
            torch._check(side <= filled)  # so that cropping to the side gives the side, not a minimum of both
            return filled - side
    return amount
