"""Which weights a network's library publishes, and how accurate it states they are on ImageNet."""

from dataclasses import dataclass
from typing import Any, Final

from backbone.registry import find_library

IMAGENET: Final = "ImageNet-1K"
_TIMM: Final = "timm/"


@dataclass(frozen=True, slots=True)
class PublishedWeights:
    """One set of weights.

    Attributes:
        name: As a config's ``weights`` takes it.
        accuracy: Top-1 on ImageNet-1K in percent, as the library itself states it; None where it states none.
    """

    name: str
    accuracy: float | None = None


def published_weights(name: str) -> tuple[PublishedWeights, ...]:
    """Return what the library of the backbone ``name`` publishes, its own choice first; empty where it is nothing."""
    if name.startswith(_TIMM) and find_library(name) is not None:
        return _of_timm(name.removeprefix(_TIMM))
    return _of_torchvision(name)


def _of_timm(model: str) -> tuple[PublishedWeights, ...]:
    """Timm's results are in its repository and not in its package: no accuracy."""
    from timm.models import get_arch_pretrained_cfgs, split_model_name_tag

    configs = get_arch_pretrained_cfgs(split_model_name_tag(model)[0])
    tags = [split_model_name_tag(name)[1] for name, config in configs.items() if config.has_weights]
    return tuple(PublishedWeights(tag or "default") for tag in tags)


def _of_torchvision(name: str) -> tuple[PublishedWeights, ...]:
    from torchvision.models import get_model_weights

    try:
        weights: Any = get_model_weights(name)
    except ValueError:
        return ()
    members = sorted(weights, key=lambda each: each != weights.DEFAULT)
    return tuple(PublishedWeights(each.name, _accuracy(each)) for each in members)


def _accuracy(weights: Any) -> float | None:  # noqa: ANN401 - torchvision has no type for it
    stated = weights.meta.get("_metrics", {}).get(IMAGENET, {}).get("acc@1")
    return None if stated is None else float(stated)
