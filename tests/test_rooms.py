"""The rooms of the house: imports point one way, the engine has one door, optional libraries have one."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "backbone"
ORDER = (
    {"strict", "console", "stages", "config", "features", "images", "transforms"},
    {"norm", "registry", "bn_eval"},
    {"freeze", "initial", "recipe", "shipped"},
    {"engine"},
    {"providers"},
    {"weights"},
    {"inference"},
    {"preprocessing", "contract", "calling", "plugins"},
    {"builder"},
    {"pyramid"},
    {"hosts"},
    {"pretrained"},
    {"extraction"},
    {"training", "export"},
    {"command"},
)
"""The parts from the ground up: each imports from its own row and those before."""
ROW = {part: row for row, parts in enumerate(ORDER) for part in parts}
HOST_LIBRARIES = {"detectron2", "segmentation_models_pytorch", "mmdet", "mmengine", "transformers"}
FACE = {"backbone.engine"}
ON_DEMAND = {("backbone.features", "pretrained")}
"""Methods of the base class that go the whole way when they are called: ``save_pretrained``, ``from_pretrained``."""


def imports(file: Path) -> Iterator[tuple[str, ast.stmt]]:
    """The modules that ``file`` imports anywhere, as dotted names."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield from ((f"{node.module}.{alias.name}", node) for alias in node.names)


def part_of(name: str) -> str:
    """The part of the package that a dotted module name below it lies in."""
    return name.split(".")[1]


FILES = [
    file
    for file in PACKAGE.rglob("*.py")
    if file.parent != PACKAGE or file.stem not in ("__init__", "__main__")
    if PACKAGE / "configs" not in file.parents  # recipes, no part of the package
]


def dotted(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)


@pytest.mark.parametrize("file", FILES, ids=dotted)
def test_imports_point_one_way(file: Path) -> None:
    own = part_of(dotted(file))
    for name, _ in imports(file):
        if name.startswith("backbone."):
            other = part_of(name)
            if (dotted(file), other) in ON_DEMAND:
                continue
            assert other not in ROW or ROW[other] <= ROW[own], f"{dotted(file)} imports {name}"


@pytest.mark.parametrize("file", FILES, ids=dotted)
def test_the_engine_has_one_door(file: Path) -> None:
    if part_of(dotted(file)) in ("engine", "inference"):
        return
    for name, _ in imports(file):
        if name.startswith("backbone.engine."):
            assert name.count(".") == 2, f"{dotted(file)} imports {name}: only backbone.engine itself is its face"
            assert not (PACKAGE / "engine" / f"{name.rpartition('.')[2]}.py").exists() or name.endswith(".stem"), name


@pytest.mark.parametrize("file", sorted((PACKAGE / "providers").rglob("*.py")), ids=dotted)
def test_providers_import_neither_weights_nor_each_other(file: Path) -> None:
    own = dotted(file).split(".")[2]
    for name, _ in imports(file):
        assert not name.startswith("backbone.weights"), name
        if name.startswith("backbone.providers.") and (PACKAGE / "providers" / own).is_dir():
            assert name.split(".")[2] in (own, "input_channels", "hub"), f"{dotted(file)} imports {name}"


@pytest.mark.parametrize("file", FILES, ids=dotted)
def test_only_a_host_imports_its_library(file: Path) -> None:
    if part_of(dotted(file)) in ("hosts",):
        return
    top = {name.partition(".")[0] for name, _ in imports(file)}
    assert not top & HOST_LIBRARIES, (dotted(file), top & HOST_LIBRARIES)


def test_freezing_knows_no_caches() -> None:
    names = {name for name, _ in imports(PACKAGE / "freeze.py")}
    assert not any(name.startswith(("backbone.engine", "backbone.inference")) for name in names)
    assert "derived" not in (PACKAGE / "freeze.py").read_text()


def test_private_names_of_torch_are_in_one_file() -> None:
    private = ("torch._C", "torch.ops.", "autograd.forward_ad", "_has_any_global_hook", "torch._vmap")
    for file in PACKAGE.rglob("*.py"):
        if file.name != "torch_internals.py" and "export" not in file.parts:  # exported graphs are made of aten's
            assert not [name for name in private if name in file.read_text()], file


@pytest.mark.parametrize(
    "part", sorted(path.name for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir())
)
def test_every_part_has_its_row(part: str) -> None:
    name = part.removesuffix(".py")
    assert name in ROW or name in ("__init__", "__main__", "__pycache__", "configs", "py.typed")
