"""A pytest plugin that runs detectron2's own tests on our backbones; scripting apart, which is deprecated in torch."""

from typing import Any

import detectron2.modeling.backbone as their_backbones
import detectron2.utils.testing as their_testing
import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import LazyConfig, get_cfg
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import fpn
from detectron2_pairs import CONFIGS, with_our_name

from backbone.hosts.detectron2 import DROP_IN_BUILDERS, HostedBackbone

built = 0


def get_config(path: str, trained: bool = False) -> Any:
    """As model_zoo.get_config, which an uninstalled checkout cannot offer."""
    assert not trained
    if path.endswith(".yaml"):
        cfg = get_cfg()
        cfg.merge_from_file(str(CONFIGS / path), allow_unsafe=True)
        return with_our_name(cfg)
    cfg = LazyConfig.load(str(CONFIGS / path))
    cfg.model = with_our_name(cfg.model)
    return cfg


def count(self: Any, *arguments: Any, **settings: Any) -> None:
    global built  # noqa: PLW0603
    built += 1
    construct(self, *arguments, **settings)


model_zoo.get_config = their_testing.model_zoo.get_config = get_config
for theirs, ours in DROP_IN_BUILDERS.items():
    for module in (their_backbones, fpn):
        if hasattr(module, theirs):
            setattr(module, theirs, BACKBONE_REGISTRY.get(ours))
torch.jit.script = lambda module: module  # type: ignore[assignment]
construct, HostedBackbone.__init__ = HostedBackbone.__init__, count  # type: ignore[method-assign]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"{built} backbones of ours were built")
