"""What a checkpoint is: its format, where in it the network is, every key explained, and which network."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from torch import Tensor

from backbone.providers.resnet.blocks import BasicBlock, Bottleneck
from backbone.providers.resnet.network import FAMILY, Variant
from backbone.weights.formats import efficientnet_pytorch
from backbone.weights.formats.caffe2 import CAFFE2
from backbone.weights.formats.detectron2 import DETECTRON2
from backbone.weights.formats.efficientnet_pytorch import EFFICIENTNET_PYTORCH, TIMM_EFFICIENTNET
from backbone.weights.formats.mmdetection import MMDETECTION
from backbone.weights.formats.self_supervised import SELF_SUPERVISED
from backbone.weights.formats.timm import TIMM
from backbone.weights.formats.torchvision import NAMES, TORCHVISION, TORCHVISION_DETECTION
from backbone.weights.formats.transformers import RT_DETR, TRANSFORMERS, TRANSFORMERS_DETR
from backbone.weights.metadata import Metadata
from backbone.weights.reading import MAX_DEPTH, Checkpoint, Origin
from backbone.weights.report import listed
from backbone.weights.schemes import Format, KeyScheme, State

FORMATS: Final = (
    MMDETECTION,
    SELF_SUPERVISED,
    TIMM,
    TORCHVISION_DETECTION,
    TRANSFORMERS_DETR,
    TORCHVISION,
    DETECTRON2,
    CAFFE2,
    TRANSFORMERS,
    RT_DETR,
    EFFICIENTNET_PYTORCH,
    TIMM_EFFICIENTNET,
)
"""In the order they are asked: of those that share torchvision's names the most particular first."""

WRAPPERS: Final = re.compile(
    "(model_)?state_dict(_ema)?|ema_state_dict|model(_ema|_state)?|ema|network|net|weights|params|blobs|"
    "module|_orig_mod|backbone|body|bottom_up|encoder|detector|backbone_net|resnet|trunk|conv_encoder|_backbone|"
    "pixel_level_module|0|"
    "encoder_[qk]|(base|momentum|online|target)_encoder|teacher|student"
)
"""Words that may stand before the network's own names, as wrappers or as modules. ``0`` is DETR's backbone.0.body."""

TWINS: Final = (
    ("ema", "model"),
    ("ema", "state_dict"),
    ("model_ema", "model"),
    ("ema_state_dict", "state_dict"),
    ("state_dict_ema", "state_dict"),
    ("encoder_q", "encoder_k"),
    ("base_encoder", "momentum_encoder"),
    ("online_encoder", "target_encoder"),
    ("teacher", "student"),
)
"""Of two copies of one network the first is taken: the average that is evaluated; in MoCo and BYOL the trained one."""

CONTAINERS: Final = (
    "ema_state_dict",
    "state_dict_ema",
    "model_ema",
    "ema",
    "state_dict",
    "model",
    "module",
    "_orig_mod",
)
"""Those of the wrappers that no network has as a module, in the order in which they are preferred."""

STEMS: Final = ("conv1.weight", "conv1.0.weight")
"""The convolution that sees the image: of a ResNet, of a ResNet-D."""


@dataclass(frozen=True)
class Recognised:
    """A checkpoint, translated.

    Attributes:
        format: Its format; None for names of the network's own, which no format here has.
        why: By what it was recognised.
        prefix: What stood before the network's keys.
        state: The network's tensors under our names.
        dropped: Keys of the file that are explained and no part of the network, by reason.
        unexplained: Keys of the file that nothing explains.
        additions: What the format left out and was added, in words.
        metadata: What is known or assumed of the training.
    """

    format: Format | None
    why: str
    prefix: str
    state: State
    dropped: Mapping[str, list[str]]
    unexplained: list[str]
    additions: list[str]
    metadata: Metadata


@dataclass
class _Candidate:
    scheme: KeyScheme | None
    prefix: str
    names: dict[str, str] = field(default_factory=dict)  # ours by theirs


