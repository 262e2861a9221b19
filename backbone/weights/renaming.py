"""Names that no format here knows: the caller's own function for them, and what is said where they do not fit."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from backbone.features import Backbone, Preprocessing
from backbone.providers.input_channels import adapt_preprocessing, stem_mapping
from backbone.weights.metadata import Metadata
from backbone.weights.reading import Checkpoint
from backbone.weights.recognise import describe_network, recognise
from backbone.weights.report import listed

OWN = "network."
"""What a backbone of another library puts before that library's names."""

_HELD = re.compile(r"((?:(?:state_dict|model|module|_orig_mod|detector|backbone|body|ema)\.)+)network\.")


def renamed(checkpoint: Checkpoint, rename: Callable[[str], str | None] | None) -> Checkpoint:
    """Return the checkpoint with every key as ``rename`` calls it, those without the ones it answers None for.

    Raises:
        TypeError: If it answers anything but a string or None.
        ValueError: If it gives two keys one name, or drops them all.
    """
    if rename is None:
        return checkpoint
    tensors: dict[str, Tensor] = {}
    before: dict[str, str] = {}
    dropped = []
    for key, value in checkpoint.tensors.items():
        name = rename(key)
        if name is None:
            dropped.append(key)
        elif not isinstance(name, str):
            raise TypeError(f"rename must return a string, or None to drop a key, got {name!r} for {key!r}")
        elif name in tensors:
            raise ValueError(
                f"{checkpoint.source}: rename must give each key a name of its own, got {name!r} for {before[name]!r} "
                f"and {key!r}; return None for the one to drop"
            )
        else:
            tensors[name], before[name] = value, key
    if not tensors:
        raise ValueError(f"{checkpoint.source}: rename must keep the network's keys, and it dropped all {len(dropped)}")
    return replace(checkpoint, tensors=tensors, beside=(*checkpoint.beside, *dropped))


def own_prefix(tensors: Mapping[str, Tensor]) -> str:
    """Return what a detector puts before the names of a backbone of ours that holds another library's network.

    "" where there is none: ``detector.backbone.body.`` of ``detector.backbone.body.network.conv_stem.weight``.
    """
    return next((found[1] for key in tensors if (found := _HELD.match(key))), "")


def fitted(facts: Metadata | None, adapted: Preprocessing) -> Metadata | None:
    """Return ``facts`` with the pixels of as many channels as the library adapted the weights to."""
    if facts is None or facts.preprocessing is None or len(facts.preprocessing.mean) == len(adapted.mean):
        return facts
    mapping = stem_mapping(len(facts.preprocessing.mean), len(adapted.mean), None)
    pixels = facts.preprocessing if mapping is None else adapt_preprocessing(facts.preprocessing, mapping)
    return replace(facts, preprocessing=pixels)


def describe_misfit(
    checkpoint: Checkpoint, inside: Mapping[str, Tensor], backbone: Backbone, name: str, reason: Exception
) -> str:
    """Return what to say of a file that a library's network does not take: its format, counts of both sides, remedy.

    Args:
        checkpoint: The file.
        inside: Its tensors without the wrappers of training scripts.
        backbone: The network.
        name: Its registered name.
        reason: What the library said.
    """
    own = {key.removeprefix(OWN): value for key, value in backbone.state_dict().items()}
    unbuilt = tuple(prefix.removeprefix(OWN) for prefix in backbone.unbuilt_prefixes)
    common = [key for key in own if key in inside]
    missing = [key for key in own if key not in inside and not key.endswith(".num_batches_tracked")]
    unexpected = [key for key in inside if key not in own and not key.startswith(unbuilt)]
    reshaped = [
        f"{key} {tuple(inside[key].shape)} for {tuple(own[key].shape)}"
        for key in common
        if inside[key].shape != own[key].shape
    ]
    if not missing and not unexpected and not reshaped:
        return f"{checkpoint.source}: {reason}"
    return (
        f"{checkpoint.source}: does not fit {name}: it is {_format(checkpoint)}; {listed('missing', missing, 4)}; "
        f"{listed('unexpected', unexpected, 4)}; {listed('of another shape', reshaped, 4)}. Choose the network it was "
        f"made for, or give load_weights a rename= that turns its names into this network's"
    )


def _format(checkpoint: Checkpoint) -> str:
    if checkpoint.origin:
        return f"of the format {checkpoint.origin.format} ({describe_network(checkpoint.tensors)})"
    try:
        found = recognise(checkpoint)
    except ValueError:
        return "of no format known here"
    if found.format is None or len(found.unexplained) > len(found.state):
        return "of no format known here"
    return f"of the format {found.format.name} ({describe_network(found.state)})"
