"""Layers of transformers' heads whose norms an inference copy folds as well."""

import sys
from typing import Final

from backbone.engine import register_pairs

CONV_NORM_LAYERS: Final = {
    "transformers.models.rt_detr.modeling_rt_detr.RTDetrConvNormLayer": "norm",
    "transformers.models.rt_detr_v2.modeling_rt_detr_v2.RTDetrV2ConvNormLayer": "norm",
    "transformers.models.d_fine.modeling_d_fine.DFineConvNormLayer": "norm",
    "transformers.models.deimv2.modeling_deimv2.Deimv2ConvNormLayer": "norm",
    "transformers.models.omdet_turbo.modeling_omdet_turbo.OmDetTurboConvNormLayer": "norm",
    "transformers.models.upernet.modeling_upernet.UperNetConvModule": "batch_norm",
}
"""Classes that compute ``activation(norm(conv(x)))``, and what they call their norm."""


def register_heads() -> None:
    """Let inference copies fold the norms of those that are imported: a detector's are, once it builds its backbone."""
    for path, norm in CONV_NORM_LAYERS.items():
        module, _, name = path.rpartition(".")
        cls = getattr(sys.modules.get(module), name, None)
        if cls is not None:
            register_pairs(cls, ("conv", norm))
