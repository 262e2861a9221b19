"""Results computed from constants and kept until one of the constants changes.

A folded weight costs a pass over the weight; making it once is worth little if it can ever be out of date. A result is
used again only if every tensor it came from is the same object, at the same address, with the same version counter,
in the same generation of its norm, and (on the CPU, where a look costs nothing) with the same sampled values.
"""

from collections.abc import Callable
from typing import Final, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from backbone.norm import FrozenBatchNorm2d

_SAMPLES: Final = 64


class _Kept(NamedTuple):
    """Something computed from constants, with all that it depends on, to be compared before it is used again."""

    sources: tuple[Tensor, ...]
    state: tuple[object, ...]
    samples: tuple[Tensor, ...]
    result: tuple[Tensor, Tensor]


Key = tuple[str, torch.dtype]
# Not kept in the modules themselves: a copy, a pickle or a replica starts afresh.
_kept: WeakKeyDictionary[FrozenBatchNorm2d, dict[Key, _Kept]] = WeakKeyDictionary()


def unless_changed(
    key: Key,
    norm: FrozenBatchNorm2d,
    sources: tuple[Tensor, ...],
    compute: Callable[[], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """Compute from ``sources``, and return the same result for as long as none of them has changed."""
    device = sources[0].device
    if any(source.is_inference() for source in sources) or (
        device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    ):
        return compute()  # inference tensors have no version to compare; a graph must compute on every replay
    state = (
        norm.generation, norm.eps, device, torch.backends.mkldnn.enabled,
        *(source._version for source in sources), *(source.data_ptr() for source in sources),
    )  # fmt: skip
    samples = tuple(map(_sample, sources)) if device.type == "cpu" else ()
    entries = _kept.setdefault(norm, {})
    kept = entries.get(key)
    if (
        kept is None
        or kept.state != state
        or any(old is not new for old, new in zip(kept.sources, sources, strict=True))
        or not all(map(torch.equal, kept.samples, samples))
    ):
        with torch.inference_mode(False), torch.no_grad():  # inference tensors could not be used outside
            kept = _Kept(sources, state, tuple(sample.clone() for sample in samples), compute())
        entries[key] = kept
    return kept.result


def _sample(tensor: Tensor) -> Tensor:
    """Values spread over ``tensor``: an edit through ``.data`` changes them, though it moves no version counter."""
    size = tensor.numel()
    return tensor.detach().as_strided((min(size, _SAMPLES),), (max(1, size // _SAMPLES),))
