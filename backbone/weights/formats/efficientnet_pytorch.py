"""EfficientNet-PyTorch and its relatives (SMP's ``efficientnet-b*``, EfficientNet-Lite-PyTorch), by timm's names.

There is one network under two spellings: EfficientNet-PyTorch counts all blocks in a row, timm counts them by stage,
and calls a block's convolutions after their order. Where a stage ends is read off the shapes.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Final

from torch import Tensor

from backbone.features import Preprocessing
from backbone.weights.metadata import Metadata
from backbone.weights.reading import Checkpoint
from backbone.weights.schemes import Format, KeyScheme, State

EPS: Final = 1e-3  # batch_norm_epsilon of TensorFlow's efficientnet_builder.py and efficientnet_lite_builder.py

# TensorFlow's efficientnet_builder.py: 255 times ImageNet's usual values; its preprocessing.py resizes bicubically.
IMAGENET: Final = Preprocessing(interpolation="bicubic")

# For Lite, TensorFlow's efficientnet_lite_builder.py, whose checkpoints these are, has MEAN_RGB = 127 and STDDEV_RGB =
# 128 on pixels of 0 to 255 ("inception-style"). timm writes 0.5 and 0.5, which differs by 0.008 at most, on pixels of
# -1 to 1; we follow timm, so that the same file means the same images. The examples of the PyTorch port, of ImageNet's
# mean and std, are its README's, left over from EfficientNet-PyTorch.
HALF: Final = Preprocessing((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), interpolation="bicubic")

_CONV: Final = r"(?:\.conv)?\.weight"  # EfficientDet's ports wrap the padding and the convolution together
_NORM: Final = r"\.(?:weight|bias|running_mean|running_var|num_batches_tracked)"
_THEIRS: Final = re.compile(
    rf"(_conv_stem|_conv_head){_CONV}|_bn[01]{_NORM}|_fc\.(weight|bias)|_blocks\.[0-9]{{1,3}}\.("
    rf"(_expand|_depthwise|_project)_conv{_CONV}|_bn[012]{_NORM}|_se_(reduce|expand)(\.conv)?\.(weight|bias))"
)
_TIMMS: Final = re.compile(
    rf"(conv_stem|conv_head)\.weight|conv_head\.bias|bn[12]{_NORM}|classifier\.(weight|bias)|"
    rf"blocks\.[0-9]\.[0-9]{{1,2}}\.((conv|conv_pw|conv_dw|conv_pwl|conv_exp)\.weight|bn[123]{_NORM}|"
    rf"se\.conv_(reduce|expand)\.(weight|bias))"
)

_OUTSIDE: Final = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_SQUEEZE: Final = {"_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}
_PLAIN: Final = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2", **_SQUEEZE}
_EXPANDED: Final = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
    **_SQUEEZE,
}
"""Parts of a block, theirs and timm's: of the first stage, which widens nothing, and of all others."""

_WIDTHS: Final = (16, 24, 40, 80, 112, 192, 320)
_DEPTHS: Final = (1, 2, 2, 3, 3, 4, 1)
_SCALES: Final = {
    "lite0": (1.0, 1.0),
    "lite1": (1.0, 1.1),
    "lite2": (1.1, 1.2),
    "lite3": (1.2, 1.4),
    "lite4": (1.4, 1.8),
    "b0": (1.0, 1.0),
    "b1": (1.0, 1.1),
    "b2": (1.1, 1.2),
    "b3": (1.2, 1.4),
    "b4": (1.4, 1.8),
    "b5": (1.6, 2.2),
    "b6": (1.8, 2.6),
    "b7": (2.0, 3.1),
    "b8": (2.2, 3.6),
    "l2": (4.3, 5.3),
}
"""Factors on width and depth (arXiv:1905.11946 and the builders named above)."""


@dataclass(frozen=True)
class Shape:
    """What tells one EfficientNet from another.

    Attributes:
        stem_channels: Of the first convolution.
        depths: Blocks by stage.
        widths: Channels by stage.
        squeezes: Whether blocks have squeeze-and-excitation.
    """

    stem_channels: int
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    squeezes: bool


