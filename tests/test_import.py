"""What `import backbone` brings along, seen in a fresh interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = [
    "detectron2",
    "torchvision",
    "timm",
    "transformers",
    "huggingface_hub",
    "lightning",
    "torchmetrics",
    "matplotlib",
]
PLUGIN = "plugin_that_nobody_asked_for"
PROBE = f"""
import json, sys, time
import torch
torch_seconds = time.process_time()
before = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.initial_seed()
import backbone
backbone_seconds = time.process_time() - torch_seconds
after = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.initial_seed()
library = sorted(sys.modules)
names = backbone.list_backbones()
listing = "{PLUGIN}" in sys.modules
import backbone.command.app
import backbone.training
print(json.dumps(dict(
    library=library, command=sorted(sys.modules), names=names, imported_by_listing=listing,
    same_state=before == after, torch_seconds=torch_seconds, backbone_seconds=backbone_seconds,
)))
"""


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Import the package beside an installed plugin."""
    site = tmp_path_factory.mktemp("site")
    (site / f"{PLUGIN}.py").write_text("def build(config): ...\n")
    info = site / "plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[backbone.backbones]\nplugged = {PLUGIN}:build\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(site)])}
    command = [sys.executable, "-W", "error", "-c", PROBE]
    done = subprocess.run(command, env=environment, cwd=site, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, object] = json.loads(done.stdout)
    return result


def packages(modules: object) -> set[str]:
    assert isinstance(modules, list)
    return {str(module).partition(".")[0] for module in modules}


@pytest.mark.parametrize("name", HEAVY)
def test_import_backbone_leaves_heavy_libraries_alone(probe: dict[str, object], name: str) -> None:
    assert name not in packages(probe["library"])


@pytest.mark.parametrize("name", HEAVY)
def test_the_command_starts_without_heavy_libraries(probe: dict[str, object], name: str) -> None:
    assert name not in packages(probe["command"])


def test_import_backbone_leaves_plugins_alone(probe: dict[str, object]) -> None:
    assert PLUGIN not in packages(probe["library"])


def test_installed_plugin_is_listed_without_being_imported(probe: dict[str, object]) -> None:
    assert ("plugged" in str(probe["names"]), probe["imported_by_listing"]) == (True, False)


def test_import_backbone_changes_no_global_state_of_torch(probe: dict[str, object]) -> None:
    assert probe["same_state"]


def test_import_backbone_costs_less_than_importing_torch(probe: dict[str, object]) -> None:
    assert float(str(probe["backbone_seconds"])) < float(str(probe["torch_seconds"]))
