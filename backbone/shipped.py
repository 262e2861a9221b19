"""The recipes that come with the package, by name: ``faster_rcnn_resnet50`` instead of a path."""

import os
from pathlib import Path
from typing import Final

import yaml

from backbone.config import BackboneConfig, did_you_mean, read_yaml
from backbone.recipe import DetectorConfig

FOLDER: Final = Path(__file__).parent / "configs"
YAML_SUFFIXES: Final = (".yaml", ".yml")


def shipped_recipes() -> dict[str, Path]:
    """Return the file of each recipe of the package, by its name without suffix."""
    return {path.stem: path for path in sorted(FOLDER.rglob("*.yaml"))}


def find_recipe(name: str | os.PathLike[str]) -> Path:
    """Return the file that ``name`` means: a file at that path first, else the package's own recipe.

    Raises:
        FileNotFoundError: If there is neither; names the nearest of the package's.
    """
    text, path = os.fspath(name), Path(name)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if text in shipped:
        return shipped[text]
    if path.suffix in YAML_SUFFIXES or len(path.parts) > 1:
        raise FileNotFoundError(f"config must be an existing YAML file, got {text!r}; check the path")
    raise FileNotFoundError(
        f"config must be a YAML file or a recipe of the package, got {text!r}{did_you_mean(text, shipped)} "
        f"recipes: {', '.join(shipped)}"
    )


def load_recipe(name: str | os.PathLike[str]) -> BackboneConfig | DetectorConfig:
    """Read a recipe, a backbone's or a detector's: whichever the file describes.

    Raises:
        FileNotFoundError: If there is no such file or recipe.
        ValueError: If it is not YAML or breaks a rule; names file, key, rule and remedy.
    """
    path = find_recipe(name)
    return read_yaml(path, DetectorConfig) if _describes_a_detector(path) else read_yaml(path, BackboneConfig)


def _describes_a_detector(path: Path) -> bool:
    try:
        content = yaml.safe_load(path.read_bytes())
    except Exception:  # ``read_yaml`` tells what is wrong with it
        return False
    return isinstance(content, dict) and bool({"detector", "backbone"} & content.keys())
