"""What a backbone is made of, stage by stage: shapes, parameters and operations, counted and not estimated."""

import math
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
_PRODUCTS: Final = (nn.Conv2d, nn.Linear)


@dataclass(frozen=True, slots=True)
class StageDescription:
    """One stage, as counted on one image.

    Attributes:
        name: ``stem``, ``c2`` to ``c5``.
        blocks: Number of blocks, the units that repeat; 0 in the stem and where nothing repeats.
        channels: Channels of the stage's output; None where it is neither a feature map nor tokens.
        stride: Image pixels per feature pixel; None as for channels.
        dilations: Dilations of the convolutions larger than 1x1, in order, without repeats; 1 where there are none.
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
        outside_name: What lies in no stage: ``pyramid`` for the one of a plain vision transformer, else ``head``.
    """

    stages: tuple[StageDescription, ...]
    parameters: int
    multiply_adds: int
    megabytes: float
    outside_name: str = ""

    @property
    def outside(self) -> int:
        """Number of scalar parameters that lie in no stage."""
        return self.parameters - sum(stage.parameters for stage in self.stages)


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
    tensors = [*backbone.parameters(), *backbone.buffers()]
    return Description(
        stages=tuple(_describe_stages(backbone, maps, strides, operations)),
        parameters=sum(parameter.numel() for parameter in backbone.parameters()),
        multiply_adds=operations[""] // 2,
        megabytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6,
        outside_name="pyramid" if isinstance(getattr(backbone, "pyramid", None), nn.Module) else "head",
    )


def _describe_stages(
    backbone: Backbone,
    maps: Mapping[str, Sequence[int]],
    strides: Mapping[str, int | None],
    operations: Mapping[str, int],
) -> list[StageDescription]:
    """Return a row for each stage, and for a feature that is only pooled from the stage before, as VGG's C5."""
    report = freeze_report(backbone)
    stages = []
    for name, modules in backbone.stages.items():
        paths = backbone.stage_modules[name]
        convs = [m for m in modules.modules() if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1]
        shape = maps.get(name)
        undilated = (1,) if report[name].parameters else ()
        stages.append(
            StageDescription(
                name=name,
                blocks=sum(num_blocks(module) for module in modules) if name != "stem" else 0,
                channels=shape[1] if shape else None,
                stride=strides[name] if shape else None,
                dilations=tuple(dict.fromkeys(int(max(conv.dilation)) for conv in convs)) or undilated,
                size=(shape[2], shape[3]) if shape else None,
                parameters=report[name].parameters,
                multiply_adds=sum(_count(backbone.get_submodule(path), path, operations) for path in paths) // 2,
                frozen=report[name].frozen,
            )
        )
    for name, spec in backbone.feature_specs.items():
        if stage_of(name) not in backbone.stages:
            size = (maps[name][2], maps[name][3])
            stages.append(StageDescription(name, 0, spec.channels, spec.stride, (), size, 0, 0, stages[-1].frozen))
    return stages


def _run(backbone: Backbone, image_shape: tuple[int, ...]) -> tuple[dict[str, Sequence[int]], dict[str, int]]:
    """Return the shape of each stage's map, and the floating-point operations of each module and of all, ``""``."""
    maps: dict[str, Sequence[int]] = {}
    counter = FlopCounterMode(display=False)

    def watch(stage: str) -> Callable[[nn.Module, object, object], None]:
        def record(_module: nn.Module, _inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and (shape := _as_map(output.shape, image_shape)):
                maps[stage] = shape  # the last one stays

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


def _as_map(shape: Sequence[int], image_shape: Sequence[int]) -> tuple[int, ...] | None:
    """Return (1, C, H / stride, W / stride) for a map, also channels-last or of tokens; None for what is none."""
    sizes = [tuple(-(-side // stride) for side in image_shape[2:]) for stride in _STRIDES]
    if len(shape) == len(image_shape):
        for map_shape in ((*shape,), (shape[0], shape[3], shape[1], shape[2])):
            if map_shape[2:] in sizes:
                return map_shape
    elif len(shape) == len(image_shape) - 1:
        for size in sizes:
            if shape[1] == math.prod(size):
                return shape[0], shape[2], *size
    return None


def _stride(image_size: Sequence[int], shape: Sequence[int]) -> int | None:
    """Return the stride of a map of this shape; None where several would do."""
    fitting = [stride for stride in _STRIDES if _fits(image_size, shape[2:], stride)]
    return fitting[0] if len(fitting) == 1 else None


def _fits(image_size: Sequence[int], size: Sequence[int], stride: int) -> bool:
    return tuple(size) == tuple(-(-side // stride) for side in image_size)


def num_blocks(module: nn.Module) -> int:
    """Return how many blocks a stage's module has, of any library: what repeats, each of two or more products.

    A block has layers of its own between its parts; what only holds other modules is a stage or a list of them.
    """
    blocks = getattr(module, "blocks", None)
    if isinstance(blocks, nn.Sequential | nn.ModuleList):
        return len(blocks)
    if sum(isinstance(part, _PRODUCTS) for part in module.modules()) <= 1:
        return 0
    is_list = isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)
    if not is_list and _has_own_layers(module):
        return 1
    inside = [num_blocks(child) for child in module.children()]
    return sum(inside) if is_list or _only_holds_blocks(module) else 1


def _has_own_layers(module: nn.Module) -> bool:
    children = [child for child in module.children() if not list(child.children())]
    return any(list(child.parameters()) for child in children) or bool(module._parameters)


def _only_holds_blocks(module: nn.Module) -> bool:
    """Whether all the children are blocks or lists of them, such as a RegNet's stage."""
    return all(num_blocks(child) for child in module.children())


def _count(module: nn.Module, path: str, operations: Mapping[str, int]) -> int:
    """Return the operations of the module at ``path``; those of its children where it is only a container."""
    if path in operations:
        return operations[path]
    return sum(_count(child, f"{path}.{name}", operations) for name, child in module.named_children())
