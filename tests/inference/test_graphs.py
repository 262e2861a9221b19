"""What of the graphed extractor shows without a GPU: it stands in for its extractor, and forgets graphs in time."""

import contextlib
import copy
import threading
import time
from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from conftest import build
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from backbone import optimize_for_inference
from backbone.inference.graphs import GraphedExtractor

pytestmark = pytest.mark.filterwarnings("ignore:cuda_graphs=True needs a CUDA device")
CHANGES: dict[str, Any] = {
    "loading": lambda model: model.load_state_dict(model.state_dict()),
    "moving": lambda model: model.double(),
    "copying": copy.deepcopy,
}


def graphed() -> GraphedExtractor:
    model = optimize_for_inference(build(), cuda_graphs=True)
    assert isinstance(model, GraphedExtractor)
    return model


@torch.no_grad()
def test_off_cuda_it_runs_its_extractor() -> None:
    model, images = graphed(), torch.randn(1, 3, 64, 64)
    assert torch.equal(model(images)["c5"], model.extractor(images)["c5"])


def test_what_the_extractor_has_is_found_on_it() -> None:
    assert graphed().feature_specs["c5"].stride == 32
    with pytest.raises(AttributeError, match="nonsense"):
        _ = graphed().nonsense


@pytest.mark.parametrize("change", CHANGES)
def test_graphs_are_forgotten_after(change: str) -> None:
    model = graphed()
    model._graphs["a shape"] = None  # type: ignore[assignment]
    changed = CHANGES[change](model) if change == "copying" else (CHANGES[change](model), model)[1]
    assert not changed._graphs


class Recorder:
    """Stands in for torch.cuda where there is none: it records which graphs are captured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.devices: list[object] = []
        self.streams: list[object] = []
        self.pools: list[object] = []
        for name in ("Stream", "current_stream", "CUDAGraph", "graph_pool_handle"):
            monkeypatch.setattr(torch.cuda, name, Mock())
        monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(torch.cuda, "device", self.device)
        monkeypatch.setattr(torch.cuda, "graph", self.graph)

    @contextlib.contextmanager
    def device(self, device: object) -> Iterator[None]:
        self.devices.append(device)
        yield
        self.devices.append(None)

    @contextlib.contextmanager
    def graph(self, _graph: object, *, pool: object, stream: object, capture_error_mode: str) -> Iterator[None]:
        self.pools.append(pool)
        assert capture_error_mode == "thread_local"  # other threads may go on allocating
        assert self.devices[-1] is not None
        self.streams.append(stream)
        yield


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    recorder = Recorder(monkeypatch)
    with FakeTensorMode():
        yield recorder


class Doubling(nn.Module):
    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"c2": images * 2}


def test_a_graph_captured_in_inference_mode_is_replayed_under_no_grad(recorder: Recorder) -> None:
    model, images = GraphedExtractor(Doubling()), torch.empty(1, 3, 8, 8, device="cuda")
    with torch.inference_mode():
        model(images)
    with torch.no_grad():
        model(images)
    assert len(recorder.streams) == 1


def test_a_graph_is_captured_on_the_device_of_its_images_whichever_is_current(recorder: Recorder) -> None:
    images = torch.empty(1, 3, 8, 8, device="cuda:1")
    with torch.no_grad():
        GraphedExtractor(Doubling())(images)
    assert recorder.devices == [images.device, None]
    torch.cuda.Stream.assert_called_once_with(images.device)  # type: ignore[attr-defined]
    assert recorder.streams == [torch.cuda.Stream.return_value]  # type: ignore[attr-defined]


def test_a_graph_captured_under_autocast_is_not_replayed_without(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images = GraphedExtractor(Doubling()), torch.empty(1, 3, 8, 8, device="cuda")
    for settings in ((False, torch.float16), (True, torch.float16), (True, torch.bfloat16), (True, torch.float16)):
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda _, is_on=settings[0]: is_on)
        monkeypatch.setattr(torch, "get_autocast_dtype", lambda _, dtype=settings[1]: dtype)
        with torch.no_grad():
            model(images)
    assert len(recorder.streams) == 3


def test_graphs_of_all_shapes_share_one_pool(recorder: Recorder) -> None:
    model = GraphedExtractor(Doubling())
    with torch.no_grad():
        for size in (8, 16, 8):
            model(torch.empty(1, 3, size, size, device="cuda"))
    assert len(recorder.streams) == 2
    assert recorder.pools == [torch.cuda.graph_pool_handle.return_value] * 2  # type: ignore[attr-defined]
    assert torch.cuda.graph_pool_handle.call_count == 1  # type: ignore[attr-defined]


class SlowReplay:
    """Stands in for a graph on a device: it computes from what lies in its images while it is at work."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images, self.features = images.clone(), {"c2": images * 2}
        self.graph = self

    def replay(self) -> None:
        half = self.images[:, :1] * 2
        time.sleep(0.002)  # another thread would now write its images
        self.features["c2"].copy_(torch.cat([half, self.images[:, 1:] * 2], 1))


def test_four_threads_on_one_copy_never_mix_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", Mock())
    model: Any = GraphedExtractor(Doubling())
    model._capture = SlowReplay
    mixed = []

    def serve(number: int) -> None:
        for turn in range(20):
            images = torch.full((1, 3, 4, 4), float(100 * number + turn))
            with torch.no_grad():
                mixed.append(not torch.equal(model._replayed(images)["c2"], images * 2))

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(mixed) == 80
    assert not any(mixed)


def test_a_stream_waits_for_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Mock()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    model: Any = GraphedExtractor(Doubling())
    model._capture = SlowReplay
    with torch.no_grad():
        model._replayed(torch.ones(1, 3, 4, 4))
        stream.wait_event.assert_not_called()
        model._replayed(torch.ones(1, 3, 4, 4))
    stream.wait_event.assert_called_once_with(stream.record_event.return_value)


def test_graphs_without_a_device_are_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.warns(UserWarning, match="cuda_graphs=True needs a CUDA device"):
        optimize_for_inference(build(), cuda_graphs=True)
