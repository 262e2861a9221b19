"""What a user without detectron2 is told. Runs wherever detectron2 is or is not."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
HIDE = "import sys; sys.modules['detectron2'] = None\n"


def run(code: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", HIDE + code], env=environment, capture_output=True, text=True, check=False
    )


def test_the_package_imports_without_detectron2() -> None:
    done = run("import backbone")
    assert done.returncode == 0, done.stderr


def test_the_host_says_in_one_sentence_what_to_install() -> None:
    done = run("import backbone.hosts.detectron2")
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: backbone.hosts.detectron2 needs detectron2"), done.stderr
    assert "pip install" in last
