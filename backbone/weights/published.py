"""Which weights a network's library publishes, and what it states of them."""

from dataclasses import dataclass
from typing import Any, Final

from backbone.registry import BUILT_IN, find_constructor, find_library, origin

IMAGENET: Final = "ImageNet-1K"
_TIMM: Final = "timm/"


@dataclass(frozen=True, slots=True)
class PublishedWeights:
    """One set of weights that can be downloaded.

    Attributes:
        name: As a config's ``weights`` takes it.
        accuracy: Top-1 on ImageNet-1K in percent, as the library itself states it; None where it states none.
        megabytes: Size of the file in units of 10^6 bytes, as stated; None where it is not.
        licence: As stated; None where it is not, as of all of torchvision's.
        url: Where they come from: an address, or ``hf://org/repo``; None where it is not stated.
    """

    name: str
    accuracy: float | None = None
    megabytes: float | None = None
    licence: str | None = None
    url: str | None = None


def list_weights(name: str) -> tuple[PublishedWeights, ...]:
    """Return what can be downloaded for the backbone ``name``, its library's own choice first.

    Args:
        name: Registered name, such as ``resnet50`` or ``timm/convnext_tiny``.

    Returns:
        Empty where nobody publishes weights: for plugins, and for networks that their library has no weights of.

    Raises:
        UnknownBackboneError: If nothing is registered under the name.
        ImportError: If its library is not installed.
    """
    find_constructor(name)
    if name.startswith(_TIMM) and find_library(name) is not None:
        return _of_timm(name.removeprefix(_TIMM))
    return _of_torchvision(name) if origin(name) == BUILT_IN else ()


def _of_timm(model: str) -> tuple[PublishedWeights, ...]:
    """Timm's results and file sizes are in its repository and not in its package."""
    from timm.models import get_arch_pretrained_cfgs, split_model_name_tag

    configs = get_arch_pretrained_cfgs(split_model_name_tag(model)[0])
    published = []
    for name, config in configs.items():
        if config.has_weights:
            url = (
                f"hf://{config.hf_hub_id}"
                if config.hf_hub_id
                else (config.url if isinstance(config.url, str) else None)
            )
            tag = split_model_name_tag(name)[1] or "default"
            published.append(PublishedWeights(tag, licence=config.license or None, url=url))
    return tuple(published)


def _of_torchvision(name: str) -> tuple[PublishedWeights, ...]:
    from torchvision.models import get_model_weights

    try:
        weights: Any = get_model_weights(name)
    except ValueError:
        return ()
    members = sorted(weights, key=lambda each: each != weights.DEFAULT)
    return tuple(
        PublishedWeights(each.name, _accuracy(each), megabytes=each.meta.get("_file_size"), url=each.url)
        for each in members
    )


def _accuracy(weights: Any) -> float | None:  # noqa: ANN401 - torchvision has no type for it
    stated = weights.meta.get("_metrics", {}).get(IMAGENET, {}).get("acc@1")
    return None if stated is None else float(stated)
