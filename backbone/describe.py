"""What a backbone is made of, stage by stage: shapes, parameters and operations, counted and not estimated."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from backbone.features import Backbone
from backbone.freeze import freeze_report

_PROBE_SIDE: Final = 64  # image pixels; a multiple of every stride


@dataclass(frozen=True, slots=True)
class StageDescription:
    """One stage, as counted on one image.

    Attributes:
        name: ``stem``, ``c2`` to ``c5``.
        blocks: Number of residual blocks; 0 where there are none.
        channels: Channels of the stage's output.
        stride: Image pixels per feature pixel.
        dilations: Dilations of the convolutions larger than 1x1, in order, without repeats.
        size: Height and width of the output, in feature pixels.
        parameters: Number of scalar parameters.
        multiply_adds: Multiply-adds of the stage's convolutions and matrix products.
        frozen: Whether nothing in the stage can move.
    """

    name: str
    blocks: int
    channels: int
    stride: int
    dilations: tuple[int, ...]
    size: tuple[int, int]
    parameters: int
    multiply_adds: int
    frozen: bool


@dataclass(frozen=True, slots=True)
class Description:
    """A backbone's stages and its totals, which include what lies outside them (the classifier).

    Attributes:
        stages: The stages, stem first.
        parameters: Number of scalar parameters of the whole network.
        multiply_adds: Multiply-adds of one image through the whole network.
        megabytes: Size of parameters and buffers in their present dtype, in units of 10^6 bytes.
    """

    stages: tuple[StageDescription, ...]
    parameters: int
    multiply_adds: int
    megabytes: float


def describe(backbone: Backbone, image_size: tuple[int, int], *, in_channels: int = 3) -> Description:
    """Run one image through ``backbone`` in evaluation mode and count; its mode and statistics stay as they are.

    Args:
        backbone: The network. On the meta device the count takes neither memory nor arithmetic.
        image_size: Height and width, in pixels.
        in_channels: Channels of the image.
    """
    measured, flops = _run(backbone, (1, in_channels, *image_size))
    # A stage that is no output has no spec to tell its stride, and on a small image rounding up hides it.
    probed, _ = _run(backbone, (1, in_channels, _PROBE_SIDE, _PROBE_SIDE))
    strides = {name: _PROBE_SIDE // shape[-1] for name, (shape, _) in probed.items()}
    strides |= {name: spec.stride for name, spec in backbone.feature_specs.items()}
    report = freeze_report(backbone)
    stages, flops_before = [], 0
    for name, modules in backbone.stages.items():
        convs = [m for m in modules.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]
        (_, channels, height, width), flops_so_far = measured[name]
        stages.append(
            StageDescription(
                name=name,
                blocks=sum(len(module) for module in modules if isinstance(module, nn.Sequential)),
                channels=channels,
                stride=strides[name],
                dilations=tuple(dict.fromkeys(int(conv.dilation[0]) for conv in convs)),
                size=(height, width),
                parameters=report[name].parameters,
                multiply_adds=(flops_so_far - flops_before) // 2,
                frozen=report[name].frozen,
            )
        )
        flops_before = flops_so_far
    tensors = [*backbone.parameters(), *backbone.buffers()]
    return Description(
        stages=tuple(stages),
        parameters=sum(parameter.numel() for parameter in backbone.parameters()),
        multiply_adds=flops // 2,
        megabytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6,
    )


def _run(backbone: Backbone, image_shape: tuple[int, ...]) -> tuple[dict[str, tuple[torch.Size, int]], int]:
    """Return each stage's output shape with the floating-point operations up to there, and those of the whole run."""
    measured: dict[str, tuple[torch.Size, int]] = {}
    counter = FlopCounterMode(display=False)

    def watch(stage: str) -> Callable[[nn.Module, object, Tensor], None]:
        def record(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            measured[stage] = output.shape, counter.get_total_flops()

        return record

    modes = {module: module.training for module in backbone.modules()}
    hooks = [modules[-1].register_forward_hook(watch(stage)) for stage, modules in backbone.stages.items()]
    try:
        backbone.eval()  # training would move running statistics, and fails where one pixel is left
        with torch.no_grad(), counter:
            backbone(next(backbone.parameters()).new_zeros(image_shape))
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    return measured, counter.get_total_flops()