@dataclass(frozen=True)
class _Names(KeyScheme):
    """Which keys are of a network; ``complete`` renames them, for that takes all of them and their shapes."""

    pattern: re.Pattern[str] = _THEIRS

    def to_ours(self, key: str) -> str | None:
        return key if self.pattern.fullmatch(key) else None


def to_timm(state: Mapping[str, Tensor]) -> State:
    """Return EfficientNet-PyTorch's tensors under timm's names."""
    places = _places(state)
    renamed: State = {}
    for key, value in state.items():
        plain = re.sub(r"(_conv(?:_stem|_head)?|_se_reduce|_se_expand)\.conv\.", r"\1.", key)
        words = plain.split(".")
        if words[0] != "_blocks":
            renamed[".".join([_OUTSIDE[words[0]], *words[1:]])] = value
            continue
        stage, block = places[int(words[1])]
        parts = _EXPANDED if _is_expanded(state, f"_blocks.{words[1]}._expand_conv") else _PLAIN
        renamed[".".join([f"blocks.{stage}.{block}", parts.get(words[2], words[2]), *words[3:]])] = value
    return renamed


def from_timm(state: Mapping[str, Tensor]) -> State:
    """Return an EfficientNet's tensors in timm's names under EfficientNet-PyTorch's, in its order."""
    blocks = sorted({(int(m[1]), int(m[2])) for key in state if (m := re.match(r"blocks\.(\d+)\.(\d+)\.", key))})
    outside = {theirs: ours for ours, theirs in _OUTSIDE.items()}
    renamed: State = {}
    for key, value in state.items():
        found = re.fullmatch(r"blocks\.(\d+)\.(\d+)\.(.+)\.(\w+)", key)
        if found is None:
            module, _, rest = key.rpartition(".")
            renamed[f"{outside[module]}.{rest}"] = value
            continue
        parts = _EXPANDED if _is_expanded(state, f"blocks.{found[1]}.{found[2]}.conv_pwl") else _PLAIN
        theirs = next(theirs for theirs, ours in parts.items() if ours == found[3])
        renamed[f"_blocks.{blocks.index((int(found[1]), int(found[2])))}.{theirs}.{found[4]}"] = value
    return renamed


def variant(state: Mapping[str, Tensor]) -> str | None:
    """Return ``b0`` ... ``lite4`` for an EfficientNet's tensors in timm's names; None if it is none of them."""
    found = _shape(state)
    return next((name for name in _SCALES if found == shape_of(name)), None)


def beginning_of(state: Mapping[str, Tensor]) -> str | None:
    """Return ``b0`` ... ``lite4`` for what a backbone has that was built without the last stages; else None.

    Where the stages that are there are those of several, it is none of them.
    """
    found = _shape(state)
    count = len(found.depths)
    fit = [
        name
        for name in _SCALES
        if count and found == replace(s := shape_of(name), depths=s.depths[:count], widths=s.widths[:count])
    ]
    return fit[0] if len(fit) == 1 else None


def is_head(key: str) -> bool:
    """Whether a key in timm's names lies behind C5."""
    return key.startswith(("conv_head.", "bn2.", "classifier."))


def network_name(state: Mapping[str, Tensor]) -> str | None:
    """Return the registered name of the network with these tensors, which pads as TensorFlow does."""
    name = variant(state)
    return None if name is None else f"timm/tf_efficientnet_{name}"


def describe(state: Mapping[str, Tensor]) -> str | None:
    """Return the network's name, or in words what it is that the family lacks; None without blocks in stages."""
    shape = _shape(state)
    if not shape.depths:
        return None
    return network_name(state) or f"no EfficientNet of this family: depths {shape.depths}, channels {shape.widths}"


