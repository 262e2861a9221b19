"""Docstrings are read: no sentence of more than thirty words."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "backbone"
FILES = sorted(PACKAGE.rglob("*.py"))
LIMIT = 30
PARTS = re.compile(r"\n\s*\n|\n(?=\s*[-*] )|\n(?=\s{4,}\w+: )|\n(?=\w+:$)")
"""Where a new thing begins in a docstring: a paragraph, an item of a list, an argument."""


def sentences(file: Path) -> Iterator[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(file.read_text())):
        text = ast.get_docstring(node) if isinstance(node, documented) else None
        for part in PARTS.split(text or ""):
            if "::" not in part and "    python " not in part:
                yield from re.split(r"(?<=[.!?:;])\s+", " ".join(part.split()))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_sentence_is_longer_than_thirty_words(file: Path) -> None:
    words = {
        sentence: [word for word in sentence.split() if re.search("[A-Za-z]", word)] for sentence in sentences(file)
    }
    assert not [sentence for sentence, found in words.items() if len(found) > LIMIT]
