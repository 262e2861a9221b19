"""timm: the plain ResNets, ResNeXts and Wide ResNets have torchvision's names; their wrappers are its own."""

from typing import Any, Final

import torch

from backbone.features import Preprocessing
from backbone.providers.hub import require_reachable
from backbone.weights.formats.torchvision import NAMES
from backbone.weights.metadata import Metadata
from backbone.weights.reading import Checkpoint
from backbone.weights.schemes import Format, State

PREFIX: Final = "timm/"


def _sign(checkpoint: Checkpoint, prefix: str) -> str | None:
    if prefix.startswith("state_dict_ema."):
        return "its training checkpoint's state_dict_ema"
    return "its training checkpoint's arch and version" if named_architecture(checkpoint) else None


def _metadata(checkpoint: Checkpoint, state: State) -> Metadata:
    return Metadata("timm's convention", preprocessing=Preprocessing(), stride_in_1x1=False)


TIMM: Final = Format("timm", NAMES, _sign, _metadata)


def named_architecture(checkpoint: Checkpoint) -> str | None:
    """Return the architecture that a training checkpoint of timm names, beside the version of its layout."""
    versioned = "version" in checkpoint.notes or "version" in checkpoint.beside
    return checkpoint.notes.get("arch") if versioned else None


def create(name: str, **settings: Any) -> Any:  # noqa: ANN401 - timm types its models as modules only
    """Return timm's network ``name`` on the meta device, which takes no memory.

    Raises:
        ModuleNotFoundError: If timm is not installed.
    """
    try:
        import timm
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"the parts of {name} are known by timm: pip install 'backbone[timm]'") from None
    with torch.device("meta"):
        return timm.create_model(name.removeprefix(PREFIX), **settings)


def download(source: str) -> Checkpoint:
    """Return the weights of ``timm/<model>``, fetched by timm's own hub code.

    Raises:
        ImportError: If timm is not installed.
        ValueError: If timm cannot give them; says why.
    """
    try:
        import timm
    except ImportError:
        raise ImportError(f"{source} needs timm; install it with: pip install timm") from None
    published_at = getattr(
        timm.get_pretrained_cfg(source.removeprefix(PREFIX), allow_unregistered=True), "hf_hub_id", None
    )
    if published_at:
        require_reachable(published_at)
    try:
        model = timm.create_model(source.removeprefix(PREFIX), pretrained=True)
    except Exception as error:  # RuntimeError, ValueError, and whatever the hub raises
        raise ValueError(f"{source}: timm gives no such weights: {' '.join(str(error).split())}") from None
    published: Any = model.pretrained_cfg
    mean, std, interpolation = (published[key] for key in ("mean", "std", "interpolation"))
    pixels = Preprocessing(tuple(mean), tuple(std), interpolation=interpolation)
    facts = Metadata(f"timm publishes it as {source}", known=True, preprocessing=pixels, stride_in_1x1=False)
    return Checkpoint(source, model.state_dict(), facts=facts)
