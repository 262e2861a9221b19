"""Checkpoints of other libraries: theirs where they are installed, else written after their documented key scheme."""

import argparse
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from conftest import randomise_norms
from torch import Tensor, nn

Features = list[Tensor]
"""C2 to C5 of a library's own network."""

State = dict[str, Tensor]
IMAGES = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def torchvision_network(name: str = "resnet18", **settings: Any) -> nn.Module:
    model: nn.Module = torchvision.models.get_model(name, weights=None, **settings)
    randomise_norms(model)
    return model.eval()


def v1(model: nn.Module) -> nn.Module:
    """Move the stride of every bottleneck from the 3x3 into the first 1x1."""
    for block in model.modules():
        if isinstance(block, torchvision.models.resnet.Bottleneck):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)
    return model


def folded(model: nn.Module) -> nn.Module:
    """Leave only scale and bias in every norm, as MSRA's and Caffe2's files do."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.get_buffer("running_mean").zero_()
            module.get_buffer("running_var").fill_(1 - 1e-5)
    return model


@torch.inference_mode()
def torchvision_features(model: Any, images: Tensor = IMAGES) -> Features:
    x = model.maxpool(model.relu(model.bn1(model.conv1(images))))
    return [x := layer(x) for layer in (model.layer1, model.layer2, model.layer3, model.layer4)]


def renamed(state: State, *rules: tuple[str, str]) -> State:
    def rename(key: str) -> str:
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        return key

    return {rename(key): value for key, value in state.items()}


def detectron2_names(state: State) -> State:
    """After detectron2/modeling/backbone/resnet.py and tools/convert-torchvision-to-d2.py."""
    stages = tuple((f"^layer{n}", f"res{n + 1}") for n in (1, 2, 3, 4))
    counters = {key for key in state if key.endswith("num_batches_tracked")}
    return renamed(
        {key: value for key, value in state.items() if key not in counters},
        *stages,
        (r"^conv1", "stem.conv1"),
        (r"^bn1", "stem.conv1.norm"),
        (r"bn([123])", r"conv\1.norm"),
        (r"downsample\.0", "shortcut"),
        (r"downsample\.1", "shortcut.norm"),
        (r"^fc", "linear"),
    )


def caffe2_names(state: State) -> dict[str, Any]:
    """After Detectron's R-50.pkl: blobs res2_0_branch2a_w, res2_0_branch2a_bn_s, fc1000_w, and a stem bias."""
    letters = tuple(
        (rf"_(conv|bn){n}(?=[._])", rf"_branch2{letter}_\1") for n, letter in ((1, "a"), (2, "b"), (3, "c"))
    )
    stages = tuple((rf"^layer{n}\.(\d+)\.", rf"res{n + 1}_\1_") for n in (1, 2, 3, 4))
    names = renamed(
        {key: value for key, value in state.items() if "running" not in key and "num_batches" not in key},
        *stages,
        *letters,
        (r"_conv\.weight$", "_w"),
        (r"_bn\.weight$", "_bn_s"),
        (r"_bn\.bias$", "_bn_b"),
        (r"downsample\.0\.weight", "branch1_w"),
        (r"downsample\.1\.weight", "branch1_bn_s"),
        (r"downsample\.1\.bias", "branch1_bn_b"),
        (r"^conv1\.weight", "conv1_w"),
        (r"^bn1\.weight", "res_conv1_bn_s"),
        (r"^bn1\.bias", "res_conv1_bn_b"),
        (r"^fc\.weight", "fc1000_w"),
        (r"^fc\.bias", "fc1000_b"),
    )
    arrays = {key: value.numpy() for key, value in names.items()}
    return {**arrays, "conv1_b": torch.zeros(64).numpy(), "res2_0_branch2a_w_momentum": torch.zeros(3).numpy()}


def under(prefix: str, state: State) -> State:
    return {f"{prefix}{key}": value for key, value in state.items()}


def without_classifier(state: State) -> State:
    return {key: value for key, value in state.items() if not key.startswith("fc.")}


