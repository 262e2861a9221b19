"""mmdetection, mmsegmentation and mmpretrain: torchvision's names under ``backbone.``, and the config as text."""

import re
from typing import Final

from backbone.features import Preprocessing
from backbone.weights.formats.torchvision import NAMES
from backbone.weights.metadata import BGR_255, Metadata
from backbone.weights.reading import Checkpoint
from backbone.weights.schemes import Format, State

RGB_255: Final = Preprocessing((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), "rgb", (0.0, 255.0))


def _sign(checkpoint: Checkpoint, prefix: str) -> str | None:
    if not prefix.endswith("backbone."):
        return None
    version = next((path for path in checkpoint.notes if re.search(r"^meta\.mm\w+_version$", path)), None)
    heads = ("neck.", "bbox_head.", "rpn_head.", "roi_head.", "decode_head.", "head.fc.")
    root = prefix.removesuffix("backbone.")
    head = next((head for head in heads for key in checkpoint.tensors if key.startswith(root + head)), None)
    return f"torchvision's names under backbone., beside {version or head}" if version or head else None


def _metadata(checkpoint: Checkpoint, state: State) -> Metadata:
    config = next((text for path, text in checkpoint.notes.items() if path in ("meta.config", "meta.cfg")), "")
    style = re.search(r"style\s*=\s*['\"](pytorch|caffe)['\"]", config)
    dilated = any(".decode_head." in f".{key}" for key in checkpoint.tensors) or None
    if style is None:
        return Metadata(
            "mmdetection's pytorch style", preprocessing=RGB_255, stride_in_1x1=False, dilate_first_block=dilated
        )
    mean, std = (re.search(name + r"\s*=\s*[\[(]([0-9., ]+)[\])]", config) for name in ("mean", "std"))
    order = re.search(r"(?:to_rgb|bgr_to_rgb)\s*=\s*(True|False)", config)
    pixels = None
    if mean and std and order:
        means, stds = (tuple(map(float, re.findall(r"[0-9]+(?:\.[0-9]+)?", found[1]))) for found in (mean, std))
        pixels = Preprocessing(means, stds, "rgb" if order[1] == "True" else "bgr", (0.0, 255.0))
    caffe = style[1] == "caffe"
    return Metadata(
        f"style={style[1]!r} in the config it carries",
        known=True,
        preprocessing=pixels or (BGR_255 if caffe else RGB_255),
        stride_in_1x1=caffe if "layer1.0.conv3.weight" in state else None,
        dilate_first_block=dilated,
    )


MMDETECTION: Final = Format("mmdetection", NAMES, _sign, _metadata, beside=("head.fc.", "fc."))