def recognise(checkpoint: Checkpoint, is_own: Callable[[str], bool] = lambda key: False) -> Recognised:
    """Find the network in a checkpoint and translate its names to ours.

    Args:
        checkpoint: What was read.
        is_own: Whether a key is one of the network's that is to be filled, for networks that no format knows.

    Raises:
        ValueError: If there is no network in it, or more than one and no rule says which.
    """
    candidate = _choose(checkpoint, _candidates(checkpoint, is_own))
    signs = ((f, f.sign(checkpoint, candidate.prefix)) for f in FORMATS if f.scheme is candidate.scheme)
    chosen, why = next(((f, sign) for f, sign in signs if sign), (None, "the network's own names"))
    state: State = {}
    dropped: dict[str, list[str]] = {}
    unexplained = []
    for key, tensor in checkpoint.tensors.items():
        ours, reason = candidate.names.get(key), None
        if ours is None:
            ours, reason = _explained(key, candidate.prefix, chosen)
        if reason:
            dropped.setdefault(reason, []).append(key)
        elif ours and ours not in state:
            state[ours] = tensor
        else:
            unexplained.append(key)
    for key in checkpoint.beside:
        dropped.setdefault(f"not tensors: {key.partition('.')[0]}", []).append(key)
    state, additions = chosen.complete(state) if chosen else (state, [])
    assumed = chosen.metadata(checkpoint, state) if chosen else Metadata("nothing")
    metadata = checkpoint.facts or assumed
    return Recognised(chosen, why, candidate.prefix, state, dropped, unexplained, additions, metadata)


def wrapper(tensors: Mapping[str, Tensor]) -> str:
    """Return the prefix under which training scripts put the network, whatever its names: "" where there is none."""
    prefix = ""
    while word := next((w for w in CONTAINERS if any(key.startswith(f"{prefix}{w}.") for key in tensors)), None):
        prefix += f"{word}."
    return prefix


def _candidates(checkpoint: Checkpoint, is_own: Callable[[str], bool]) -> list[_Candidate]:
    """Return every place where a network may be, with its keys, by each scheme that knows some of them."""
    found: dict[tuple[int, str], _Candidate] = {}
    schemes: list[KeyScheme | None] = [*{id(f.scheme): f.scheme for f in FORMATS}.values(), None]
    for key in checkpoint.tensors:
        for prefix, rest in _splits(key):
            for scheme in schemes:
                ours = scheme.to_ours(rest) if scheme else rest if is_own(rest) else None
                if ours:
                    place = found.setdefault((id(scheme), prefix), _Candidate(scheme, prefix))
                    place.names[key] = ours
    return [candidate for candidate in found.values() if _is_network(candidate, checkpoint)]


def _is_network(candidate: _Candidate, checkpoint: Checkpoint) -> bool:
    """Whether more than a few common names speak for it: many networks have a ``bn1`` or an ``fc``."""
    if candidate.scheme is not NAMES or any(ours.startswith("layer") for ours in candidate.names.values()):
        return True
    return all(key in candidate.names for key in checkpoint.tensors if key.startswith(candidate.prefix))


def _splits(key: str) -> Iterator[tuple[str, str]]:
    """Return the ways to part ``key`` into wrappers and a name: "", then one wrapper more at a time."""
    words = key.split(".")
    for count in range(len(words)):
        yield "".join(f"{word}." for word in words[:count]), ".".join(words[count:])
        if not WRAPPERS.fullmatch(words[count]) or count == MAX_DEPTH:
            break


def _choose(checkpoint: Checkpoint, candidates: list[_Candidate]) -> _Candidate:
    if not candidates:
        raise ValueError(
            f"{checkpoint.source}: holds no network that is known here: none of its keys has a ResNet's name in any "
            f"format ({', '.join(f.name for f in FORMATS)}) behind known wrappers; got "
            f"{listed('tensors', list(checkpoint.tensors))}"
        )
    own = [candidate for candidate in candidates if candidate.scheme is None]
    # Within what is the network's own by name, no other network is looked for: timm/resnet18 holds a ResNet.
    candidates = [
        c for c in candidates if not any(c.prefix != o.prefix and c.names.keys() <= o.names.keys() for o in own)
    ]
    most = max(len(candidate.names) for candidate in candidates)
    large = [c for c in candidates if 2 * len(c.names) > most]
    best: dict[str, _Candidate] = {}
    for candidate in sorted(large, key=lambda c: (c.scheme is not None, len(c.names))):  # formats before own names
        best[candidate.prefix] = candidate
    words = {prefix: prefix.split(".") for prefix in best}
    chosen = [
        prefix
        for prefix in best
        if not any(
            other in words[prefix] and better not in words[prefix] and any(better in words[p] for p in best)
            for better, other in TWINS
        )
    ]
    if len(chosen) != 1:
        raise ValueError(
            f"{checkpoint.source}: must hold one network, got one under each of "
            f"{', '.join(map(repr, sorted(chosen)))}; save the one you mean by itself"
        )
    return best[chosen[0]]


