"""detectron2's own tests, from its checkout, with our backbones where it builds its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from detectron2_pairs import CHECKOUT  # skips without detectron2

HERE = Path(__file__).parent


@pytest.mark.skipif(not (CHECKOUT / "tests").is_dir(), reason="an installed detectron2 has no tests; use a checkout")
@pytest.mark.parametrize(
    ("tests", "passing"), [("tests/modeling/test_backbone.py", 2), ("tests/modeling/test_model_e2e.py", 7)]
)
def test_its_tests_pass_with_our_backbones(tests: str, passing: int) -> None:
    paths = [str(CHECKOUT), str(HERE), str(HERE.parent), str(HERE.parents[1])]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "with_our_backbones", "-p", "no:cacheprovider", tests]
    done = subprocess.run(
        command,
        cwd=CHECKOUT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    counted = re.search(r"(\d+) passed", done.stdout)
    built = re.search(r"(\d+) backbones of ours", done.stdout)
    assert counted is not None
    assert built is not None
    assert int(counted[1]) >= passing, done.stdout[-1000:]
    assert int(built[1]) >= passing
