"""Whether numbers are finite: where they are not, the CPU's fused kernels would hide it.

oneDNN's ReLU makes 0 of NaN, torch's keeps it, and a training run that goes wrong is noticed by its NaN. So the engine
looks: at what enters a block, at each call, and at weights, where they are folded or prepared. NaN or infinity in them
leaves the ReLU to torch. A sum finds both, for it is finite only where all of its terms are; it costs about 2 % of a
forward pass. What is not looked at is an overflow within one block of finite inputs and weights.
"""

import math

import torch
from torch import Tensor


def is_finite(*tensors: Tensor | None) -> bool:
    """Whether all numbers are finite; on CUDA, where a look would wait for the device, they are taken to be."""
    return all(tensor is None or tensor.device.type != "cpu" or math.isfinite(_sum(tensor)) for tensor in tensors)


def _sum(tensor: Tensor) -> float:
    """The sum, in a dtype that it does not leave."""
    dtype = torch.float32 if tensor.dtype == torch.float16 else None
    return float(tensor.detach().sum(dtype=dtype))
