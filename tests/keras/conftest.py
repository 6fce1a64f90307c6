"""These tests run once per engine, each time in a process of its own: KERAS_BACKEND=jax pytest tests/keras."""

from __future__ import annotations

import os

# Before TensorFlow starts: with several threads or oneDNN, the order of its sums, and so the last bit, changes from run
# to run.
os.environ |= {"TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1", "TF_ENABLE_ONEDNN_OPTS": "0"}

import keras
import pytest

ENGINES = ("tensorflow", "jax", "torch")


def pytest_configure() -> None:
    engine = os.environ.get("KERAS_BACKEND")
    assert engine in ENGINES, f"KERAS_BACKEND must be one of {ENGINES}, got {engine!r}; `make test` runs all three"
    assert keras.backend.backend() == engine


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    keras.utils.set_random_seed(0)
    yield
    keras.utils.clear_session(free_memory=False)  # collecting garbage takes longer than most tests
