"""The Keras example runs as a user runs it, on the engine of this process, and learns."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_no_example_is_left_out():
    assert [path.stem for path in EXAMPLES.glob("*.py") if "crcore_keras" in path.read_text()] == ["keras_fit"]


def test_the_example_runs_and_learns(tmp_path):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "keras_fit.py")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    accuracies = [float(value) for value in re.findall(r"([\d.]+) % of the test images", done.stdout)]
    assert len(accuracies) == 3, done.stdout
    assert min(accuracies) >= 85.0, done.stdout
    assert "val_teacher_accuracy" in done.stdout
    assert not list(tmp_path.iterdir())  # nothing is left behind
