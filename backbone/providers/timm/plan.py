"""How a timm model becomes a backbone: which of its maps are C2-C5, which modules make them, which sizes it takes.

All of it is read from a copy on the meta device before any memory is used. A model that cannot keep the contract is
refused there, with the reason.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import timm
import torch
from timm.models.mobilenetv3 import MobileNetV3
from torch import Tensor, nn

from backbone.features import FeatureSpec
from backbone.providers.timm.dataflow import Division, Trace, divide, trace
from backbone.stages import C1_STRIDE, stage_of

STRIDES: Final = {"c2": 4, "c3": 8, "c4": 16, "c5": 32}
_COARSEST: Final = 32
_OPTIONAL_SETTINGS: Final = ("dynamic_img_size", "zero_init_last")
_BATCH: Final = 2


@dataclass(frozen=True, slots=True)
class Plan:
    """What a timm model offers, as far as the last wanted level.

    Attributes:
        indices: For each level the index of its map among those that timm numbers. The levels of a plain vision
            transformer are the ends of the four quarters of its blocks.
        specs: Channels and stride of these maps.
        is_plain_vit: Whether all maps have one stride, so that a pyramid must be made of the last.
        size_multiple: Images are padded to a multiple of this, in pixels; 1 where the model itself rounds sizes up.
        only_size: Height and width of the only images the model takes, if it takes no others.
        kept: Indices of all maps that are made while the wanted ones are.
        division: The model's parts by stage.
        dropped_prefixes: Names in the complete model's state dict, or their beginnings, that the backbone lacks.
    """

    indices: Mapping[str, int]
    specs: Mapping[str, FeatureSpec]
    is_plain_vit: bool
    size_multiple: int
    only_size: tuple[int, int] | None
    kept: tuple[int, ...]
    division: Division
    dropped_prefixes: tuple[str, ...]


def create(
    model: str,
    *,
    in_channels: int,
    output_stride: int,
    zero_init_residual: bool,
    pretrained: bool = False,
    pretrained_cfg_overlay: dict[str, object] | None = None,
) -> nn.Module:
    """Return timm's complete ``model``, for images of any size if it can be.

    Args:
        model: timm's name of the architecture.
        in_channels: Channels of the images.
        output_stride: Largest stride, in image pixels.
        zero_init_residual: Whether the last norm of each block starts at zero.
        pretrained: Whether timm loads the weights that ``model``'s tag names.
        pretrained_cfg_overlay: What differs from timm's description of these weights.

    Raises:
        ValueError: If timm does not offer a setting for this model.
    """
    settings: dict[str, Any] = {"in_chans": in_channels, "dynamic_img_size": True, "zero_init_last": zero_init_residual}
    if output_stride != _COARSEST:
        settings["output_stride"] = output_stride
    dilates_blocks_alone = False
    while True:
        try:
            network = timm.create_model(
                model, pretrained=pretrained, pretrained_cfg_overlay=pretrained_cfg_overlay, **settings
            )
            return _with_dilated_blocks(network, model, output_stride) if dilates_blocks_alone else network
        except (TypeError, AssertionError, NotImplementedError) as error:
            refused = next((key for key in settings if f"'{key}'" in str(error)), "")
            if refused in _OPTIONAL_SETTINGS and not (refused == "zero_init_last" and zero_init_residual):
                del settings[refused]
            elif refused == "output_stride" and f"{MobileNetV3.__name__}.__init__" in str(error):
                del settings[refused]
                dilates_blocks_alone = True
            elif refused == "zero_init_last":
                raise ValueError(f"zero_init_residual: timm offers it for no {model}; set it to false") from None
            elif "output_stride" in settings:
                raise ValueError(
                    f"output_stride must be 32 for timm/{model}, which timm cannot dilate, got {output_stride}"
                ) from None
            else:
                raise ValueError(f"timm/{model} cannot be built: {error!r}") from None


def _with_dilated_blocks(network: Any, model: str, output_stride: int) -> nn.Module:  # noqa: ANN401
    """Give a MobileNetV3 (FBNetV3, LCNet, MobileNetV4) the dilated blocks of timm's network for feature maps alone.

    Only that one takes an output stride. Its blocks have the parameters of the classifier's, which keep their values.
    """
    extractor: Any = timm.create_model(model, features_only=True, output_stride=output_stride)
    extractor.blocks.load_state_dict(network.blocks.state_dict())
    network.blocks = extractor.blocks
    network.feature_info = extractor.feature_info.info
    return network  # type: ignore[no-any-return]


@lru_cache(maxsize=64)
def plan(model: str, *, in_channels: int, output_stride: int, last_level: str, with_c1: bool = False) -> Plan:
    """Plan ``model`` up to ``last_level``, and c1 with it where wanted.

    Raises:
        ValueError: If it has no maps at the strides of C2-C5, or a setting cannot be honoured.
    """
    # A caller's inference mode would leave no graph to read, and the plan is kept for later callers.
    with torch.inference_mode(False), torch.enable_grad(), torch.device("meta"):
        return _plan(model, in_channels, output_stride, last_level, with_c1)


def _plan(model: str, in_channels: int, output_stride: int, last_level: str, with_c1: bool) -> Plan:
    network: Any = create(model, in_channels=in_channels, output_stride=output_stride, zero_init_residual=False)
    undilated: Any = network
    if output_stride != _COARSEST:  # names stay with the maps: a dilated C5 is at the stride of C4
        undilated = create(model, in_channels=in_channels, output_stride=_COARSEST, zero_init_residual=False)
    info, strides = list(network.feature_info), [int(entry["reduction"]) for entry in undilated.feature_info]
    complete = list(network.state_dict())
    is_vit = is_plain_vit(strides)
    c1 = {"c1": _c1(model, strides)} if with_c1 else {}
    coarser = levels(model, strides, last_level) if last_level != "c1" else {}
    indices = c1 | coarser
    first = min(coarser.values(), default=indices.get("c1", 0) + 1)
    kept = (*(() if is_vit else range(first)), *coarser.values())
    network.prune_intermediate_layers(list(kept), prune_norm=True, prune_head=True)

    specs = {name: FeatureSpec(int(info[i]["num_chs"]), min(strides[i], output_stride)) for name, i in indices.items()}
    run = Runner(network, kept, in_channels)
    native = tuple(network.pretrained_cfg["input_size"][1:])
    wanted = {kept.index(indices[name]): spec.stride for name, spec in specs.items()}
    size_multiple, only_size = _accepted_sizes(model, run, wanted, native, rounds_up=not is_vit)
    traced = run(only_size or tuple(-(-side // size_multiple) * size_multiple for side in native))
    names = {index: name for name, index in indices.items()}
    constant = [names[index] for index, needed in zip(kept, traced.needs, strict=True) if index in names and not needed]
    if constant:
        raise ValueError(f"timm/{model}: no parameter makes {', '.join(constant)}; choose another model")
    stages = [stage_of(names.get(index, "c1")) for index in kept]
    owners = _owners(network, traced, stages, info[first]["module"] if coarser else "")
    division = divide(network, owners, "stem")
    _give_level_its_module(division, {name: info[index]["module"] for name, index in coarser.items()})
    drop(network, division.unused)
    return Plan(
        indices, specs, is_vit, size_multiple, only_size, kept, division, _lacking(complete, network.state_dict())
    )


def features_at(network: nn.Module, images: Tensor, indices: Sequence[int]) -> list[Tensor]:
    """Images (N, C, H, W) -> the maps that timm numbers ``indices``, each (N, C_i, H_i, W_i)."""
    return network.forward_intermediates(  # type: ignore[operator, no-any-return]
        images, indices=list(indices), norm=False, stop_early=True, output_fmt="NCHW", intermediates_only=True
    )


def drop(network: nn.Module, unused: Sequence[str]) -> None:
    """Take the named modules and parameters, which no map depends on, out of ``network``."""
    for path in unused:
        parent, _, name = path.rpartition(".")
        owner = network.get_submodule(parent)
        if name in owner._parameters:
            owner.register_parameter(name, None)
        else:
            owner._modules[name] = nn.Identity()


def levels(model: str, strides: Sequence[int], last_level: str = "c5") -> dict[str, int]:
    """Return for each level up to ``last_level`` the index of its map among those of the given strides.

    Of several maps at one stride it is the last. A plain vision transformer has one stride, and its levels are the last
    blocks of its quarters.

    Raises:
        ValueError: If there is none.
    """
    found = {
        name: max(index for index, stride in enumerate(strides) if stride == wanted)
        for name, wanted in STRIDES.items()
        if wanted in strides and wanted <= STRIDES[last_level]
    }
    if is_plain_vit(strides) and strides[0] in STRIDES.values():
        return {name: len(strides) * quarter // 4 - 1 for quarter, name in enumerate(STRIDES, start=1)}
    if not found:
        raise ValueError(
            f"timm/{model} has maps at strides {', '.join(map(str, dict.fromkeys(strides)))}, which give none of c2 to "
            f"{last_level} (strides 4, 8, 16, 32); choose another model"
        )
    return found


def _c1(model: str, strides: Sequence[int]) -> int:
    """Return the index of the last map at stride 2.

    Raises:
        ValueError: If there is none.
    """
    if C1_STRIDE not in strides:
        reason = (
            f"its maps are all at stride {strides[0]}, and the pyramid on them starts at c2"
            if is_plain_vit(strides)
            else f"its finest map is at stride {min(strides)}"
        )
        raise ValueError(f"out_features must not name c1 (stride 2) for timm/{model}: {reason}; remove c1")
    return max(index for index, stride in enumerate(strides) if stride == C1_STRIDE)


def is_plain_vit(strides: Sequence[int]) -> bool:
    """Whether all of several maps have one stride, so that a pyramid must be made of the last."""
    return len(strides) > 1 and len(set(strides)) == 1


class Runner:
    """Traces the maps of ``network``, which is on the meta device, for images of a given size."""

    def __init__(self, network: nn.Module, indices: Sequence[int], in_channels: int) -> None:
        self.network, self.indices, self.in_channels = network, indices, in_channels

    def __call__(self, size: Sequence[int]) -> Trace:
        """Return what a run on images of ``size`` shows."""
        shape = (_BATCH, self.in_channels, *size)
        return trace(self.network, lambda images: features_at(self.network, images, self.indices), shape)


def _accepted_sizes(
    model: str, run: Runner, strides: Mapping[int, int], native: tuple[int, int], *, rounds_up: bool
) -> tuple[int, tuple[int, int] | None]:
    """Return the number of pixels that image sizes must be a multiple of, and the only size, if there is only one.

    Args:
        model: Its name, for the error.
        run: Traces the model's maps.
        strides: Stride of each wanted map, by its number among those that ``run`` traces.
        native: Height and width the model was made for.
        rounds_up: Whether it may be found to take any size.
    """

    def exact(*size: int) -> bool:
        try:
            sizes = run(size).sizes
        except Exception:  # a size that does not fit fails in as many ways as there are models
            return False
        return all(sizes[i] == tuple(-(-side // stride) for side in size) for i, stride in strides.items())

    if rounds_up and exact(257, 319) and exact(256, 352):  # 257 / 2, / 4, ... are all odd where sizes round up
        return 1, None
    for multiple in (_COARSEST, 2 * _COARSEST, *native[:1]):
        if multiple % _COARSEST == 0 and exact(5 * multiple, 3 * multiple):
            return multiple, None
    if exact(*native):
        return 1, native
    try:
        found = run(native).sizes
    except Exception as error:
        raise ValueError(f"timm/{model} cannot be traced: {error}") from None
    maps = ", ".join(f"{found[i][0]}x{found[i][1]} at stride {stride}" for i, stride in strides.items())
    raise ValueError(
        f"timm/{model} breaks the rule that a map has the image's size divided by its stride, rounded up: "
        f"{native[0]}x{native[1]} gives {maps}; choose another model"
    )


def _owners(network: nn.Module, traced: Trace, stages: Sequence[str], first_module: str) -> dict[nn.Parameter, str]:
    """Return the stage of each parameter: the first one whose map depends on it.

    What comes before the first level is the stem: maps finer than it, and modules beside the one that timm names as
    the level's, which lies in the same container as those of the other levels.
    """
    owners: dict[nn.Parameter, str] = {}
    for stage, needed in zip(stages, traced.needs, strict=True):
        for parameter in needed:
            owners.setdefault(parameter, stage)
    first_level = next((stage for stage in stages if stage != "stem"), None)
    if first_level is None:
        return owners
    modules = dict(network.named_modules())
    container = modules.get(first_module.partition(".")[0])
    _give_rest_to_stem(owners, first_level, container)
    if "stem" not in owners.values():
        _give_rest_to_stem(owners, first_level, modules.get(first_module))
    if "stem" not in owners.values():  # some of timm's names are out of date
        for parameter in traced.called[0].parameters():
            owners[parameter] = "stem"
    return owners


def _give_level_its_module(division: Division, module_of_level: Mapping[str, str]) -> None:
    """Give each level a stage, the module that timm names as its own, where no parameter is: VGG's last pooling."""
    for level, module in module_of_level.items():
        if level not in division.modules and level not in division.parameters:
            for modules in division.modules.values():
                if module in modules and len(modules) > 1:
                    modules.remove(module)
                    division.modules[level] = [module]
                    break
            else:
                division.modules[level] = []


def _give_rest_to_stem(owners: dict[nn.Parameter, str], first_level: str, module: nn.Module | None) -> None:
    if module is not None:
        inside = set(module.parameters())
        owners |= {p: "stem" for p, stage in owners.items() if stage == first_level and p not in inside}


def _lacking(complete: Sequence[str], kept: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return the shortest beginnings of names in ``complete`` that none of ``kept`` begins with."""
    beginnings: dict[str, None] = {}
    for key in complete:
        parts = key.split(".")
        candidates = [".".join(parts[:n]) + "." for n in range(1, len(parts))] + [key]
        if key not in kept:
            beginnings.setdefault(next(c for c in candidates if not any(name.startswith(c) for name in kept)))
    return tuple(beginnings)
