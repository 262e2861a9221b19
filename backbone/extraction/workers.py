"""How many processes read images."""

import os
from typing import Final, Literal

import torch

_MOST: Final = 16
_PROCESSORS_PER_WORKER_ON_CPU: Final = 4


def workers_for(workers: int | Literal["auto"], device: torch.device) -> int:
    """Return how many processes read; ``auto`` takes all processors beside a GPU, and few where the network needs them.

    Raises:
        ValueError: If it is no count.
    """
    if workers == "auto":
        processors = processors_here()
        if device.type != "cpu":
            return min(_MOST, processors)
        return max(1, min(_MOST, processors // _PROCESSORS_PER_WORKER_ON_CPU))
    if type(workers) is not int or workers < 0:
        raise ValueError(f"workers must be a whole number of 0 or more, or auto, got {workers!r}")
    return workers


def processors_here() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
