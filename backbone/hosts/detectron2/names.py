"""Parameter names: ours, which are torchvision's, and detectron2's. One table, read both ways."""

import re
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

from backbone.features import Backbone
from backbone.pyramid import FeaturePyramid
from backbone.resnet import ResNet

Rules: TypeAlias = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]

_RESNET_RULES: Final[Rules] = (
    (r"^(conv1|bn1)\.", r"stem.\1."),
    (r"^layer(\d)\.", lambda match: f"res{int(match[1]) + 1}."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
    (r"\.conv2\.offset\.", ".conv2_offset."),
)
_PYRAMID_RULES: Final[Rules] = (
    (r"^fpn\.inner_blocks\.(\d)\.0\.", r"fpn_lateral<\1>."),
    (r"^fpn\.inner_blocks\.(\d)\.1\.", r"fpn_lateral<\1>.norm."),
    (r"^fpn\.layer_blocks\.(\d)\.0\.", r"fpn_output<\1>."),
    (r"^fpn\.layer_blocks\.(\d)\.1\.", r"fpn_output<\1>.norm."),
    (r"^fpn\.extra_blocks\.", "top_block."),
)


def detectron2_names(network: Backbone) -> dict[str, str]:
    """Return detectron2's name of each parameter and buffer of ``network``; ours where it has none."""
    if isinstance(network, FeaturePyramid):
        names = {f"body.{name}": f"bottom_up.{theirs}" for name, theirs in detectron2_names(network.body).items()}
        levels = [name[1:] for name in network.body.feature_specs]
        for name in network.fpn.state_dict(prefix="fpn."):
            theirs = _rewrite(name, _PYRAMID_RULES)
            names[name] = re.sub(r"<(\d)>", lambda match: levels[int(match[1])], theirs)
        return names
    rules = _RESNET_RULES if isinstance(network, ResNet) else ()
    return {name: _rewrite(name, rules) for name in network.state_dict()}


def _rewrite(name: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
