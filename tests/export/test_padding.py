"""Padding is traced with sizes that cancel, and adds what it always adds."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cells import backbone
from conftest import relative_error
from torch import Tensor, nn
from torch.export import Dim
from torch.fx.experimental import _config as symbolic_shapes

from backbone.export.network import understand
from backbone.export.padding import cancelling_sizes, same_padding
from backbone.export.request import Request
from backbone.export.tracing import trace

LONGEST_SIZE = 200
"""Letters of a size in a graph up to C3: 106 in Swin, 61 in EfficientNet; 307 and 876 where nothing cancels."""


class Windows(nn.Module):
    """Fills sides up to whole windows of 7, crops them again and halves them, as Swin does."""

    def __init__(self, pad: str) -> None:
        super().__init__()
        self.pad = pad

    def forward(self, x: Tensor) -> Tensor:
        """Values (N, H) -> (N, H / 8); sizes round up."""
        for _ in range(3):
            side = x.shape[1]
            amount = (7 - side % 7) % 7 if self.pad == "twice" else -side % 7
            windows = F.pad(x, (0, amount)).view(len(x), -1, 7)
            x = (windows + windows.mean(2, keepdim=True)).flatten(1)[:, :side]
            x = F.pad(x, (0, side % 2)).view(len(x), -1, 2).sum(2)
        return x


def sizes(program: torch.export.ExportedProgram) -> list[str]:
    """Every size in the graph, as it is written."""
    values = [node.meta.get("val") for node in program.graph.nodes]
    return [str(side) for value in values if isinstance(value, Tensor) for side in value.shape]


@pytest.mark.parametrize("pad", ["twice", "negative"])
def test_sizes_stay_short_however_often_a_side_is_filled_up(pad: str) -> None:
    model = Windows(pad)
    any_contiguity = symbolic_shapes.patch(backed_size_oblivious=True)  # type: ignore[attr-defined] # a config module's
    with cancelling_sizes(), any_contiguity:
        program = torch.export.export(model, (torch.rand(2, 100),), dynamic_shapes=({1: Dim.AUTO},), strict=False)
    assert "Mod" not in " ".join(sizes(program))
    for side in (96, 97, 98, 115):
        values = torch.rand(2, side)
        assert torch.equal(program.module()(values), model(values))


@pytest.mark.parametrize("window", [(3, 1, 1), (3, 2, 1), (5, 2, 1), (3, 2, 2), (1, 2, 1), (2, 3, 1)])
def test_padding_of_tensorflow_gives_the_side_by_the_stride_rounded_up(window: tuple[int, int, int]) -> None:
    kernel_size, stride, dilation = window
    for side in range(1, 40):
        padded = side + same_padding(side, *window)
        assert (padded - (kernel_size - 1) * dilation - 1) // stride + 1 == math.ceil(side / stride)


def test_timms_own_function_is_back_afterwards_and_stays_where_it_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    padding: Any = pytest.importorskip("timm.layers.padding", reason="pip install 'backbone[timm]'")
    theirs = padding.get_same_padding
    with cancelling_sizes():
        assert padding.get_same_padding is not theirs
        assert padding.get_same_padding(5, 3, 2, 1) == theirs(5, 3, 2, 1)
    assert padding.get_same_padding is theirs
    with pytest.raises(KeyError), cancelling_sizes():
        raise KeyError
    assert padding.get_same_padding is theirs
    for other in (lambda side, kernel_size, stride, dilation: 0, lambda side: 0):
        monkeypatch.setattr(padding, "get_same_padding", other)
        with cancelling_sizes():
            assert padding.get_same_padding is other


@pytest.mark.parametrize("name", ["timm/swin_tiny_patch4_window7_224", "timm/tf_efficientnet_lite0"])
def test_networks_that_pad_within_are_traced_for_any_size_in_sizes_that_stay_short(name: str) -> None:
    pytest.importorskip("timm", reason="pip install 'backbone[timm]'")
    model = backbone(name, norm="bn", out_features=("c2", "c3")).eval()
    request = Request(Path("model.pt2"), "torch-export")
    traced = trace(understand(model, request), request)
    assert max(map(len, sizes(traced.program))) < LONGEST_SIZE
    for size in ((67, 97), (96, 128)):
        images = torch.rand(1, 3, *size)
        with torch.no_grad():
            expected, actual = model(images), traced.program.module()(images)
        assert all(relative_error(actual[level], expected[level]) < 1e-5 for level in ("c2", "c3"))
