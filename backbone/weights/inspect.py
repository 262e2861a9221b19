"""What a checkpoint is, before anything is loaded."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

import torch
from torch import Tensor

from backbone.weights.fit import folded_biases, unsound
from backbone.weights.formats.caffe2 import carries_folded_norms
from backbone.weights.formats.efficientnet_pytorch import TIMM_EFFICIENTNET, beginning_of, variant
from backbone.weights.formats.timm import PREFIX
from backbone.weights.formats.timm_networks import RECIPE_NAME, conventions, named_in, networks, prefix_of
from backbone.weights.reading import Checkpoint
from backbone.weights.recognise import Recognised, describe_network, recognise, resnet_name
from backbone.weights.report import listed
from backbone.weights.schemes import State
from backbone.weights.sources import open_source

FOLDABLE: Final = r"(^|\.)(conv[0-9]|conv_(stem|pw|dw|pwl|exp)|downsample\.0)\.bias$"
"""Convolutions that have no bias in ResNets and EfficientNets, for a norm follows."""


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
        numbers: Sentences on numbers that no trained network has.
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
    numbers: list[str] = field(default_factory=list)


def inspect_weights(source: str | os.PathLike[str]) -> Inspection:
    """Return what the checkpoint is, as far as it shows.

    Raises:
        FileNotFoundError: If the path does not exist.
        ValueError: If it cannot be read safely. A file that holds no known network is described all the same.
    """
    checkpoint = open_source(source)
    broken = unsound(checkpoint.tensors)
    numbers = [f"wrong: {listed('not finite, or a negative variance', broken)}"] if broken else []
    found: Recognised | None = None
    why = ""
    try:
        found = recognise(checkpoint)
    except ValueError as error:
        why = str(error).removeprefix(f"{checkpoint.source}: ")
    if found is None or found.format is TIMM_EFFICIENTNET or (found.unexplained and not resnet_name(found.state)):
        timms = _of_timm(checkpoint, found)
        if timms is not None:
            return replace(timms, numbers=numbers)
    if found is None:
        unknown = Inspection(checkpoint.source, "unknown", why, "unknown", "", [], [], {}, [], checkpoint.tensors)
        return replace(unknown, numbers=numbers)
    network = describe_network(found.state)
    if len(found.unexplained) > len(found.state):
        why = f"{found.why}, but {len(found.unexplained)} of {len(found.unexplained) + len(found.state)} are others"
        nothing = Inspection(checkpoint.source, "unknown", why, "unknown", "", [], [], {}, [], checkpoint.tensors)
        return replace(nothing, unexplained=found.unexplained, numbers=numbers)
    return Inspection(
        source=checkpoint.source,
        format=found.format.name if found.format else "unknown",
        why=found.why,
        network=found.metadata.network or checkpoint.notes.get(RECIPE_NAME) or network,
        prefix=found.prefix,
        training=found.metadata.lines(),
        norms=_norm_statistics(found.state) + _folded({**found.state, **_unexplained(found, checkpoint)}),
        dropped={reason: len(keys) for reason, keys in found.dropped.items()},
        unexplained=found.unexplained,
        tensors=checkpoint.tensors,
        numbers=numbers,
    )


def _of_timm(checkpoint: Checkpoint, found: Recognised | None) -> Inspection | None:
    """Describe one of timm's networks that is no plain ResNet; None if it is none, or timm is absent."""
    facts = checkpoint.facts
    name, why = facts.network if facts else None, "its own metadata"
    if name is None:
        name, why = named_in(checkpoint), "the architecture it names"
    names = [name] if name is not None and name.startswith(PREFIX) else []
    if not names and found is not None and (kind := variant(found.state) or beginning_of(found.state)):
        names = [f"{PREFIX}{family}_{kind}" for family in ("tf_efficientnet", "efficientnet")]
    if not names:
        names = networks(checkpoint.tensors)
    if not names:
        return None
    if name is None:
        why = "timm's names and shapes" + (", which these networks share" if len(names) > 1 else "")
    prefix = found.prefix if found and found.format is TIMM_EFFICIENTNET else prefix_of(checkpoint.tensors)
    inside = {key.removeprefix(prefix): v for key, v in checkpoint.tensors.items() if key.startswith(prefix)}
    beside = len(checkpoint.tensors) - len(inside) + len(checkpoint.beside)
    told = [] if RECIPE_NAME in checkpoint.notes else conventions(names)  # our own runs choose their pixels
    if facts:
        told = [replace(facts, stride_in_1x1=None, dilate_first_block=None)]
    return Inspection(
        source=checkpoint.source,
        format="timm",
        why=why,
        network=" or ".join(names),
        prefix=prefix,
        training=[line for each in told for line in each.lines()],
        norms=_norm_statistics(inside) + _folded(inside),
        dropped={"beside the network": beside} if beside else {},
        unexplained=[],
        tensors=checkpoint.tensors,
    )


def _unexplained(found: Recognised, checkpoint: Checkpoint) -> State:
    return {key.removeprefix(found.prefix): checkpoint.tensors[key] for key in found.unexplained}


def _folded(state: State) -> list[str]:
    """Say of a state dict with biases in convolutions before norms, or in place of them, where it comes from."""
    biases = folded_biases((key for key in state if re.search(FOLDABLE, key)), state)
    if not biases:
        return []
    return [
        f"folded into the biases of {len(biases)} convolutions, as in an inference copy of optimize_for_inference; "
        f"load_weights takes the network's own state_dict() only"
    ]


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
