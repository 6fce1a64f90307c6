"""`ConsistencyCallback`, and Keras' own callbacks beside it."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import crcore_keras as crk
import keras
import numpy as np
import pytest
from small_trainings import Shift, assert_same, compiled, data, dense_net, fitted, recipe, weights

import crcore as cr

SHOWN = {"task_loss", "consistency_loss", "lambda", "decay"}


@pytest.mark.parametrize(
    ("evaluate", "expected"),
    [
        ("student", {"val_loss", "val_accuracy"}),
        ("teacher", {"val_teacher_loss", "val_teacher_accuracy"}),
        ("both", {"val_loss", "val_accuracy", "val_teacher_loss", "val_teacher_accuracy"}),
    ],
)
def test_the_history_holds_what_was_asked_for(evaluate, expected):
    model = compiled(metrics=["accuracy"])
    x, y = data()
    callback = crk.ConsistencyCallback(evaluate)
    found = fitted(model, x, y, epochs=3, validation_data=(x, y), callbacks=[callback])
    assert set(found) == {"loss", "accuracy"} | SHOWN | expected
    assert all(len(values) == 3 for values in found.values())
    assert set(model.evaluate(x, y, verbose=0, return_dict=True)) == {"loss", "accuracy"}
    assert {key for key in fitted(model, x, y, validation_data=(x, y)) if key.startswith("val")} == {
        "val_loss",
        "val_accuracy",
    }


def test_the_teachers_metrics_are_the_teachers():
    model = compiled(metrics=["accuracy"], optimizer=keras.optimizers.SGD(0.5))
    x, y = data()
    found = fitted(model, x, y, epochs=2, validation_data=(x, y), callbacks=[crk.ConsistencyCallback("both")])
    by_hand = model.teacher.evaluate(x, y, verbose=0, return_dict=True)
    assert found["val_teacher_loss"][-1] == pytest.approx(by_hand["loss"], rel=1e-5)
    assert found["val_teacher_loss"][-1] != pytest.approx(found["val_loss"][-1], rel=1e-3)
    student = model.evaluate(x, y, verbose=0, return_dict=True)
    assert found["val_loss"][-1] == pytest.approx(student["loss"], rel=1e-5)


def test_the_progress_bar_shows_them(capsys):
    x, y = data()
    fitted(compiled(), x, y, validation_data=(x, y), callbacks=[crk.ConsistencyCallback()], verbose=2)
    shown = capsys.readouterr().out
    assert all(f" {name}:" in shown for name in [*SHOWN, "val_teacher_loss"])


@pytest.mark.parametrize("callbacks", [[], [crk.ConsistencyCallback("student")]], ids=["without", "with"])
def test_the_average_includes_the_last_step_after_fit(callbacks):
    model = compiled(chosen=recipe(ema=cr.EMA(0.0)))  # the teacher is the student after each step
    fitted(model, callbacks=callbacks)
    assert model.step == 2
    assert_same(weights(model.student), weights(model.teacher))


def test_validation_sees_the_average_with_the_last_step():
    model = compiled(chosen=recipe(ema=cr.EMA(0.0)))
    x, y = data()
    found = fitted(model, x, y, epochs=2, validation_data=(x, y), callbacks=[crk.ConsistencyCallback("both")])
    assert found["val_loss"] == pytest.approx(found["val_teacher_loss"], rel=1e-6)
    assert model.step == 4


def test_a_run_that_was_interrupted_does_not_change_what_the_next_one_evaluates():
    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            raise KeyboardInterrupt

    model = compiled()
    x, y = data()
    with pytest.raises(KeyboardInterrupt):
        fitted(model, x, y, callbacks=[crk.ConsistencyCallback(), Stop()])
    assert "val_loss" in fitted(model, x, y, validation_data=(x, y))


def test_validation_does_not_change_the_training():
    x, y = data()
    results = []
    for options in ({}, {"validation_data": (x, y), "callbacks": [crk.ConsistencyCallback("both")]}):
        model = compiled()
        fitted(model, x, y, epochs=3, **options)
        results.append(weights(model))
    # On JAX the average moves once compiled, fused, and once not: the last bit may differ.
    assert_same(*results, tolerance=1e-6 if keras.backend.backend() == "jax" else 0.0)


# --- beside Keras' callbacks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
def test_a_checkpoint_of_the_best_teacher_can_be_loaded(first, tmp_path):
    path = tmp_path / "best.keras"
    checkpoint = keras.callbacks.ModelCheckpoint(path, monitor="val_teacher_loss", mode="min", save_best_only=True)
    callbacks = [crk.ConsistencyCallback(), checkpoint]
    model = compiled(augment=Shift(), metrics=["accuracy"], optimizer=keras.optimizers.SGD(1.0))
    x, y = data()
    found = fitted(model, x, y, epochs=4, validation_data=(x, y), callbacks=callbacks if first else callbacks[::-1])
    loaded = keras.saving.load_model(path)
    best = loaded.teacher.evaluate(x, y, verbose=0, return_dict=True)["loss"]
    assert best == pytest.approx(min(found["val_teacher_loss"]), rel=1e-5)
    assert loaded.step == 2 * (1 + int(np.argmin(found["val_teacher_loss"])))


def test_early_stopping_brings_back_the_best_teacher_and_its_step():
    class Record(keras.callbacks.Callback):
        def __init__(self):
            super().__init__()
            self.states = []

        def on_epoch_end(self, epoch, logs=None):
            self.states.append(weights(self.model))

    record = Record()
    stopping = keras.callbacks.EarlyStopping(
        "val_teacher_loss",
        mode="max",
        patience=1,
        restore_best_weights=True,  # the first epoch is the best
    )
    model = compiled(optimizer=keras.optimizers.SGD(0.05))
    x, y = data()
    fitted(model, x, y, epochs=6, validation_data=(x, y), callbacks=[crk.ConsistencyCallback(), stopping, record])
    best = int(np.argmax(model.history.history["val_teacher_loss"]))
    assert len(record.states) < 6
    assert_same(weights(model), record.states[best])
    assert model.step == 2 * (best + 1)


def test_the_csv_logger_writes_every_column(tmp_path):
    x, y = data()
    callbacks = [crk.ConsistencyCallback(), keras.callbacks.CSVLogger(tmp_path / "log.csv")]
    found = fitted(compiled(), x, y, epochs=2, validation_data=(x, y), callbacks=callbacks)
    rows = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    assert {"val_teacher_loss", *SHOWN} <= set(rows[0])
    assert [float(row["lambda"]) for row in rows] == pytest.approx(found["lambda"])


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("tensorboard", "tensorflow")),
    reason="the TensorBoard callback needs the packages tensorboard and tensorflow",
)
def test_tensorboard_takes_the_logs(tmp_path):
    x, y = data()
    callbacks = [crk.ConsistencyCallback(), keras.callbacks.TensorBoard(tmp_path)]
    fitted(compiled(), x, y, validation_data=(x, y), callbacks=callbacks)
    assert list(tmp_path.rglob("events*"))


# --- a killed fit -----------------------------------------------------------------------------------------------------

EPOCHS = 4
# Trains in a process of its own: python -c RUN folder kill_at result. kill_at is "epoch.batch", or "never".
RUN = """
import os, signal, sys
import keras, numpy as np
import crcore as cr, crcore_keras as crk
from small_trainings import Shift, compiled, data, dense_net, recipe

