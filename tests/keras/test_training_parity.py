"""Fifty steps of training in PyTorch and on the active engine of Keras end at the same numbers.

What is trained stands in benchmarks/parity_net.py; benchmarks/training_parity.py makes the table in docs/parity.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import crcore as cr

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from parity_net import Training, differences, keras_run, torch_run

# By step. A float32 has 7 digits; what rounding leaves grows with training.
TOLERANCES = {1: 2e-6, 10: 2e-5, 50: 1e-4}
SCHEDULES = 2e-6  # float32 on tensors against Python's numbers
OTHERS = {
    "minmax": (cr.MinMax(4), cr.MinMax(4)),
    "dorefa and pact": (cr.DoReFa(4), cr.PACT(4)),
    "lsq+": (cr.LSQPlus(4), cr.LSQPlus(4)),
}


@pytest.fixture(scope="module")
def runs():
    training = Training()
    assert training.report == tuple(TOLERANCES)
    return keras_run(training), torch_run(training)


@pytest.mark.parametrize("step", TOLERANCES)
def test_keras_trains_as_pytorch_does(runs, step):
    check(*runs, step)


@pytest.mark.parametrize("name", OTHERS)
def test_other_quantizers_train_as_in_pytorch(name):
    training = Training(OTHERS[name], batch_norm=False, calibrated=True, steps=10, report=(1, 10))
    run, reference = keras_run(training), torch_run(training)
    for step in training.report:
        check(run, reference, step)


def test_it_is_a_training(runs):
    run, _ = runs
    task, consistency = run["log/task_loss"], run["log/consistency_loss"]
    assert np.mean(task[-5:]) < 0.75 * np.mean(task[:5])
    assert np.max(consistency) > 0.02
    for tensor in ("codes/conv2.weight", "scales/conv2.weight_quantizer.scale", "scales/conv3.input_quantizer.scale"):
        assert np.any(run[f"1/student/{tensor}"] != run[f"50/student/{tensor}"]), tensor


def test_a_teacher_that_is_a_step_early_would_be_noticed(runs):
    run, reference = runs
    early = {key.replace("next_teacher", "teacher"): array for key, array in run.items() if "/teacher/" not in key}
    early |= {key: array for key, array in run.items() if "next_teacher" in key}
    for step in TOLERANCES:
        assert differences(early, reference, step)["teacher"] > 10 * TOLERANCES[step]


def check(run, reference, step):
    found = differences(run, reference, step)
    assert found.pop("schedules") < SCHEDULES
    assert found.pop("codes") < 0.01  # a weight at the edge between two codes may fall to either side
    assert max(found.values()) < TOLERANCES[step], found
