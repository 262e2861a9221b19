"""Weights out of this package, under the names of another library."""

import os
import pickle
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from backbone.providers.resnet.network import FAMILY, ResNet
from backbone.weights.fit import require_fit
from backbone.weights.formats.detectron2 import DETECTRON2
from backbone.weights.formats.efficientnet_pytorch import EFFICIENTNET_PYTORCH, from_timm, is_head, variant
from backbone.weights.formats.timm import TIMM, create
from backbone.weights.formats.torchvision import TORCHVISION
from backbone.weights.formats.transformers import RT_DETR, TRANSFORMERS
from backbone.weights.metadata import HEADER_KEY, Metadata
from backbone.weights.recognise import STEMS, Recognised, describe_network, network_name, recognise, resnet_name
from backbone.weights.schemes import Format, State
from backbone.weights.sources import open_source
from backbone.weights.writing import write_atomically

TARGETS: Final = {form.name: form for form in (TORCHVISION, TIMM, DETECTRON2, TRANSFORMERS)}
"""Libraries to write a ResNet for."""

EFFICIENTNET_TARGETS: Final = (EFFICIENTNET_PYTORCH.name, TIMM.name)
"""Libraries to write an EfficientNet for."""

SUFFIXES: Final = (".pth", ".pt", ".safetensors", ".pkl")


def convert_weights(source: str | os.PathLike[str], out: Path, to: str, *, overwrite: bool = True) -> str:
    """Write the network in ``source`` under the names of another library, whole or not at all.

    Args:
        source: A path or address as in ``load_weights``.
        out: File to write: .pth or .pt (torch.save), .safetensors, or .pkl (NumPy arrays, detectron2 only).
        to: A key of ``TARGETS`` for a ResNet, one of ``EFFICIENTNET_TARGETS`` for an EfficientNet.
        overwrite: Whether to replace a file that is there. The command does so only with ``--overwrite``.

    Returns:
        What was read, what was written and what was dropped, in words.

    Raises:
        FileExistsError: If ``out`` exists and may not be replaced.
        ValueError: If the source is no complete network of these families, or the target cannot be written so.
        ImportError: If the source is an EfficientNet and timm, which knows its parts, is not installed.
        OSError: If the source cannot be read or the file not written.
    """
    _require_target(out, to, overwrite)
    checkpoint = open_source(source)
    found = recognise(checkpoint)
    name = found.metadata.network or network_name(found.state)
    if variant(found.state) is not None and resnet_name(found.state) is None:
        renamed = _efficientnet(found, to, checkpoint.source)
        dropped: dict[str, int] = {}
    else:
        renamed, dropped = _resnet(found, to, checkpoint.source)
    facts = replace(found.metadata, network=name)
    write_atomically(out, lambda draft: _write(draft, out.suffix, renamed, facts, to))
    dropped = {reason: len(keys) for reason, keys in found.dropped.items()} | dropped
    lines = [
        f"{checkpoint.source}: {found.format.name if found.format else ''} {name} ({found.why})",
        f"{out}: {to}, {len(renamed)} tensors",
        *(f"adapted: {sentence}" for sentence in found.additions),
        *(f"dropped, {reason}: {count}" for reason, count in dropped.items()),
    ]
    return "\n  ".join([*lines, *found.metadata.lines()])


def _require_target(out: Path, to: str, overwrite: bool) -> None:
    known = dict.fromkeys([*EFFICIENTNET_TARGETS[:1], *TARGETS])
    if to not in known:
        raise ValueError(f"convert writes for {', '.join(known)}, got {to!r}")
    allowed = SUFFIXES if to == DETECTRON2.name else SUFFIXES[:-1]
    if out.suffix not in allowed:
        raise ValueError(f"a file for {to} must end in {', '.join(allowed)}, got {str(out)!r}")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"the folder of {str(out)!r} must exist; make it first")
    if out.exists() and not overwrite:
        raise FileExistsError(f"convert replaces no file unasked, and {str(out)!r} exists; add --overwrite")