def _explained(key: str, prefix: str, chosen: Format | None) -> tuple[str | None, str | None]:
    """Return our name of a key that lies beside the network's prefix, or the reason why it is none of the network's."""
    if key.startswith(prefix):
        rest = key.removeprefix(prefix)
        heads = chosen.heads if chosen else {}
        return None, next((reason for pattern, reason in heads.items() if re.fullmatch(pattern, rest)), None)
    words, inside = key.split("."), prefix.split(".")
    shared = next((count for count, word in enumerate(words) if word != inside[count]), len(words) - 1)
    rest = ".".join(words[shared:])
    if chosen and chosen.beside and rest.startswith(chosen.beside[0]):
        return chosen.beside[1] + rest.removeprefix(chosen.beside[0]), None
    return None, f"beside the network: {words[shared]}"


def under_timms_names(checkpoint: Checkpoint) -> Checkpoint:
    """Return EfficientNet-PyTorch's network under the names that timm takes; any other checkpoint as it is.

    Raises:
        ValueError: If there is more than one network in it and no rule says which.
    """
    is_theirs = EFFICIENTNET_PYTORCH.scheme.to_ours
    if checkpoint.origin or not any(is_theirs(rest) for key in checkpoint.tensors for _, rest in _splits(key)):
        return checkpoint
    found = recognise(checkpoint)
    if found.format is not EFFICIENTNET_PYTORCH:
        return checkpoint
    left = {key.removeprefix(found.prefix): checkpoint.tensors[key] for key in found.unexplained}
    origin = Origin(found.format.name, found.why, found.prefix, found.dropped)
    tensors = {**found.state, **left}
    if not any(map(efficientnet_pytorch.is_head, tensors)):  # timm misses its head; a backbone of ours has none
        tensors = {f"network.{key}": value for key, value in tensors.items()}
    return replace(checkpoint, tensors=tensors, beside=(), facts=found.metadata, origin=origin)


def network_name(state: Mapping[str, Tensor]) -> str | None:
    """Return the registered name of the network with these tensors; None if no known family has one such."""
    return resnet_name(state) or efficientnet_pytorch.network_name(state)


def resnet_name(state: Mapping[str, Tensor]) -> str | None:
    """Return the registered name of the ResNet with these tensors; None if the family has none such."""
    variant = _variant(state)
    return next((name for name, known in FAMILY.items() if known == variant), None)


def describe_network(state: Mapping[str, Tensor]) -> str:
    """Return the network's name, or in words what it is that the family does not have."""
    variant, name = _variant(state), network_name(state)
    if variant is None:
        return efficientnet_pytorch.describe(state) or "no ResNet of this family"
    return name or (
        f"no ResNet of this family: {variant.block.__name__}, depths {variant.depths}, {variant.groups} groups of "
        f"{variant.width_per_group} channels{', a deep stem' if variant.deep_stem else ''}"
    )


def _variant(state: Mapping[str, Tensor]) -> Variant | None:
    blocks = [(int(m[1]), int(m[2])) for key in state if (m := re.match(r"layer([1-4])\.([0-9]+)\.", key))]
    depths = [1 + max((block for number, block in blocks if number == stage), default=-1) for stage in (1, 2, 3, 4)]
    block = Bottleneck if "layer1.0.conv3.weight" in state else BasicBlock
    last = "layer1.0.conv3.weight" if block is Bottleneck else "layer1.0.conv2.weight"
    deep = STEMS[1] in state
    ends = ("conv1.6.weight" if deep else STEMS[0], "layer1.0.conv2.weight", last)
    stem, middle, last_conv = (state.get(key) for key in ends)
    if stem is None or middle is None or last_conv is None or not stem.ndim == middle.ndim == last_conv.ndim == 4:  # noqa: PLR2004
        return None
    groups = middle.shape[0] // max(middle.shape[1], 1)
    return Variant(
        block,
        (depths[0], depths[1], depths[2], depths[3]),
        c2_channels=last_conv.shape[0],
        groups=groups,
        width_per_group=middle.shape[0] // max(groups, 1),
        stem_channels=stem.shape[0],
        deep_stem=deep,
        pooled_shortcuts="layer2.0.downsample.2.weight" in state,
        projects_first=block is BasicBlock and any(key.startswith("layer1.0.downsample.") for key in state),
    )
