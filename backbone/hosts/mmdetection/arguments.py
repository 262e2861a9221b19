"""mmdetection's arguments of a backbone in our words. No mmengine."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from backbone.config import GN_GROUPS
from backbone.providers.resnet.blocks import BasicBlock
from backbone.providers.resnet.network import FAMILY
from backbone.stages import OUTPUT_STRIDES, STAGE_NAMES, plan_stages

Setting = Mapping[str, Any]

NORM_CFG: Final = {"type": "BN", "requires_grad": True}
"""mmdetection's default."""

_FEATURES: Final = STAGE_NAMES[1:]
"""c2 to c5 are mmdetection's stages 0 to 3; its stem has no number, and frozen_stages 0 freezes it."""

_RESNEXTS: Final = {(50, 32, 4): "resnext50_32x4d", (101, 32, 8): "resnext101_32x8d", (101, 64, 4): "resnext101_64x4d"}
"""mmdetection's depth, groups and base_width."""

_NORMS: Final = {"BN": "bn", "BN2d": "bn", "SyncBN": "sync_bn", "GN": "gn"}


def one_way(**settings: object) -> None:
    """Refuse settings that say the same thing.

    Raises:
        ValueError: If more than one of them is not None.
    """
    said = [f"{key}={value!r}" for key, value in settings.items() if value is not None]
    if len(said) > 1:
        raise ValueError(f"{' and '.join(settings)} say the same thing, got {', '.join(said)}; keep one of them")


def name_of(depth: int | None, groups: int, base_width: int) -> str:
    """Return our name of mmdetection's ResNet or ResNeXt.

    Raises:
        ValueError: If we have none of this depth and width.
    """
    if depth is None:
        raise ValueError("name must say which backbone to build, such as resnet50, or depth in mmdetection's way")
    name = f"resnet{depth}" if groups == 1 else _RESNEXTS.get((depth, groups, base_width), "")
    if name not in FAMILY:
        raise ValueError(
            f"depth must be 18, 34, 50, 101 or 152, or with groups and base_width one of "
            f"{', '.join(map(str, _RESNEXTS))}, got {depth}, {groups}, {base_width}; other networks have a name"
        )
    return name


def freeze_at_of(frozen_stages: int | None) -> int:
    """Return our count, from the stem, of mmdetection's frozen_stages; None is its default, -1.

    Raises:
        ValueError: If it is not -1 to 4.
    """
    last = len(_FEATURES)
    if frozen_stages is not None and (type(frozen_stages) is not int or not -1 <= frozen_stages <= last):
        raise ValueError(f"frozen_stages must be -1 (none), 0 (the stem) to {last} (all), got {frozen_stages!r}")
    return 0 if frozen_stages is None else frozen_stages + 1


def features_of(out_indices: Sequence[int] | None, num_stages: int) -> tuple[str, ...]:
    """Return our names of mmdetection's stages; None is all ``num_stages``.

    Raises:
        ValueError: If an index is none of them.
    """
    known = range(num_stages if num_stages in range(1, len(_FEATURES) + 1) else 0)
    if not known or any(index not in known for index in out_indices or ()):
        raise ValueError(
            f"out_indices must be 0 to num_stages - 1, and num_stages 1 to 4, got {out_indices} of {num_stages}"
        )
    return tuple(_FEATURES[index] for index in sorted(known if out_indices is None else out_indices))


def norm_of(norm_cfg: Setting, norm_eval: bool) -> str:
    """Return our name of mmdetection's norm.

    Raises:
        ValueError: If we have none like it.
    """
    unknown = set(norm_cfg) - {"type", "requires_grad", "num_groups"}
    kind, trains = _NORMS.get(str(norm_cfg.get("type"))), norm_cfg.get("requires_grad", True)
    if kind is None or unknown or norm_cfg.get("num_groups", GN_GROUPS) != GN_GROUPS:
        raise ValueError(
            f"norm_cfg must have a type, {', '.join(_NORMS)}, requires_grad and, for GN, num_groups={GN_GROUPS}, got "
            f"{dict(norm_cfg)}"
        )
    if not trains and (kind == "gn" or not norm_eval):
        raise ValueError(
            f"norm_cfg with requires_grad=False needs a batch norm and norm_eval=True, got {dict(norm_cfg)} and "
            f"norm_eval={norm_eval}; no norm here learns statistics and nothing else"
        )
    if kind == "gn" or not norm_eval:
        return kind
    return "bn_eval" if trains else "frozen_bn"


def stride_in_1x1_of(style: str | None) -> bool:
    """Return where a bottleneck strides in mmdetection's ``style``; None is its default, pytorch.

    Raises:
        ValueError: If it is no style of mmdetection.
    """
    if style not in (None, "pytorch", "caffe"):
        raise ValueError(f"style must be pytorch (stride in the 3x3) or caffe (in the first 1x1), got {style!r}")
    return style == "caffe"


def output_stride_of(num_stages: int, strides: Sequence[int] | None) -> int:
    """Return the output stride that gives each stage this stride; None is mmdetection's default, (1, 2, 2, 2).

    Raises:
        ValueError: If none does.
    """
    known = {tuple(plan.stride for plan in plan_stages(stride))[:num_stages]: stride for stride in OUTPUT_STRIDES[::-1]}
    wanted = tuple((1, 2, 2, 2) if strides is None else strides)[:num_stages]
    if wanted not in known:
        raise ValueError(f"strides must be {' or '.join(map(str, known))}, got {wanted}")
    return known[wanted]


def dilations_of(name: str, output_stride: int, dilations: Sequence[int] | None) -> tuple[int, ...] | None:
    """Return the dilation of C2 to C5; None where it is what the output stride asks for, or nothing is said.

    Raises:
        ValueError: If the network's blocks would dilate otherwise than mmdetection's.
    """
    if dilations is None:
        return None
    given = (*dilations, *[dilations[-1]] * (len(_FEATURES) - len(dilations)))
    if max(given) > 1 and name in FAMILY and FAMILY[name].block is BasicBlock:
        raise ValueError(
            f"dilations must be 1 for {name}: mmdetection dilates the first convolution of its blocks alone, we both; "
            f"set output_stride for that, got {tuple(dilations)}"
        )
    usual = tuple(plan.dilation for plan in plan_stages(output_stride))
    return None if given == usual else given