def shape_of(name: str) -> Shape:
    """Return the shape of ``b0`` ... ``lite4``; Lite scales neither the stem nor the depth of its outer stages."""
    width, depth = _SCALES[name]
    lite = name.startswith("lite")
    depths = [-int(-round(depth * count, 6) // 1) for count in _DEPTHS]
    if lite:
        depths[0], depths[-1] = _DEPTHS[0], _DEPTHS[-1]
    stem = 32 if lite else _scaled(32, width)
    return Shape(stem, tuple(depths), tuple(_scaled(channels, width) for channels in _WIDTHS), squeezes=not lite)


def _scaled(channels: int, width: float) -> int:
    """Return the nearest multiple of 8, which may be a tenth smaller at most."""
    wanted = channels * width
    nearest = max(8, int(wanted + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * wanted else nearest


def _shape(state: Mapping[str, Tensor]) -> Shape:
    depths: dict[int, int] = {}
    widths: dict[int, int] = {}
    for key, value in state.items():
        found = re.fullmatch(r"blocks\.(\d+)\.(\d+)\.(conv_pw|conv_pwl)\.weight", key)
        if found is None or value.ndim == 0:
            continue
        stage = int(found[1])
        depths[stage] = max(depths.get(stage, 0), int(found[2]) + 1)
        if found[3] == "conv_pwl" or not _is_expanded(state, f"blocks.{found[1]}.{found[2]}.conv_pwl"):
            widths[stage] = value.shape[0]
    stem = state.get("conv_stem.weight")
    return Shape(
        stem.shape[0] if stem is not None and stem.ndim else 0,
        tuple(depths[stage] for stage in sorted(depths)),
        tuple(widths[stage] for stage in sorted(widths)),
        any(".se.conv_reduce." in key for key in state),
    )


def _is_expanded(state: Mapping[str, Tensor], name: str) -> bool:
    return f"{name}.weight" in state or f"{name}.conv.weight" in state


def _places(state: Mapping[str, Tensor]) -> dict[int, tuple[int, int]]:
    """Return stage and block for each number in the row: a stage ends where the number of channels changes."""
    numbers = sorted({int(m[1]) for key in state if (m := re.match(r"_blocks\.(\d+)\.", key))})
    places: dict[int, tuple[int, int]] = {}
    stage, block, before = 0, -1, None
    for number in numbers:
        last = next(
            (
                state[f"_blocks.{number}.{name}.weight"]
                for name in ("_project_conv", "_project_conv.conv")
                if f"_blocks.{number}.{name}.weight" in state
            ),
            None,
        )
        channels = before if last is None or last.ndim == 0 else last.shape[0]
        starts = before is not None and channels != before
        stage, block = (stage + 1, 0) if starts else (stage, block + 1)
        places[number], before = (stage, block), channels
    return places


def _complete(state: State) -> tuple[State, list[str]]:
    return to_timm(state), []


def _metadata(checkpoint: Checkpoint, state: State) -> Metadata:
    """Return the convention of TensorFlow's checkpoints, which all of these files are made from."""
    name, file = variant(state), PurePath(checkpoint.source).name
    origin, pixels = "EfficientNet-PyTorch's convention", IMAGENET
    if name is not None and name.startswith("lite"):
        origin, pixels = "the builder of EfficientNet-Lite", HALF
    elif re.match("adv-", file) or "advprop" in file:
        origin, pixels = "EfficientNet-PyTorch's convention for advprop, after the file's name", HALF
    return Metadata(origin, preprocessing=pixels, eps=EPS, padding="same", network=network_name(state))


EFFICIENTNET_PYTORCH: Final = Format(
    "efficientnet_pytorch",
    _Names(rows=()),
    lambda checkpoint, prefix: "its names, such as _blocks.0._depthwise_conv.weight",
    _metadata,
    _complete,
)


def _timm_metadata(checkpoint: Checkpoint, state: State) -> Metadata:
    return Metadata("nothing")


TIMM_EFFICIENTNET: Final = Format(
    "timm",
    _Names(rows=(), pattern=_TIMMS),
    lambda checkpoint, prefix: "timm's names, such as blocks.0.0.conv_dw.weight",
    _timm_metadata,
)
