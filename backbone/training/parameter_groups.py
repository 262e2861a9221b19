"""Which parameter learns how fast: groups by part and decay, and the learning rate of every step."""

import math
from typing import Any, Final, get_args

import torch
from torch import nn

from backbone.hosts.torchvision import TorchvisionBackbone
from backbone.recipe import Part, TrainConfig

PARTS: Final = get_args(Part)
WARMUP_START: Final = 0.001
MOMENTUM: Final = 0.9


def backbone_of(detector: nn.Module) -> TorchvisionBackbone:
    """Return the backbone of a detector or segmenter, with its pyramid."""
    backbone = detector.backbone
    assert isinstance(backbone, TorchvisionBackbone)
    return backbone


def parts_of(detector: nn.Module) -> dict[str, Part]:
    """Return the part each parameter belongs to, by name: a stage of the backbone, the pyramid or the head."""
    backbone = backbone_of(detector)
    parts: dict[int, Part] = {}
    for part in PARTS[: PARTS.index("pyramid")]:
        parts |= {id(parameter): part for module in backbone.stages.get(part, ()) for parameter in module.parameters()}
    if backbone.fpn is not None:
        parts |= {id(parameter): "pyramid" for parameter in backbone.fpn.parameters()}
    return {name: parts.get(id(parameter), "head") for name, parameter in detector.named_parameters()}


def parameter_groups(detector: nn.Module, train: TrainConfig) -> list[dict[str, Any]]:
    """Return the optimizer's groups: every part with and without weight decay, frozen parameters among them.

    Their number and order follow from the architecture alone, so that an optimizer's state fits whatever is frozen: a
    frozen parameter has no gradient, is passed over, and continues with the state it had when it thaws. Norms and
    biases, the parameters of one dimension, have no weight decay.

    Raises:
        ValueError: If ``lr_multipliers`` names a part that the detector does not have.
    """
    parts, parameters = parts_of(detector), dict(detector.named_parameters())
    present = [part for part in PARTS if part in parts.values()]
    if absent := [part for part in train.lr_multipliers if part not in present]:
        raise ValueError(
            f"lr_multipliers must name parts that the detector has, {', '.join(present)}; got {', '.join(absent)}"
        )
    groups = []
    for part in present:
        rate = train.learning_rate * train.lr_multipliers.get(part, 1.0) * train.layer_decay ** depth_of(part)
        for decays in (True, False):
            names = [name for name, other in parts.items() if other == part and (parameters[name].ndim > 1) == decays]
            if names:
                decay = train.weight_decay if decays else 0.0
                name = f"{part}{'' if decays else ' (norms, biases)'}"
                members = [parameters[each] for each in names]
                groups.append({"params": members, "lr": rate, "weight_decay": decay, "name": name})
    return groups


def depth_of(part: Part) -> int:
    """Return how many times ``layer_decay`` applies: 0 for head and pyramid, 1 for C5, ... 5 for the stem."""
    return max(0, PARTS.index("c5") + 1 - PARTS.index(part))


def make_optimizer(groups: list[dict[str, Any]], train: TrainConfig) -> torch.optim.Optimizer:
    """Return the recipe's optimizer over the groups."""
    if train.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=train.learning_rate)
    return torch.optim.SGD(groups, lr=train.learning_rate, momentum=MOMENTUM)


def rate_factor(train: TrainConfig, step: int, epoch: float) -> float:
    """Return the factor on every learning rate at a step and an epoch, both counted from 0, the latter with fractions.

    The warm-up follows the step and the decay the epoch. So the decay stands where it stood when a run goes on with
    another batch size, more processes or more images.
    """
    warm = min(1.0, WARMUP_START + (1 - WARMUP_START) * step / train.warmup_steps) if train.warmup_steps else 1.0
    if train.learning_rate_decay == "steps":
        return warm * 0.1 ** sum(epoch >= start for start in train.decay_epochs)
    if train.learning_rate_decay == "cosine":
        return warm * 0.5 * (1 + math.cos(math.pi * min(epoch / train.epochs, 1.0)))
    return warm
