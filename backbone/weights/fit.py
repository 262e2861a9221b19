"""Whether translated weights are a network's: every key, every shape, and numbers that training can give."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from backbone.weights.recognise import network_name
from backbone.weights.report import listed


def require_fit(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], unexplained: Sequence[str], source: str
) -> None:
    """Hold a translated state dict against a network's.

    Raises:
        ValueError: If a key is missing, too many or of another shape, or its numbers cannot be a network's.
    """
    # Frozen norms of other libraries do not count batches; neither did BatchNorm2d before torch 0.4.1.
    missing = [key for key in own if key not in state and not key.endswith(".num_batches_tracked")]
    unexpected = [*unexplained, *(key for key in state if key not in own)]
    common = [key for key in own if key in state]
    reshaped = [
        f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
        for key in common
        if state[key].shape != own[key].shape
    ]
    empty = [key for key in common if state[key].is_meta]
    folded = folded_biases(unexpected, own)
    if folded:
        raise ValueError(
            f"{source}: weights must be a network's own, got an inference copy's: its norms were folded into the "
            f"biases of {len(folded)} convolutions ({folded[0]}, ...), which cannot be undone; save the state_dict() "
            f"of the network before optimize_for_inference"
        )
    if missing or unexpected or reshaped or empty:
        name = network_name(state)
        raise ValueError(
            f"{source}: does not fit this network: {listed('missing', missing)}; {listed('unexpected', unexpected)}; "
            f"{listed('of another shape', reshaped)}; {listed('without data (meta tensors)', empty)}. "
            f"Choose the name, in_channels and num_classes it was made for{f' ({name})' if name else ''}"
        )
    wrong_kind = [key for key in common if state[key].is_floating_point() != own[key].is_floating_point()]
    broken = [key for key in common if key not in wrong_kind and not _is_sound(key, state[key])]
    if wrong_kind or broken:
        raise ValueError(
            f"{source}: holds numbers that no trained network has: "
            f"{listed('not finite, or a negative variance', broken)}; "
            f"{listed('integers for fractions or the reverse', wrong_kind)}; fetch or train it again"
        )


def folded_biases(keys: Iterable[str], tensors: Mapping[str, Tensor]) -> list[str]:
    """Return those of ``keys`` that are biases of the convolutions in ``tensors``, where no network here has any."""
    weights = {key: tensors.get(f"{key.removesuffix('.bias')}.weight") for key in keys if key.endswith(".bias")}
    return [key for key, weight in weights.items() if weight is not None and weight.ndim == 4]  # noqa: PLR2004


def unsound(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the keys whose numbers no trained network has: not finite, or a negative variance."""
    return [key for key, value in tensors.items() if not value.is_meta and not _is_sound(key, value)]


def _is_sound(key: str, value: Tensor) -> bool:
    if not value.is_floating_point() or value.numel() == 0:
        return True
    low, high = torch.aminmax(value if value.itemsize > 1 else value.float())  # torch compares no 8-bit fractions
    return bool(torch.isfinite(low) and torch.isfinite(high) and (low >= 0 or not key.endswith("running_var")))
