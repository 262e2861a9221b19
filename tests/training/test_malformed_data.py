"""Odd records cost themselves and nothing else: the table of ``malformed.py``, read under limits in a process apart."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from malformed import cases

ROOT = Path(__file__).parents[2]
CASES = cases()
NAMED = {"s": "annotation", "b": "annotation", "p": "polygon", "i": "image", "g": "categor", "d": "was there before"}
"""What a line on what was left out has in it, by the letter of the table."""


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What came of each case; those that the process did not live to write are absent."""
    folder = tmp_path_factory.mktemp("malformed")
    program = [sys.executable, str(Path(__file__).parent / "malformed.py"), str(folder / "data"), str(folder / "log")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False, timeout=200)
    found = dict(json.loads(line) for line in (folder / "log").read_text().splitlines())
    if len(found) < len(CASES):
        found["died"] = f"in {list(CASES)[len(found)]!r} with {done.returncode}: {done.stderr[-800:]}"
    return found


def test_the_table_has_at_least_120_cases() -> None:
    assert len(CASES) >= 120


@pytest.mark.parametrize("case", CASES)
def test_an_odd_record_ends_as_the_table_says(case: str, read: dict[str, Any]) -> None:
    _, letter, _, _ = CASES[case]
    assert case in read, read.get("died")
    came = read[case]
    assert (came["refused"] is not None) == (letter == "r"), came["refused"]
    if letter not in "rx":
        assert came["same"] is True
        assert came["AP"] is None or came["AP"] == pytest.approx(1.0)
        assert any(NAMED[letter] in line for line in came["skipped"]) if letter in NAMED else not came["skipped"]
        assert all(line in came["summary"] for line in came["skipped"][:3])
