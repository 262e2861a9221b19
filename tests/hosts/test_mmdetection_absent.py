"""What a user without mmengine is told. Runs wherever it is or is not."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
HIDE = "import sys; sys.modules['mmengine'] = None\n"


def run(code: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", HIDE + code], env=environment, capture_output=True, text=True, check=False
    )


def test_the_host_says_in_one_sentence_what_to_install() -> None:
    done = run("import backbone\nimport backbone.hosts.mmdetection")
    last = done.stderr.strip().splitlines()[-1]
    assert last == (
        "ModuleNotFoundError: backbone.hosts.mmdetection needs mmengine, which is not installed: "
        "pip install 'backbone[mmdet]'"
    ), done.stderr
