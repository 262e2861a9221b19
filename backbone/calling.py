"""Compares a torchvision detector with the backbone it calls, when it calls it for the first time.

Such a detector resizes and normalises images itself, and pools boxes from maps of certain names; neither can be seen
from the backbone before. Only the callers' frames tell who calls, and they are looked at until a detector does.
"""

import sys
import warnings
from dataclasses import dataclass
from types import FrameType
from typing import Any, Final

import torch
from torch import nn

from backbone.features import Backbone, Preprocessing, input_channels

_DEPTH: Final = 24  # frames between a detector's forward and the backbone's: hooks and wrappers
_TOLERANCE: Final = 0.01  # of mean and std on a scale of 0 to 1: published ones are rounded


def look_at_detector(extractor: Backbone) -> None:
    """Let the first forward of ``extractor`` that a torchvision detector calls compare the two.

    It raises where the detector would find no map to pool from, and warns where it normalises otherwise than the
    weights expect.
    """
    extractor.register_forward_pre_hook(_FirstCall())


@dataclass(frozen=True, slots=True, eq=False)
class _FirstCall:
    """A hook before the forward of a feature extractor; it goes with the first call by a detector."""

    def __call__(self, extractor: nn.Module, _inputs: object) -> None:
        if not isinstance(extractor, Backbone) or torch.compiler.is_compiling():
            return
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return
        detector = _caller(sys._getframe(1))
        if detector is None:
            return
        _require_pooled_names(detector, extractor)
        for key, hook in list(extractor._forward_pre_hooks.items()):
            if isinstance(hook, _FirstCall):
                extractor._forward_pre_hooks.pop(key, None)
        _warn_of_contradiction(detector, extractor)


def _caller(frame: FrameType | None) -> Any | None:  # noqa: ANN401 - torchvision has no types
    """Return the torchvision detector in whose forward this is; None where there is none."""
    for _ in range(_DEPTH):
        if frame is None:
            return None
        owner = frame.f_locals.get("self") if frame.f_code.co_name == "forward" else None
        if isinstance(owner, nn.Module) and hasattr(getattr(owner, "transform", None), "image_mean"):
            return owner
        frame = frame.f_back
    return None


def _require_pooled_names(detector: Any, extractor: Backbone) -> None:  # noqa: ANN401
    pool = getattr(getattr(detector, "roi_heads", None), "box_roi_pool", None)
    wanted = getattr(pool, "featmap_names", None)
    if wanted is not None and not set(wanted) & extractor.feature_specs.keys():
        kind = type(detector).__name__
        raise ValueError(
            f"{kind} pools boxes from maps named {', '.join(wanted)}, got {', '.join(extractor.feature_specs)}; build "
            f"it as {kind}(as_torchvision(pyramid), ...), from backbone.hosts.torchvision"
        )


def _warn_of_contradiction(detector: Any, extractor: Backbone) -> None:  # noqa: ANN401
    known, transform = extractor.known_preprocessing, detector.transform
    if known is None or getattr(transform, "follows_backbone", False):
        return
    mean, std = known.unit_statistics(input_channels(extractor))
    turned = known.turns_to_bgr(len(mean))
    if turned or not (_close(transform.image_mean, mean) and _close(transform.image_std, std)):
        warnings.warn(
            f"{type(detector).__name__} prepares images as RGB, mean {_listed(transform.image_mean)}, std "
            f"{_listed(transform.image_std)}, but the backbone's weights expect {_order(known)}, mean {_listed(mean)}, "
            f"std {_listed(std)}; set detector.transform = torchvision_transform(model), from "
            f"backbone.hosts.torchvision",
            stacklevel=2,
        )


def _order(expected: Preprocessing) -> str:
    return expected.channel_order.upper()


def _close(given: Any, wanted: tuple[float, ...]) -> bool:  # noqa: ANN401
    return len(given) == len(wanted) and all(abs(a - b) < _TOLERANCE for a, b in zip(given, wanted, strict=True))


def _listed(values: Any) -> str:  # noqa: ANN401
    return f"({', '.join(f'{float(value):.3g}' for value in values)})"
