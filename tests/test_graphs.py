"""What of the graphed extractor shows without a GPU: it stands in for its extractor, and forgets graphs in time."""

import copy
from typing import Any

import pytest
import torch
from conftest import build

from backbone import optimize_for_inference
from backbone.graphs import GraphedExtractor

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
