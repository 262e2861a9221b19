"""Weights out of this package, under the names of another library."""

import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Final

import torch

from backbone.providers.resnet.network import FAMILY, ResNet
from backbone.weights.fit import require_fit
from backbone.weights.formats.detectron2 import DETECTRON2
from backbone.weights.formats.timm import TIMM
from backbone.weights.formats.torchvision import TORCHVISION
from backbone.weights.formats.transformers import RT_DETR, TRANSFORMERS
from backbone.weights.metadata import HEADER_KEY, Metadata
from backbone.weights.recognise import STEMS, Recognised, describe_network, network_name, recognise
from backbone.weights.schemes import Format, State
from backbone.weights.sources import open_source
from backbone.weights.writing import write_atomically

TARGETS: Final = {form.name: form for form in (TORCHVISION, TIMM, DETECTRON2, TRANSFORMERS)}
SUFFIXES: Final = (".pth", ".pt", ".safetensors", ".pkl")


def convert_weights(source: str | os.PathLike[str], out: Path, to: str) -> str:
    """Write the network in ``source`` under the names of another library, whole or not at all.

    Args:
        source: A path or address as in ``load_weights``.
        out: File to write: .pth or .pt (torch.save), .safetensors, or .pkl (NumPy arrays, detectron2 only).
        to: A key of ``TARGETS``.

    Returns:
        What was read, what was written and what was dropped, in words.

    Raises:
        ValueError: If the source is no complete network of the ResNet family, or the target cannot be written so.
        OSError: If the source cannot be read or the file not written.
    """
    _require_target(out, to)
    checkpoint = open_source(source)
    found = recognise(checkpoint)
    _require_whole(found, checkpoint.source)
    target = _of_network(TARGETS[to], found.state)
    counters = [key for key in found.state if key.endswith(".num_batches_tracked")]
    kept = {key: value for key, value in found.state.items() if target.counts_batches or key not in counters}
    classifier = [key for key in kept if key.startswith("fc.") and target is RT_DETR]
    kept = {key: value for key, value in kept.items() if key not in classifier}
    renamed = {_their_name(key, target, "fc.weight" in kept): value.contiguous() for key, value in kept.items()}
    write_atomically(out, lambda draft: _write(draft, out.suffix, renamed, found.metadata, target))
    dropped = {reason: len(keys) for reason, keys in found.dropped.items()}
    if classifier:
        dropped[f"{target.name} has no classifier"] = len(classifier)
    if not target.counts_batches and counters:
        dropped[f"{to} counts no batches"] = len(counters)
    lines = [
        f"{checkpoint.source}: {found.format.name if found.format else ''} {network_name(found.state)} ({found.why})",
        f"{out}: {to}, {len(renamed)} tensors",
        *(f"adapted: {sentence}" for sentence in found.additions),
        *(f"dropped, {reason}: {count}" for reason, count in dropped.items()),
    ]
    return "\n  ".join([*lines, *found.metadata.lines()])


def _require_target(out: Path, to: str) -> None:
    if to not in TARGETS:
        raise ValueError(f"convert writes for {', '.join(TARGETS)}, got {to!r}")
    allowed = SUFFIXES if to == DETECTRON2.name else SUFFIXES[:-1]
    if out.suffix not in allowed:
        raise ValueError(f"a file for {to} must end in {', '.join(allowed)}, got {str(out)!r}")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"the folder of {str(out)!r} must exist; make it first")


def _require_whole(found: Recognised, source: str) -> None:
    """Hold the tensors against the network they say they are, which needs no memory."""
    name = network_name(found.state)
    stem = next((found.state[key] for key in STEMS if key in found.state), None)
    classifier = found.state.get("fc.weight")
    if name is None or stem is None or stem.ndim < 2:  # noqa: PLR2004
        raise ValueError(f"{source}: convert needs a whole network, got {describe_network(found.state)}")
    classes = None if classifier is None or classifier.ndim == 0 else max(classifier.shape[0], 1)
    with torch.device("meta"):
        network = ResNet(FAMILY[name], in_channels=max(stem.shape[1], 1), norm="bn", num_classes=classes)
    require_fit(found.state, network.state_dict(), found.unexplained, source)


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


def _write(draft: Path, suffix: str, state: State, metadata: Metadata, target: Format) -> None:
    from safetensors.torch import save_file

    header = metadata.to_json()
    # what detectron2's DetectionCheckpointer takes whole and matches by name; any other .pkl it takes for Caffe2's
    zoo = {"__author__": "backbone", "matching_heuristics": True, HEADER_KEY: header}
    if suffix == ".safetensors":
        save_file(state, draft, {"format": "pt", HEADER_KEY: header})
    elif suffix == ".pkl":
        with draft.open("wb") as file:
            pickle.dump({"model": {key: value.numpy() for key, value in state.items()}, **zoo}, file)
    elif target is DETECTRON2:
        torch.save({"model": state, **zoo}, draft)
    else:
        bare = OrderedDict(state)
        bare._metadata = OrderedDict({HEADER_KEY: header})  # type: ignore[attr-defined] # where nn.Module keeps versions
        torch.save(bare, draft)
