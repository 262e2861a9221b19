"""Every kind of backbone in every host: one training step and one inference each."""

import warnings
from pathlib import Path

import pytest
import torch
from matrix import BACKBONES, HOSTS, PAGE, table

from backbone import register_backbone
from backbone import registry as registry_module

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "tests" / "providers" / "example_plugin"
CELLS = [(host, detector) for host, (_, detectors) in HOSTS.items() for detector in detectors]


@pytest.fixture(autouse=True)
def _example_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the example as its entry point would; tests/test_plugin.py installs it."""
    monkeypatch.setattr(registry_module, "_constructors", dict(registry_module._constructors))
    monkeypatch.syspath_prepend(str(EXAMPLE))
    import example_plugin

    register_backbone("tiny_pyramid_net")(example_plugin.build)


@pytest.mark.parametrize(("host", "detector"), CELLS, ids=lambda part: part)
@pytest.mark.parametrize("backbone", BACKBONES.values())
def test_backbone_trains_and_infers_in(host: str, detector: str, backbone: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.script.*` is deprecated")  # detectron2 uses it
        warnings.filterwarnings("ignore", message="torch.meshgrid")  # detectron2 and mmdet do not name the indexing
        model, loss, infer = HOSTS[host][0](detector, backbone)
        model.train()
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        loss().backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.eval()
        with torch.no_grad():
            assert infer()
    wrong = [name for name, p in model.named_parameters() if (p.grad is not None) != p.requires_grad]
    assert wrong == []
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert frozen
    assert moved
    assert not moved & set(frozen)


def test_the_table_in_the_docs_is_this_matrix() -> None:
    assert PAGE.read_text() == table(), "run python tests/hosts/matrix.py --write"
