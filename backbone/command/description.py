"""What a backbone is made of, stage by stage: shapes, parameters and operations, counted and not estimated."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from backbone.features import Backbone
from backbone.freeze import freeze_report
from backbone.stages import stage_of

_PROBE_SIDE: Final = 64  # image pixels; a multiple of every stride
_STRIDES: Final = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True, slots=True)
class StageDescription:
    """One stage, as counted on one image.

    Attributes:
        name: ``stem``, ``c2`` to ``c5``.
        blocks: Number of residual blocks; 0 where there are none.
        channels: Channels of the stage's output; None where it is no feature map (a transformer's tokens).
        stride: Image pixels per feature pixel; None as for channels.
        dilations: Dilations of the convolutions larger than 1x1, in order, without repeats.
        size: Height and width of the output, in feature pixels; None as for channels.
        parameters: Number of scalar parameters.
        multiply_adds: Multiply-adds of the stage's convolutions and matrix products.
        frozen: Whether nothing in the stage can move.
    """

    name: str
    blocks: int
    channels: int | None
    stride: int | None
    dilations: tuple[int, ...]
    size: tuple[int, int] | None
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
    maps, operations = _run(backbone, (1, in_channels, *image_size))
    strides: dict[str, int | None] = {name: _stride(image_size, shape) for name, shape in maps.items()}
    if None in strides.values():  # small images fit several strides, and then any size may be tried
        probed, _ = _run(backbone, (1, in_channels, _PROBE_SIDE, _PROBE_SIDE))
        strides = {name: _PROBE_SIDE // shape[-1] for name, shape in probed.items()}
    strides |= {stage_of(name): spec.stride for name, spec in backbone.feature_specs.items()}
    report = freeze_report(backbone)
    stages = []
    for name, modules in backbone.stages.items():
        convs = [m for m in modules.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]
        shape = maps.get(name)
        stages.append(
            StageDescription(
                name=name,
                blocks=sum(_num_blocks(module) for module in modules),
                channels=shape[1] if shape else None,
                stride=strides[name] if shape else None,
                dilations=tuple(dict.fromkeys(int(conv.dilation[0]) for conv in convs)),
                size=(shape[2], shape[3]) if shape else None,
                parameters=report[name].parameters,
                multiply_adds=sum(_count(backbone, path, operations) for path in backbone.stage_modules[name]) // 2,
                frozen=report[name].frozen,
            )
        )
    tensors = [*backbone.parameters(), *backbone.buffers()]
    return Description(
        stages=tuple(stages),
        parameters=sum(parameter.numel() for parameter in backbone.parameters()),
        multiply_adds=operations[""] // 2,
        megabytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6,
    )


def _run(backbone: Backbone, image_shape: tuple[int, ...]) -> tuple[dict[str, torch.Size], dict[str, int]]:
    """Return the shape of each stage's map, and the floating-point operations of each module and of all, ``""``."""
    maps: dict[str, torch.Size] = {}
    counter = FlopCounterMode(display=False)

    def watch(stage: str) -> Callable[[nn.Module, object, object], None]:
        def record(_module: nn.Module, _inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and _is_map(output.shape, image_shape):
                maps[stage] = output.shape  # the last one stays

        return record

    modes = {module: module.training for module in backbone.modules()}
    hooks = [m.register_forward_hook(watch(stage)) for stage, modules in backbone.stages.items() for m in modules]
    try:
        backbone.eval()  # training would move running statistics, and fails where one pixel is left
        with torch.no_grad(), counter:
            features = backbone(next(backbone.parameters()).new_zeros(image_shape))
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    maps |= {stage_of(name): features[name].shape for name in backbone.feature_specs}
    root = type(backbone).__name__
    counts = counter.get_flop_counts()
    operations = {name.removeprefix(f"{root}."): sum(each.values()) for name, each in counts.items()}
    return maps, operations | {"": counter.get_total_flops()}


def _is_map(shape: Sequence[int], image_shape: Sequence[int]) -> bool:
    """Whether a shape is (1, C, H / stride, W / stride) rather than tokens or channels-last."""
    return len(shape) == len(image_shape) and any(_fits(image_shape[2:], shape[2:], stride) for stride in _STRIDES)


def _stride(image_size: Sequence[int], shape: Sequence[int]) -> int | None:
    """Return the stride of a map of this shape; None where several would do."""
    fitting = [stride for stride in _STRIDES if _fits(image_size, shape[2:], stride)]
    return fitting[0] if len(fitting) == 1 else None


def _fits(image_size: Sequence[int], size: Sequence[int], stride: int) -> bool:
    return tuple(size) == tuple(-(-side // stride) for side in image_size)


def _num_blocks(module: nn.Module) -> int:
    blocks = getattr(module, "blocks", module)
    return len(blocks) if isinstance(blocks, nn.Sequential) else 0


def _count(backbone: Backbone, path: str, operations: Mapping[str, int]) -> int:
    """Return the operations of a module; those of its children where it is only a container."""
    if path in operations:
        return operations[path]
    children = backbone.get_submodule(path).named_children()
    return sum(_count(backbone, f"{path}.{name}", operations) for name, _ in children)
