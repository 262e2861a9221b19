"""Checkpoints into a backbone: strict, safe, explained, and all or nothing."""

import os
import pickle
import re
from collections.abc import Mapping
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
        OSError: If the download fails.
        ValueError: If the source is neither, the file is damaged or carries code, or keys or shapes differ.
    """
    if Path(source).suffix in CHECKPOINT_SUFFIXES:
        state, preprocessing = _read_file(Path(source)), Preprocessing()
    else:
        state, preprocessing = backbone.named_weights(str(source)) or _download(name, str(source))
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
    cached = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    try:
        # weights_only: hub would run what a pickle carries, and it checks the hash of a new download only
        state = weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except Exception as error:
        if cached.exists():
            raise _unreadable(error, f"{weights_name} of {name}, {cached}", "delete it and try again") from None
        kind = OSError if isinstance(error, OSError) else ValueError  # hub keeps no file of a wrong hash
        raise kind(
            f"{weights_name} of {name}: cannot be downloaded from {weights.url}; check the connection or give the path "
            f"of a copy. ({_first_line(error)})"
        ) from None
    return _bare_state_dict(state, str(cached)), preprocessing


def _read_file(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"weights must be an existing file, got {str(path)!r}; check the path")
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:  # mmap: its pages are read as they are copied, so that loading needs the model's own memory and no more
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except Exception as error:  # damaged bytes fail in many ways: struct.error, AssertionError, AttributeError, ...
        remedy = "fetch it again, or save it with torch.save(model.state_dict(), path)"
        raise _unreadable(error, str(path), remedy) from None
    return _bare_state_dict(state, str(path))


def _unreadable(error: Exception, source: str, remedy: str) -> ValueError:
    """Explain why a checkpoint could not be read."""
    if not isinstance(error, pickle.UnpicklingError):
        return ValueError(
            f"{source}: cannot be read as a checkpoint, it may be truncated; {remedy}. ({_first_line(error)})"
        )
    found = re.search(r"GLOBAL (\S+)", str(error))  # the rest of torch's message advises to run the code
    example = f", such as {found[1]}" if found else ""
    return ValueError(
        f"{source}: not a plain checkpoint of tensors; it was refused without running anything it carries{example}; "
        f"{remedy}"
    )


def _bare_state_dict(state: object, source: str) -> Mapping[str, Tensor]:
    """Return ``state``, which must map parameter names to tensors and hold nothing else."""
    if isinstance(state, Mapping) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        return state
    raise ValueError(
        f"{source}: must hold a bare state dict (parameter name -> tensor), got {_describe(state)}; "
        f"save the network's own state_dict()"
    )


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
    empty = [key for key, value in given.items() if value.is_meta]
    if missing or unexpected or reshaped or empty:
        raise ValueError(
            f"{source}: does not fit this network: {_listed('missing', missing)}; {_listed('unexpected', unexpected)}; "
            f"{_listed('of another shape', reshaped)}; {_listed('without data (meta tensors)', empty)}. "
            f"Choose the name, in_channels and num_classes it was made for"
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
