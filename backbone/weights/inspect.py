"""What a checkpoint is, before anything is loaded."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from backbone.weights.formats.caffe2 import carries_folded_norms
from backbone.weights.recognise import describe_network, recognise
from backbone.weights.schemes import State
from backbone.weights.sources import open_source


@dataclass(frozen=True)
class Inspection:
    """A checkpoint's description.

    Attributes:
        source: Where it was read from.
        format: The library whose names it has, or ``unknown``.
        why: By what that was recognised, or why it was not.
        network: Registered name of the network, or what else it is.
        prefix: What stands before the network's names.
        training: What is known or assumed of the training: stride placement, images, eps, dilation.
        norms: Sentences on the norms' statistics.
        dropped: Number of keys that are no part of the network, by reason.
        unexplained: Keys that nothing explains; ``load_weights`` would refuse the file for them.
        tensors: All tensors of the file by their own names.
    """

    source: str
    format: str
    why: str
    network: str
    prefix: str
    training: list[str]
    norms: list[str]
    dropped: dict[str, int]
    unexplained: list[str]
    tensors: Mapping[str, Tensor]


def inspect_weights(source: str | os.PathLike[str]) -> Inspection:
    """Return what the checkpoint is, as far as it shows.

    Raises:
        FileNotFoundError: If the path does not exist.
        ValueError: If it cannot be read safely. A file that holds no known network is described all the same.
    """
    checkpoint = open_source(source)
    try:
        found = recognise(checkpoint)
    except ValueError as error:
        why = str(error).removeprefix(f"{checkpoint.source}: ")
        return Inspection(checkpoint.source, "unknown", why, "unknown", "", [], [], {}, [], checkpoint.tensors)
    return Inspection(
        source=checkpoint.source,
        format=found.format.name if found.format else "unknown",
        why=found.why,
        network=describe_network(found.state),
        prefix=found.prefix,
        training=found.metadata.lines(),
        norms=_norm_statistics(found.state),
        dropped={reason: len(keys) for reason, keys in found.dropped.items()},
        unexplained=found.unexplained,
        tensors=checkpoint.tensors,
    )


def _norm_statistics(state: State) -> list[str]:
    """Return the ranges of the running statistics, and what is wrong or telling about them."""
    means, variances = (
        torch.cat([torch.zeros(0), *(v.flatten().float() for k, v in state.items() if k.endswith(ending))])
        for ending in ("running_mean", "running_var")
    )
    if not len(means) or not len(variances):
        return ["none"]
    lines = [
        f"{title} from {values.min():.4g} to {values.max():.4g}"
        for title, values in (("means", means), ("variances", variances))
    ]
    if carries_folded_norms(state):
        lines.append("folded into scale and bias, or never trained")
    if not (means.isfinite().all() and variances.isfinite().all()):
        lines.append("wrong: not all of them finite")
    if (variances < 0).any():
        lines.append(f"wrong: {int((variances < 0).sum())} variances below 0")
    return lines
