"""detectron2: stem, res2 to res5; norms are children of their convolutions."""

from typing import Final

from backbone.weights.formats.caffe2 import carries_folded_norms, msra_metadata
from backbone.weights.metadata import BGR_255, Metadata
from backbone.weights.reading import Checkpoint
from backbone.weights.schemes import Format, KeyScheme, State

NAMES: Final = KeyScheme(
    rows=(  # a convolution has a bias where a norm was folded into it
        ("conv1.{linear}", "stem.conv1.{linear}"),
        ("bn1.{norm}", "stem.conv1.norm.{norm}"),
        ("layer{stage}.{block}.conv{conv}.{linear}", "res{stage}.{block}.conv{conv}.{linear}"),
        ("layer{stage}.{block}.bn{conv}.{norm}", "res{stage}.{block}.conv{conv}.norm.{norm}"),
        ("layer{stage}.{block}.conv2.offset.{linear}", "res{stage}.{block}.conv2_offset.{linear}"),
        ("layer{stage}.{block}.downsample.0.{linear}", "res{stage}.{block}.shortcut.{linear}"),
        ("layer{stage}.{block}.downsample.1.{norm}", "res{stage}.{block}.shortcut.norm.{norm}"),
        ("fc.{linear}", "linear.{linear}"),
    ),
    words={"stage": ("2", "3", "4", "5")},
)


def _metadata(checkpoint: Checkpoint, state: State) -> Metadata:
    if carries_folded_norms(state):
        return msra_metadata(state, "norms of mean 0 and variance 1 are MSRA's and Caffe2's")
    dilated = any("sem_seg_head" in key for key in checkpoint.tensors)
    return Metadata("detectron2's defaults", preprocessing=BGR_255, dilate_first_block=True if dilated else None)


# FrozenBatchNorm2d there has no counter, and strict loading into it takes none.
DETECTRON2: Final = Format(
    "detectron2",
    NAMES,
    lambda checkpoint, prefix: "its names, such as res2.0.conv1.norm.weight",
    _metadata,
    counts_batches=False,
)
