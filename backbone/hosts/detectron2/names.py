"""Parameter names: ours, which are torchvision's, and detectron2's. A ResNet's are those of its weight files."""

import re
from typing import Final

from backbone.features import Backbone
from backbone.providers.resnet.network import ResNet
from backbone.pyramid import FeaturePyramid
from backbone.weights.formats.detectron2 import NAMES

_CONVOLUTIONS: Final = {"inner": "fpn_lateral", "layer": "fpn_output"}
_PARTS: Final = {"0": "", "1": "norm."}


def detectron2_names(network: Backbone) -> dict[str, str]:
    """Return detectron2's name of each parameter and buffer of ``network``; ours where it has none."""
    if not isinstance(network, FeaturePyramid):
        own = isinstance(network, ResNet)
        return {name: (own and NAMES.to_theirs(name)) or name for name in network.state_dict()}
    levels = [name[1:] for name in network.body.feature_specs]

    def theirs(found: re.Match[str]) -> str:
        return f"{_CONVOLUTIONS[found[1]]}{levels[int(found[2])]}.{_PARTS[found[3]]}"

    names = {f"body.{name}": f"bottom_up.{theirs}" for name, theirs in detectron2_names(network.body).items()}
    for name in network.fpn.state_dict():
        renamed = re.sub(r"^(inner|layer)_blocks\.(\d)\.(\d)\.", theirs, name)
        names[f"fpn.{name}"] = renamed.replace("extra_blocks.", "top_block.")
    return names
