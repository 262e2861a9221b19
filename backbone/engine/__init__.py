"""Convolution, norm, residual and ReLU as one operation: what makes the package fast, and nothing else.

Take it away, by ``engine_enabled(False)`` or ``BACKBONE_ENGINE=0``, and nothing changes but the time. Networks ask it
at one place per block; it answers with the result, or with None where their modules are to be called. This page is its
face: nothing outside of this folder imports more, but for ``backbone.inference``.
"""

from backbone.engine.calls import has_hook, has_hook_within
from backbone.engine.folded import mlp
from backbone.engine.known import Parts, register_block, register_mlp, register_pairs, register_sequence
from backbone.engine.operation import conv_norm_act, residual_block, run_blocks
from backbone.engine.report import EngineReport, engine_report
from backbone.engine.stem import stem
from backbone.engine.switch import engine_enabled

__all__ = [
    "EngineReport",
    "Parts",
    "conv_norm_act",
    "engine_enabled",
    "engine_report",
    "has_hook",
    "has_hook_within",
    "mlp",
    "register_block",
    "register_mlp",
    "register_pairs",
    "register_sequence",
    "residual_block",
    "run_blocks",
    "stem",
]