MM_HEADS = {"neck.lateral_convs.0.conv.weight": torch.ones(2), "bbox_head.fc_cls.weight": torch.ones(2)}
TRAINING = {"optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}, "epoch": 3}
HEAD = {"rpn.head.conv.weight": torch.ones(2), "roi_heads.box_head.fc6.weight": torch.ones(2)}


def moco(state: State) -> Any:
    body, twin = without_classifier(state), {key: value + 1 for key, value in without_classifier(state).items()}
    heads = {"fc.0.weight": torch.ones(2), "fc.2.weight": torch.ones(2)}
    queue = {"module.queue": torch.ones(128, 8), "module.queue_ptr": torch.zeros(1)}
    keys = under("module.encoder_k.", {**twin, **heads}) | under("module.encoder_q.", {**body, **heads}) | queue
    return {"epoch": 200, "arch": "resnet50", "state_dict": keys, **TRAINING}


def dino(state: State) -> Any:
    body = without_classifier(state)
    student = under("module.backbone.", {k: v + 1 for k, v in body.items()}) | {
        "module.head.mlp.0.weight": torch.ones(2)
    }
    teacher = under("backbone.", body) | {"head.mlp.0.weight": torch.ones(2)}
    return {"student": student, "teacher": teacher, "args": argparse.Namespace(arch="resnet50"), **TRAINING}


def swav(state: State) -> Any:
    heads = {"projection_head.0.weight": torch.ones(2), "prototypes.weight": torch.ones(2)}
    return under("module.", {**without_classifier(state), **heads})


def ema(state: State) -> Any:
    return {"model": {key: value + 1 for key, value in state.items()}, "ema": state, **TRAINING}


WRAPPED: dict[str, tuple[Callable[[State], Any], str, str]] = {
    # how a file is made, the format it is recognised as, the prefix that is stripped
    "bare": (lambda s: s, "torchvision", ""),
    "model": (lambda s: {"model": s, **TRAINING}, "torchvision", "model."),
    "state_dict": (lambda s: {"state_dict": s, **TRAINING}, "torchvision", "state_dict."),
    "ema beside model": (ema, "torchvision", "ema."),
    "DDP": (lambda s: under("module.", s), "torchvision", "module."),
    "compiled": (lambda s: under("_orig_mod.", s), "torchvision", "_orig_mod."),
    "compiled DDP": (lambda s: {"model": under("module._orig_mod.", s)}, "torchvision", "model.module._orig_mod."),
    "Lightning": (
        lambda s: {"state_dict": under("model.", s), "loops": {}, **TRAINING},
        "torchvision",
        "state_dict.model.",
    ),
    "torchvision detector": (
        lambda s: {**under("backbone.body.", s), **HEAD},
        "torchvision detection",
        "backbone.body.",
    ),
    "DETR": (lambda s: {"model": under("backbone.0.body.", s)}, "torchvision detection", "model.backbone.0.body."),
    "timm training": (
        lambda s: {"state_dict": {k: v + 1 for k, v in s.items()}, "state_dict_ema": s, "arch": "resnet50", **TRAINING},
        "timm",
        "state_dict_ema.",
    ),
    "mmdetection": (
        lambda s: {
            "meta": {"mmdet_version": "3.3.0"},
            "state_dict": {**under("backbone.", without_classifier(s)), **MM_HEADS},
        },
        "mmdetection",
        "state_dict.backbone.",
    ),
    "mmpretrain": (
        lambda s: {"state_dict": {**under("backbone.", without_classifier(s)), "head.fc.weight": s["fc.weight"]}},
        "mmdetection",
        "state_dict.backbone.",
    ),
    "MoCo": (moco, "self-supervised", "state_dict.module.encoder_q."),
    "DINO": (dino, "self-supervised", "teacher.backbone."),
    "SwAV": (swav, "self-supervised", "module."),
    "detectron2": (lambda s: detectron2_names(without_classifier(s)), "detectron2", ""),
    "detectron2 detector": (
        lambda s: {
            "model": under("backbone.bottom_up.", detectron2_names(s)) | {"backbone.fpn_lateral2.weight": s["bn1.bias"]}
        },
        "detectron2",
        "model.backbone.bottom_up.",
    ),
}


def write_pickle(content: Any, path: Path, protocol: int = 2) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def timm_network(name: str = "resnet50") -> nn.Module:
    model: nn.Module = timm.create_model(name, pretrained=False)
    randomise_norms(model)
    return model.eval()


def transformers_network(depths: list[int], layer_type: str, **settings: Any) -> Any:
    from transformers import ResNetConfig, ResNetForImageClassification

    widths = [64, 128, 256, 512] if layer_type == "basic" else [256, 512, 1024, 2048]
    config: Any = ResNetConfig
    model: Any = ResNetForImageClassification(
        config(depths=depths, hidden_sizes=widths, layer_type=layer_type, num_labels=7, **settings)
    )
    randomise_norms(model)
    return model.eval()


@torch.inference_mode()
def transformers_features(model: Any) -> Features:
    return list(model.resnet(IMAGES, output_hidden_states=True).hidden_states[1:])


def detectron2_network(depth: int, stride_in_1x1: bool = False) -> Any:
    """Return detectron2's ResNet with random weights, its norms (FrozenBN) with random statistics."""
    from detectron2.config import get_cfg
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.backbone.resnet import build_resnet_backbone

    cfg = get_cfg()
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64 if depth < 50 else 256
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = stride_in_1x1
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    model = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    randomise_norms(model)
    return model.eval()


@torch.inference_mode()
def detectron2_features(model: Any) -> Features:
    return list(model(IMAGES).values())


@torch.inference_mode()
def timm_features(model: Any) -> Features:
    x = model.maxpool(model.act1(model.bn1(model.conv1(IMAGES))))
    return [x := layer(x) for layer in (model.layer1, model.layer2, model.layer3, model.layer4)]
