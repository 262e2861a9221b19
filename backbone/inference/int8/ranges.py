"""Which numbers a layer's output takes, and the 8-bit codes that write them best."""

import math
from typing import Final

import torch
from torch import Tensor

from backbone.engine.int8 import HIGHEST, Codes

_BINS: Final = 2048  # on each side of zero
_SAMPLE: Final = 2**16  # numbers of one tensor that are counted; its ends are always seen
_NUM_CUTS: Final = 65
_POWER: Final = 3  # of an error: squares cut the few largest numbers further, and lose twice as much of them
_SMALLEST_CUT: Final = 0.2  # of the range seen


class Histogram:
    """Counts what is seen, in bins that double their width when a larger number comes.

    Attributes:
        low: Smallest number.
        high: Largest number.
    """

    def __init__(self) -> None:
        self.low, self.high = math.inf, -math.inf
        self._top = 0.0  # the bins reach from -top to top
        self._counts = torch.zeros(2 * _BINS, dtype=torch.float64, device="cpu")

    def add(self, values: Tensor) -> bool:
        """Count ``values``, of any shape; return False, and count nothing, where some are not finite."""
        low, high = (float(each) for each in torch.aminmax(values))
        if not (math.isfinite(low) and math.isfinite(high)):
            return False
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._reach(max(-low, high))
        if self._top:
            parts = (_sample(values).double() / self._top).cpu()  # in units of the top: no float is too large
            self._counts += torch.histc(parts, 2 * _BINS, -1, 1)
        return True

    def codes(self) -> Codes:
        """Return the codes of least cubed error: far numbers may be cut off for finer steps near zero.

        Where no number is negative, zero has the lowest code. Constant values are written exactly, or nearly so.
        """
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        if not high > low:  # nothing but zeros was seen, or nothing at all
            return Codes(1.0, 0)
        if not self._counts.sum():
            return _codes(low, high)
        width = self._top / _BINS
        centres = (torch.arange(2 * _BINS, dtype=torch.float64, device="cpu") - _BINS + 0.5) * width
        taken = self._counts > 0
        centres, counts = centres[taken].clamp(low, high), self._counts[taken]
        cuts = [
            _codes(low * cut, high * cut) for cut in torch.linspace(1, _SMALLEST_CUT, _NUM_CUTS, device="cpu").tolist()
        ]
        return min(cuts, key=lambda codes: float((counts * _rounding_errors(centres, codes).abs() ** _POWER).sum()))

    def _reach(self, peak: float) -> None:
        """Widen the bins, two becoming one, until ``peak`` is among them."""
        if peak > 0 and not self._top:
            self._top = 2.0 ** math.ceil(math.log2(peak))
        while peak > self._top > 0:
            inner = self._counts.view(-1, 2).sum(1)
            self._counts = torch.zeros_like(self._counts)
            self._counts[_BINS // 2 : _BINS // 2 + _BINS] = inner
            self._top *= 2


def _codes(low: float, high: float) -> Codes:
    """Return the codes whose ends are ``low``, not above zero, and ``high``, not below it."""
    scale = max((high - low) / HIGHEST, torch.finfo(torch.float32).tiny)
    return Codes(scale, min(HIGHEST, round(-low / scale)))


def _rounding_errors(values: Tensor, codes: Codes) -> Tensor:
    written = (values / codes.scale + codes.zero_point).round_().clamp_(0, HIGHEST)
    return (written - codes.zero_point) * codes.scale - values


def _sample(values: Tensor) -> Tensor:
    """Return every n-th number of ``values``, all channels in turn."""
    if values.ndim == 4 and values.is_contiguous(memory_format=torch.channels_last):  # noqa: PLR2004
        values = values.permute(0, 2, 3, 1)
    step = max(1, values.numel() // _SAMPLE) | 1  # odd: no common factor with a power of two
    return values.reshape(-1)[::step]
