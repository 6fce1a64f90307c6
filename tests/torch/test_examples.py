"""Each example runs as a user runs it, and learns."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
LEAST = {"pytorch_loop": 85.0, "lightning_module": 85.0, "any_qat_library": 85.0}  # percent, of ten classes


def test_no_example_is_left_out():
    assert {path.stem for path in EXAMPLES.glob("*.py")} >= LEAST.keys()
    torch_examples = {path.stem for path in EXAMPLES.glob("*.py") if "crcore_torch" in path.read_text()}
    assert torch_examples == LEAST.keys()


@pytest.mark.parametrize("name", LEAST)
def test_the_example_runs_and_learns(name, tmp_path):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    accuracies = [float(value) for value in re.findall(r"([\d.]+) % of the test images", done.stdout)]
    assert len(accuracies) >= 2, done.stdout
    assert min(accuracies) >= LEAST[name], done.stdout
    assert not list(tmp_path.iterdir())  # nothing is left behind
