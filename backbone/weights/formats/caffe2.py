"""MSRA and Caffe2 (Detectron): R-50.pkl and its like, whose norms are folded into one scale and one bias."""

from typing import Final

import torch

from backbone.features import Preprocessing
from backbone.weights.metadata import BGR_255, Metadata
from backbone.weights.reading import Checkpoint
from backbone.weights.schemes import Format, KeyScheme, State

NAMES: Final = KeyScheme(
    rows=(
        ("conv1.weight", "conv1_w"),
        ("bn1.{norm}", "res_conv1_bn_{norm}"),
        ("bn1.{norm}", "conv1_bn_{norm}"),
        ("layer{stage}.{block}.conv{conv}.weight", "res{stage}_{block}_branch2{conv}_w"),
        ("layer{stage}.{block}.bn{conv}.{norm}", "res{stage}_{block}_branch2{conv}_bn_{norm}"),
        ("layer{stage}.{block}.downsample.0.weight", "res{stage}_{block}_branch1_w"),
        ("layer{stage}.{block}.downsample.1.{norm}", "res{stage}_{block}_branch1_bn_{norm}"),
        ("fc.{linear}", "fc1000_{linear}"),
        ("fc.{linear}", "pred_{linear}"),
    ),
    words={
        "stage": ("2", "3", "4", "5"),
        "conv": ("a", "b", "c"),
        "norm": ("s", "b", "rm", "riv"),
        "linear": ("w", "b"),
    },
)

HEADS: Final = {
    "conv1_b": "bias of the stem's convolution, which Detectron ignores too",
    ".*_momentum": "momentum of the optimizer",
    "(fpn_|rpn_|conv_rpn|bbox_pred|cls_score|fc6_|fc7_|_?\\[?mask|conv5_mask|kps_|conv_fcn|head_conv).*": "detector",
    "lr|weight_order": "training",
}

EPS: Final = 1e-5

# Detectron's ResNeXts are its own and stride in the 3x3; detectron2's X_101_32x8d recipes give their std.
BGR_255_RESNEXT: Final = Preprocessing(BGR_255.mean, (57.375, 57.12, 58.395), "bgr", (0.0, 255.0))


def carries_folded_norms(state: State) -> bool:
    """Whether every norm has mean 0 and variance 1 (or 1 - eps): a scale and a bias and nothing more."""
    means = [value for key, value in state.items() if key.endswith("running_mean")]
    variances = [value for key, value in state.items() if key.endswith("running_var")]
    return (
        bool(means)
        and not any(mean.any() for mean in means)
        and all(((v - 1).abs() <= 2 * EPS).all() for v in variances)
    )


def msra_metadata(state: State, origin: str) -> Metadata:
    """Return the convention of MSRA's ResNets (v1), or of Caffe2's ResNeXts (groups, stride in the 3x3)."""
    middle = state.get("layer1.0.conv2.weight")
    grouped = middle is not None and middle.ndim > 1 and middle.shape[1] < middle.shape[0]
    has_1x1 = "layer1.0.conv3.weight" in state
    return Metadata(
        origin,
        preprocessing=BGR_255_RESNEXT if grouped else BGR_255,
        stride_in_1x1=not grouped if has_1x1 else None,
        eps=EPS,
    )


def _metadata(checkpoint: Checkpoint, state: State) -> Metadata:
    return msra_metadata(state, "MSRA's and Caffe2's convention")


def _complete(state: State) -> tuple[State, list[str]]:
    """Give the folded norms the statistics of an identity: mean 0, and a variance that is 1 with eps added."""
    norms = {key.rpartition(".")[0]: value for key, value in state.items() if key.endswith("bias") and key != "fc.bias"}
    if any(key.endswith(("running_mean", "running_var")) for key in state):
        return state, []
    added: State = {}
    for name, bias in norms.items():
        added[f"{name}.running_mean"] = torch.zeros_like(bias)
        added[f"{name}.running_var"] = torch.ones_like(bias) - EPS
    return {**state, **added}, [f"{len(norms)} norms hold scale and bias only: mean 0 and variance 1 - eps added"]


CAFFE2: Final = Format(
    "MSRA/Caffe2",
    NAMES,
    lambda checkpoint, prefix: "its names, such as res2_0_branch2a_w",
    _metadata,
    _complete,
    heads=HEADS,
    counts_batches=False,
)
