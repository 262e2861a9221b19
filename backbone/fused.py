"""Convolution, norm, residual and ReLU as one operation, used by every block."""

import torch.nn.functional as F
from torch import Tensor, nn


def conv_norm_act(
    x: Tensor, conv: nn.Conv2d, norm: nn.Module, residual: Tensor | None = None, *, relu: bool = True
) -> Tensor:
    """Return ``relu(norm(conv(x)) + residual)``.

    Args:
        x: Features (N, C_in, H, W).
        conv: The convolution.
        norm: Its norm, C_out channels.
        residual: Added before the ReLU, shaped like the result.
        relu: Whether a ReLU ends the operation.

    Returns:
        Features (N, C_out, H_out, W_out) in the dtype of the convolution's output.
    """
    out: Tensor = norm(conv(x))
    if residual is not None:
        out = out + residual
    return F.relu(out, inplace=True) if relu else out
