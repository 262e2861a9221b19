"""How long something takes: several candidates in shuffled rounds, so that a slow moment of the machine touches all."""

import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

import numpy as np
import torch

TIMED_SECONDS: Final = 0.05
"""At least this long per candidate and round, so that the clock's grain does not count."""

Run = Callable[[], object]


def time_loops(device: str, run: Run, loops: int) -> float:
    """Return seconds per call of ``run``, by the device's own clock; ``device`` is ``cpu`` or ``cuda``."""
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(loops):
            run()
        return (time.perf_counter() - start) / loops
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    first.record()
    for _ in range(loops):
        run()
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last)) / 1000 / loops


def loops_for(device: str, run: Run) -> int:
    """Return how many calls fill ``TIMED_SECONDS``; warms up, too."""
    return math.ceil(TIMED_SECONDS / min(time_loops(device, run, 1) for _ in range(3)))


def time_rounds(device: str, candidates: Mapping[str, Run], rounds: int) -> Iterator[dict[str, float]]:
    """Time every candidate once per round, in shuffled order; yield each round's seconds per call by name."""
    order = random.Random(0)
    loops = {name: loops_for(device, run) for name, run in candidates.items()}
    for _ in range(rounds):
        gc.collect()
        shuffled = order.sample(list(candidates), len(candidates))
        yield {name: time_loops(device, candidates[name], loops[name]) for name in shuffled}


def quartiles(times: Sequence[float]) -> tuple[float, float, float]:
    """Return lower quartile, median and upper quartile."""
    low, median, high = np.quantile(times, (0.25, 0.5, 0.75)).tolist()
    return low, median, high