folder, kill_at, result = sys.argv[1:]
keras.utils.set_random_seed(0)
chosen = recipe(cr.linear_ramp(1.0, steps=10), cr.EMA(0.9, warmup=9))
augment = keras.Sequential([Shift(), keras.layers.GaussianNoise(0.1, seed=8)])
net = dense_net(norm=True)
net.add(keras.layers.Dropout(0.2, seed=6))
model = compiled(net, chosen, augment, optimizer=keras.optimizers.Adam(0.01), metrics=["accuracy"])

class Kill(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if kill_at == f"{self.epoch}.{batch}":
            os.kill(os.getpid(), signal.SIGKILL)

x, y = data(10)
callbacks = [crk.ConsistencyCallback("both"), keras.callbacks.BackupAndRestore(folder), Kill()]
history = model.fit(x, y, batch_size=4, unlabeled=data(7, seed=1)[0], shuffle=False, epochs=EPOCHS,
                    validation_data=(x, y), callbacks=callbacks, verbose=0).history
np.savez(result, *model.get_weights(), step=model.step, **{"history/" + k: v for k, v in history.items()})
""".replace("EPOCHS", str(EPOCHS))


def run_until(folder, kill_at, result):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", RUN, str(folder), kill_at, str(result)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_a_killed_fit_resumes_where_it_was(tmp_path):
    """In the middle of the third epoch: the run goes on after the second one, which is what Keras keeps."""
    whole = run_until(tmp_path / "whole", "never", tmp_path / "whole.npz")
    assert whole.returncode == 0, whole.stderr[-2000:]
    killed = run_until(tmp_path / "backup", "2.1", tmp_path / "resumed.npz")
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert not (tmp_path / "resumed.npz").exists()
    assert json.loads((tmp_path / "backup" / "training_metadata.json").read_text())["epoch"] == 2
    resumed = run_until(tmp_path / "backup", "never", tmp_path / "resumed.npz")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    expected, found = np.load(tmp_path / "whole.npz"), np.load(tmp_path / "resumed.npz")
    assert int(found["step"]) == 3 * EPOCHS
    assert set(found.files) == set(expected.files)
    for name in expected.files:
        wanted = expected[name][2:] if name.startswith("history/") else expected[name]
        np.testing.assert_array_equal(found[name], wanted, err_msg=name)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_another_value_of_evaluate_is_an_error():
    with pytest.raises(cr.CRCoreError, match='evaluate must be "teacher", "student" or "both", got \'x\''):
        crk.ConsistencyCallback("x")


def test_a_plain_model_is_an_error():
    plain = dense_net()
    plain.compile("sgd", "mse")
    x, _ = data()
    with pytest.raises(cr.CRCoreError, match="goes with a ConsistencyModel, got Sequential"):
        plain.fit(x, x[:, :3], callbacks=[crk.ConsistencyCallback()], verbose=0)


def test_a_model_without_an_average_has_no_teacher_to_evaluate():
    x, y = data()
    for model in (
        compiled(chosen=cr.Recipe(cr.LSQ(4), cr.LSQ(4))),
        compiled(chosen=recipe(ema=None), teacher=dense_net()),
    ):
        with pytest.raises(cr.CRCoreError, match=r'no average to evaluate.*or ConsistencyCallback\("student"\)'):
            fitted(model, x, y, callbacks=[crk.ConsistencyCallback()])
        assert "val_loss" in fitted(model, x, y, validation_data=(x, y), callbacks=[crk.ConsistencyCallback("student")])