def _resnet(found: Recognised, to: str, source: str) -> tuple[State, dict[str, int]]:
    """Return the tensors by the target's names, and how many it does not take, by reason."""
    _require_whole(found, source)
    if to not in TARGETS:
        raise ValueError(f"{source}: {resnet_name(found.state)} can be written for {', '.join(TARGETS)}, got {to}")
    target = _of_network(TARGETS[to], found.state)
    classifier = [key for key in found.state if key.startswith("fc.") and target is RT_DETR]
    counters = [key for key in found.state if key.endswith(".num_batches_tracked") and not target.counts_batches]
    kept = {key: value for key, value in found.state.items() if key not in {*classifier, *counters}}
    dropped = {f"{target.name} has no classifier": len(classifier), f"{to} counts no batches": len(counters)}
    renamed = {_their_name(key, target, "fc.weight" in kept): value.contiguous() for key, value in kept.items()}
    return renamed, {reason: count for reason, count in dropped.items() if count}


def _require_whole(found: Recognised, source: str) -> None:
    """Hold the tensors against the network they say they are, which needs no memory."""
    name = resnet_name(found.state)
    stem = next((found.state[key] for key in STEMS if key in found.state), None)
    if name is None or stem is None or stem.ndim < 2:  # noqa: PLR2004
        raise ValueError(f"{source}: convert needs a whole network, got {describe_network(found.state)}")
    with torch.device("meta"):
        network = ResNet(
            FAMILY[name], in_channels=max(stem.shape[1], 1), norm="bn", num_classes=_num_classes(found, "fc")
        )
    require_fit(found.state, network.state_dict(), found.unexplained, source)


def _efficientnet(found: Recognised, to: str, source: str) -> State:
    """Return an EfficientNet's tensors by the target's names."""
    name = network_name(found.state)
    if to not in EFFICIENTNET_TARGETS:
        raise ValueError(f"{source}: {name} can be written for {', '.join(EFFICIENTNET_TARGETS)}, got {to}")
    stem = found.state["conv_stem.weight"]
    network: nn.Module = create(
        str(name), in_chans=max(stem.shape[1:2] or [1]), num_classes=_num_classes(found, "classifier") or 0
    )
    own: dict[str, Tensor] = network.state_dict()
    if not any(map(is_head, found.state)):  # a backbone of ours ends at c5
        own = {key: value for key, value in own.items() if not is_head(key)}
    require_fit(found.state, own, found.unexplained, source)
    renamed = found.state if to == TIMM.name else from_timm(found.state)
    return {key: value.contiguous() for key, value in renamed.items()}


def _num_classes(found: Recognised, name: str) -> int | None:
    classifier = found.state.get(f"{name}.weight")
    return None if classifier is None or classifier.ndim == 0 else max(classifier.shape[0], 1)


def _of_network(target: Format, state: State) -> Format:
    """Return ``target``, or what its library calls a ResNet-D's parameters.

    Raises:
        ValueError: If it has no such network.
    """
    if STEMS[1] not in state:
        return target
    if target is TRANSFORMERS:
        return RT_DETR
    if target is DETECTRON2:
        raise ValueError(
            f"{target.name} has no network with a deep stem, got {network_name(state)}; choose another target"
        )
    return target


def _their_name(key: str, target: Format, has_classifier: bool) -> str:
    """Return the target's name of our ``key``; transformers' classification model holds its ResNet as ``resnet.``."""
    theirs = target.scheme.to_theirs(key)
    if theirs is None and target.beside:
        return target.beside[0] + key.removeprefix(target.beside[1])
    assert theirs is not None
    return f"resnet.{theirs}" if target is TRANSFORMERS and has_classifier else theirs


def _write(draft: Path, suffix: str, state: State, metadata: Metadata, to: str) -> None:
    from safetensors.torch import save_file

    header = metadata.to_json()
    # what detectron2's DetectionCheckpointer takes whole and matches by name; any other .pkl it takes for Caffe2's
    zoo = {"__author__": "backbone", "matching_heuristics": True, HEADER_KEY: header}
    if suffix == ".safetensors":
        save_file(state, draft, {"format": "pt", HEADER_KEY: header})
    elif suffix == ".pkl":
        with draft.open("wb") as file:
            pickle.dump({"model": {key: value.numpy() for key, value in state.items()}, **zoo}, file)
    elif to == DETECTRON2.name:
        torch.save({"model": state, **zoo}, draft)
    else:
        bare = OrderedDict(state)
        bare._metadata = OrderedDict({HEADER_KEY: header})  # type: ignore[attr-defined] # where nn.Module keeps versions
        torch.save(bare, draft)
