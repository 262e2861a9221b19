"""Checkpoints into a backbone: strict, safe, explained, and all or nothing."""

import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from backbone.features import Backbone, Preprocessing

CHECKPOINT_SUFFIXES: Final = (".pth", ".pt", ".safetensors")
_SHOWN_KEYS = 8


def load_weights(backbone: Backbone, source: str | os.PathLike[str], *, name: str) -> None:
    """Load weights with torchvision's parameter names into ``backbone``, and note the preprocessing they expect.

    Every parameter and buffer must be there with its shape, and nothing else may be, the parts that ``backbone``
    left out apart (``unbuilt_prefixes``: ``fc.*`` without a classifier, stages beyond ``out_features``).
    On an error ``backbone`` keeps its old bytes.

    Args:
        backbone: The network to fill.
        source: A torchvision weights name (``IMAGENET1K_V1``, ``IMAGENET1K_V2``), downloaded by torchvision's own
            hub code with its progress bar and hash check, or a path ending in .pth, .pt or .safetensors.
        name: Registered name of the network, under which torchvision knows its weights.

    Raises:
        FileNotFoundError: If the path does not exist.
        ValueError: If the source is neither, the file is damaged or carries code, or keys or shapes differ.
    """
    if Path(source).suffix in CHECKPOINT_SUFFIXES:
        state, preprocessing = _read_checkpoint(Path(source)), Preprocessing()
    else:
        state, preprocessing = _download(name, str(source))
    _load_strictly(backbone, state, str(source))
    backbone.preprocessing = preprocessing


def _download(name: str, weights_name: str) -> tuple[Mapping[str, Tensor], Preprocessing]:
    from torchvision.models import get_model_weights

    try:
        known: Any = get_model_weights(name)
    except ValueError:
        known = {}
    choices = [weights.name for weights in known]
    if weights_name not in choices:
        raise ValueError(
            f"weights of {name} must be one of {', '.join(choices) or 'no torchvision names'} or a path ending in "
            f"{', '.join(CHECKPOINT_SUFFIXES)}, got {weights_name!r}"
        )
    weights = known[weights_name]
    transforms = weights.transforms()
    preprocessing = Preprocessing(mean=tuple(transforms.mean), std=tuple(transforms.std))
    return weights.get_state_dict(progress=True, check_hash=True), preprocessing


def _read_checkpoint(path: Path) -> Mapping[str, Tensor]:
    """Read a bare state dict. A pickle may hold tensors and plain containers only: code in it is never run."""
    if not path.is_file():
        raise FileNotFoundError(f"weights must be an existing file, got {str(path)!r}; check the path")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    # mmap: the file's pages are read as they are copied, so that loading needs the model's own memory and no more
    readers: dict[str, Callable[[], Any]] = {".safetensors": lambda: load_file(path)}
    read = readers.get(path.suffix, lambda: torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path)))
    try:
        state = read()
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: not a plain checkpoint of tensors; it was refused without running anything it carries. Save it "
            f"with torch.save(model.state_dict(), path). ({_first_line(error)})"
        ) from None
    except (RuntimeError, EOFError, OSError, KeyError, IndexError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"{path}: cannot be read as a {path.suffix} checkpoint, it may be truncated; fetch it again. "
            f"({_first_line(error)})"
        ) from None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"{path}: must hold a bare state dict (parameter name -> tensor), got {_describe(state)}; "
            f"save the network's own state_dict()"
        )
    return state


def _is_zip(path: Path) -> bool:
    """Whether the file is in torch.save's format since 1.6; only that one can be memory-mapped."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _load_strictly(backbone: Backbone, state: Mapping[str, Tensor], source: str) -> None:
    own = backbone.state_dict()
    given = {key: value for key, value in state.items() if not key.startswith(backbone.unbuilt_prefixes)}
    # Frozen norms of other libraries do not count batches; neither did BatchNorm2d before torch 0.4.1.
    missing = [key for key in own if key not in given and not key.endswith(".num_batches_tracked")]
    unexpected = [key for key in given if key not in own]
    reshaped = [
        f"{key} {tuple(given[key].shape)} for {tuple(own[key].shape)}"
        for key in own
        if key in given and given[key].shape != own[key].shape
    ]
    if missing or unexpected or reshaped:
        raise ValueError(
            f"{source}: does not fit this network: {_listed('missing', missing)}; {_listed('unexpected', unexpected)}; "
            f"{_listed('of another shape', reshaped)}. Choose the name, in_channels and num_classes it was made for"
        )
    backbone.load_state_dict(given)


def _listed(title: str, keys: list[str]) -> str:
    shown = ", ".join(keys[:_SHOWN_KEYS]) + (", ..." if len(keys) > _SHOWN_KEYS else "")
    return f"{len(keys)} {title}" + (f" ({shown})" if keys else "")


def _describe(state: object) -> str:
    if isinstance(state, Mapping):
        return f"a mapping with keys {', '.join(map(repr, list(state)[:_SHOWN_KEYS]))}"
    return type(state).__name__


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
