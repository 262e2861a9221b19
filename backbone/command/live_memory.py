"""How much memory a forward pass needs at most, counted tensor by tensor: the same on every machine."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that are made within it and still alive, and remembers the most.

    Attributes:
        peak: Most bytes at one time.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._live = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        """Run the operation and count the memory of what it made."""
        given = {_address(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor) and _address(result) not in given:
                self._count(result)
        return results

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if _address(tensor) in self._seen:
            return
        self._seen.add(_address(tensor))
        self._live += storage.nbytes()
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._forget, _address(tensor), storage.nbytes())

    def _forget(self, address: int, size: int) -> None:
        self._seen.discard(address)
        self._live -= size


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def peak_memory(device: torch.device, run: Callable[[], object]) -> int:
    """Return the most bytes that ``run`` holds at one time beyond what was there before.

    On CUDA by its allocator, workspaces included; on the CPU the tensors that are alive.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    counter = LiveMemory()
    with counter:
        run()
    return counter.peak
