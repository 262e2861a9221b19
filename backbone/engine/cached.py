"""Results computed from constants and kept until one of the constants changes.

A folded weight costs a pass over the weight; making it once is worth little if it can ever be out of date. A result is
used again only if every tensor it came from is the same object, at the same address, with the same version counter.
On the CPU the values must be the same, too: of a norm all, of a weight 64. On CUDA, where a look would wait for the
device and a fused optimizer moves no version counter, nothing that trains is kept.

Results lie with their norm, in ``FrozenBatchNorm2d.derived``: one immutable record a purpose, replaced at once. The
norm drops them in ``train()``, ``eval()``, ``to()``, loading, freezing and thawing; the engine drops the folded weight
of a layer that it finds in training. A frozen ResNet-50 keeps 89 MiB of them in float32, about once its convolutions.

One edit goes unseen: a few values of a weight changed through ``.data``, or any number of a frozen weight on CUDA.
Write under ``torch.no_grad()`` instead, or call ``train()`` and ``eval()`` after it. And on CUDA a result is made on
the stream of the call that needs it first: let that one finish before calls on other streams.
"""

import functools
import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Final, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor

from backbone.norm import FrozenBatchNorm2d

_SAMPLES: Final = 64


class _Record(NamedTuple):
    """A result with all that it depends on, to be compared before it is used again."""

    sources: tuple[Tensor, ...]
    state: tuple[object, ...]
    samples: tuple[Tensor, ...]
    result: tuple[Tensor, ...]


_holders: WeakSet[FrozenBatchNorm2d] = WeakSet()
"""The norms that have ever kept something: for ``cached_bytes`` alone."""


def drop(norm: FrozenBatchNorm2d, purpose: str) -> None:
    """Drop what is kept with ``norm`` for ``purpose``."""
    norm.derived.pop(purpose, None)


def cached_bytes() -> int:
    """Return the bytes of all results that are kept with norms, in the whole process."""
    records = [record for norm in list(_holders) for record in list(getattr(norm, "derived", {}).values())]
    return sum(tensor.nbytes for record in records if isinstance(record, _Record) for tensor in record.result)


def unless_changed(
    norms: Sequence[FrozenBatchNorm2d],
    weights: Sequence[Tensor],
    purpose: str,
    variant: Hashable,
    compute: Callable[[], tuple[Tensor, ...]],
) -> tuple[Tensor, ...]:
    """Return what ``compute`` makes of norms and weights; the same tensors again until one of those has changed.

    Args:
        norms: The norms it depends on; the result lives as long as the first one.
        weights: The weights it depends on.
        purpose: Tells apart results that depend on the same norms; each has one record.
        variant: What else the result depends on, such as a dtype; another one replaces the record.
        compute: Makes the result.
    """
    sources = (*weights, *(constant for norm in norms for constant in norm.constants()))
    device = sources[0].device
    on_cpu = device.type == "cpu"
    if any(map(Tensor.is_inference, sources)):  # these have no version to compare
        return compute()
    if not on_cpu and (any(w.requires_grad for w in weights) or torch.cuda.is_current_stream_capturing()):
        return compute()  # a graph must compute on every replay
    state = (
        variant,
        device,
        torch.backends.mkldnn.enabled,
        *[norm.eps for norm in norms],
        *[(source._version, source.data_ptr()) for source in sources],
    )
    samples = tuple(map(_sample, sources)) if on_cpu else ()
    kept = norms[0].derived.get(purpose)
    if not isinstance(kept, _Record) or not _still_holds(kept, sources, state, samples):
        with torch.inference_mode(False), torch.no_grad():  # inference tensors could not be used outside
            kept = _Record(sources, state, tuple(sample.clone() for sample in samples), compute())
        norms[0].derived[purpose] = kept
        _holders.add(norms[0])
    return kept.result


def _still_holds(
    kept: _Record, sources: tuple[Tensor, ...], state: tuple[object, ...], samples: tuple[Tensor, ...]
) -> bool:
    return (
        kept.state == state
        and all(map(operator.is_, kept.sources, sources))
        and all(map(torch.equal, kept.samples, samples))
    )


def _sample(tensor: Tensor) -> Tensor:
    """Values all over ``tensor``: an edit through ``.data`` changes them, though it moves no version counter."""
    return tensor if tensor.ndim == 1 else torch.take(tensor.detach(), _places(tensor.numel()))


@functools.cache
def _places(size: int) -> Tensor:
    """Random indices of a tensor of ``size`` values."""
    with torch.inference_mode(False):
        return torch.randint(size, (_SAMPLES,), device="cpu", generator=torch.Generator("cpu").manual_seed(size))
