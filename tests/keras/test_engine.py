"""What the import says where Keras finds no engine."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "jax":
            raise ModuleNotFoundError("No module named 'jax'", name="jax")
sys.meta_path.insert(0, Blocker())
"""


@pytest.mark.parametrize(
    ("engine", "before", "what"), [("foo", "", "KERAS_BACKEND='foo' is no engine"), ("jax", BLOCKED, "not installed")]
)
def test_a_wrong_or_missing_engine_is_named_with_the_remedy(engine: str, before: str, what: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", before + "import crcore_keras"],
        env=os.environ | {"KERAS_BACKEND": engine},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("crcore._errors.CRCoreError: ")
    assert what in last
    assert "tensorflow, jax, torch" in last
