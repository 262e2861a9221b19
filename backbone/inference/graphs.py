"""One CUDA graph per image shape: no launch overhead, which is most of the time at small batches."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from backbone.features import Features


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    images: Tensor
    features: object


class GraphedExtractor(nn.Module):
    """Runs a feature extractor by replaying a CUDA graph captured at the first image of each shape.

    Features are copies, so that those of one image survive the next. One call at a time copies its images in, replays
    and copies its features out, on whatever thread and stream: graphs share one memory pool. Off CUDA, where a gradient
    is needed, or while a graph is being captured around it, the extractor runs as it is. Everything else it has, such
    as ``feature_specs``, is found here too.

    Args:
        extractor: Backbone, or backbone with pyramid: images (N, C, H, W) -> dict, list or tuple of feature maps.
            Loading a state dict here and moving it capture anew; any other change of its weights must not happen.
        max_shapes: Number of image shapes whose graphs are kept; the one used longest ago goes first.
    """

    def __init__(self, extractor: nn.Module, max_shapes: int = 8) -> None:
        super().__init__()
        self.extractor = extractor
        self.max_shapes = max_shapes
        self._graphs: OrderedDict[object, _Graph] = OrderedDict()
        self._turn = _Turn()

    def forward(self, images: Tensor) -> Features:
        """Images (N, C, H, W) -> what the extractor returns."""
        if not images.is_cuda or torch.is_grad_enabled() or torch.cuda.is_current_stream_capturing():
            return self.extractor(images)  # type: ignore[no-any-return]
        return self._replayed(images)

    def _replayed(self, images: Tensor) -> Features:
        """Copy ``images`` into the graph of their kind, replay it, and copy its features out."""
        autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        key = (images.device, images.dtype, images.shape, images.stride(), autocast)
        with self._turn.on(images.device):
            graph = self._graphs.get(key) or self._captured(key, images)
            self._graphs.move_to_end(key)
            graph.images.copy_(images)
            graph.graph.replay()
            return _cloned(graph.features)  # type: ignore[return-value]

    def _captured(self, key: object, images: Tensor) -> _Graph:
        """Capture a graph for images like these, and forget the one used longest ago where there are too many."""
        graph = self._graphs[key] = self._capture(images)
        if len(self._graphs) > self.max_shapes:
            self._graphs.popitem(last=False)
        return graph

    def _capture(self, images: Tensor) -> _Graph:
        # on the device of the images, whichever is the current one; and inference tensors could not be written later
        with torch.cuda.device(images.device), torch.inference_mode(False), torch.no_grad():
            images = images.clone()
            stream = torch.cuda.Stream(images.device)  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.extractor(images)  # cuDNN chooses its kernels before the capture
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            pool = self._turn.pool(images.device)
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                features = self.extractor(images)
        return _Graph(graph, images, features)

    def _forget(self) -> None:
        """Drop all graphs, which hold the addresses of the old weights."""
        self._graphs.clear()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._forget()
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "extractor":
                raise
            return getattr(self.extractor, name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_graphs": OrderedDict(), "_turn": _Turn()}  # these can be neither copied nor pickled


def _cloned(features: object) -> object:
    """Return copies of feature maps, in the container they came in."""
    if isinstance(features, dict):
        return {name: _cloned(feature) for name, feature in features.items()}
    if isinstance(features, list | tuple):
        return type(features)(_cloned(feature) for feature in features)
    return features.clone() if isinstance(features, Tensor) else features


class _Turn:
    """Who may use the graphs of one extractor: a thread at a time, and on the device a stream at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._done: dict[torch.device, torch.cuda.Event] = {}
        self._pools: dict[torch.device, Any] = {}

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Wait until the last one's work on ``device`` is done, on this thread's stream, and let the next one wait."""
        with self._lock:
            stream = torch.cuda.current_stream(device)
            if device in self._done:
                stream.wait_event(self._done[device])
            yield
            self._done[device] = stream.record_event()

    def pool(self, device: torch.device) -> Any:  # noqa: ANN401
        """The memory that all graphs on ``device`` share: never two of them are at work."""
        if device not in self._pools:
            self._pools[device] = torch.cuda.graph_pool_handle()
        return self._pools[device]

    def __reduce__(self) -> tuple[type["_Turn"], tuple[()]]:
        return _Turn, ()  # a copy of the extractor has turns of its own
