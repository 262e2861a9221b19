"""Frozen batch norms of other libraries, known by their full class names: none of these libraries is imported."""

from typing import Final

from torch import nn

_WITH_EPS: Final = (
    "torchvision.ops.misc.FrozenBatchNorm2d",
    "detectron2.layers.batch_norm.FrozenBatchNorm2d",
    "timm.layers.norm_act.FrozenBatchNormAct2d",
)
"""Classes with an attribute ``eps``; timm's has a drop layer and an activation besides."""

_DETR_EPS: Final = 1e-5
_DETRS: Final = {
    "conditional_detr": "ConditionalDetr",
    "d_fine": "DFine",
    "dab_detr": "DabDetr",
    "deformable_detr": "DeformableDetr",
    "deimv2": "Deimv2",
    "detr": "Detr",
    "grounding_dino": "GroundingDino",
    "mm_grounding_dino": "MMGroundingDino",
    "pp_doclayout_v2": "PPDocLayoutV2",
    "pp_doclayout_v3": "PPDocLayoutV3",
    "pp_doclayout_v4": "PPDocLayoutV4",
    "rt_detr": "RTDetr",
    "rt_detr_v2": "RTDetrV2",
    "table_transformer": "TableTransformer",
}
_OF_TRANSFORMERS: Final = frozenset(
    f"transformers.models.{model}.modeling_{model}.{prefix}FrozenBatchNorm2d" for model, prefix in _DETRS.items()
)
"""transformers' classes, whose ``forward`` has DETR's eps written into it (transformers 5.23)."""


def frozen_eps(norm: nn.Module) -> float | None:
    """Return the eps of another library's frozen norm; None where ``norm`` is of no known class."""
    name = f"{type(norm).__module__}.{type(norm).__qualname__}"
    if name in _WITH_EPS:
        return float(norm.eps)  # type: ignore[arg-type]
    return _DETR_EPS if name in _OF_TRANSFORMERS else None


def what_follows(norm: nn.Module) -> nn.Module:
    """Return what another library's frozen norm does after scale and shift."""
    drop, act = getattr(norm, "drop", None), getattr(norm, "act", None)
    layers = [layer for layer in (drop, act) if layer is not None and type(layer) is not nn.Identity]
    return layers[0] if len(layers) == 1 else nn.Sequential(*layers) if layers else nn.Identity()
