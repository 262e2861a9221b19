"""What of the graphed extractor shows without a GPU: it stands in for its extractor, and forgets graphs in time."""

import contextlib
import copy
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
        for name in ("Stream", "current_stream", "CUDAGraph"):
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
    def graph(self, _graph: object, *, stream: object, capture_error_mode: str) -> Iterator[None]:
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
