"""Saving, loading, cloning and mixed precision of prepared models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import crcore_keras as crk
import keras
import numpy as np
import pytest
from keras import layers
from small_networks import (
    MODELS,
    assert_same_bits,
    labels,
    mlp,
    numbers,
    quantized,
    quantizers,
    random,
    recipe,
    snapshot,
    trained,
    vectors,
)

import crcore as cr

EACH = pytest.mark.parametrize("name", MODELS)
RECIPES = {
    "LSQ": recipe(),
    "LSQ+": cr.Recipe(cr.LSQ(3), cr.LSQPlus(4)),
    "DoReFa and PACT": cr.Recipe(cr.DoReFa(4), cr.PACT(4)),
    "MinMax": cr.Recipe(cr.MinMax(4, per_channel=True), cr.MinMax(8)),
}


@EACH
def test_a_file_holds_everything_to_the_bit(name, tmp_path):
    make, batch = MODELS[name]
    student = trained(crk.prepare(make(), recipe(skip=(), first_last_bits=6)), batch())
    student.save(tmp_path / "student.keras")
    loaded = keras.saving.load_model(tmp_path / "student.keras")
    assert_same_bits(snapshot(student), snapshot(loaded))
    assert type(loaded) is type(student)
    assert [type(layer) for layer in loaded._flatten_layers()] == [type(layer) for layer in student._flatten_layers()]
    assert [q.quantizer for q in quantizers(loaded)] == [q.quantizer for q in quantizers(student)]
    assert [q.where for q in quantizers(loaded)] == [q.where for q in quantizers(student)]
    assert all(quantizer.initialized for quantizer in quantizers(loaded))
    np.testing.assert_array_equal(numbers(loaded(batch(seed=7))), numbers(student(batch(seed=7))))
    # Training goes on where it was: the optimizer's momenta are there too.
    student.train_on_batch(batch(seed=2), labels())
    loaded.train_on_batch(batch(seed=2), labels())
    if name != "subclassed":  # whose dropout draws anew
        for mine, theirs in zip(student.trainable_variables, loaded.trainable_variables, strict=True):
            np.testing.assert_allclose(numbers(mine), numbers(theirs), rtol=1e-4, atol=1e-6, err_msg=mine.path)


@pytest.mark.parametrize("chosen", RECIPES)
def test_weights_load_into_a_model_that_was_prepared_alike(chosen, tmp_path):
    student = trained(crk.prepare(mlp(), RECIPES[chosen]), vectors())
    student.save_weights(tmp_path / "of.weights.h5")
    fresh = crk.prepare(mlp(), RECIPES[chosen])
    fresh.load_weights(tmp_path / "of.weights.h5")
    assert_same_bits(snapshot(student), snapshot(fresh))
    np.testing.assert_array_equal(numbers(fresh(vectors())), numbers(student(vectors())))
    by_set = crk.prepare(mlp(), RECIPES[chosen])
    by_set.set_weights(student.get_weights())
    np.testing.assert_array_equal(numbers(by_set(vectors())), numbers(student(vectors())))


def test_weights_of_another_recipe_are_refused(tmp_path):
    student = trained(crk.prepare(mlp(), RECIPES["LSQ"]), vectors())
    student.save_weights(tmp_path / "of.weights.h5")
    with pytest.raises(ValueError, match=r"load\s+into a model that was prepared with the recipe that was saved"):
        crk.prepare(mlp(), RECIPES["LSQ+"]).load_weights(tmp_path / "of.weights.h5")


@EACH
def test_from_config_and_clone_model_make_the_same_model_anew(name):
    make, batch = MODELS[name]
    student = trained(crk.prepare(make(), recipe()), batch(), steps=1)
    anew = type(student).from_config(json.loads(json.dumps(student.get_config())))
    assert type(anew) is type(student)
    copies = [anew] if name == "subclassed" else [anew, keras.models.clone_model(student)]
    for copy in copies:
        if name == "subclassed":
            continue  # its from_config makes no weights, as Keras' own
        assert quantized(copy).keys() == quantized(student).keys()
        assert not any(q.initialized for q in quantizers(copy) if q.role == "activation")
        copy.set_weights(student.get_weights())
        np.testing.assert_array_equal(numbers(copy(batch())), numbers(student(batch())))


SCRIPT = """
import sys, numpy
sys.path.insert(0, {folder!r})
import crcore_keras, keras
{more}
for name in {names!r}:
    model = keras.saving.load_model(f"{{name}}.keras")
    numpy.save(f"{{name}}.npy", keras.ops.convert_to_numpy(model(numpy.load(f"{{name}}_x.npy"))))
"""


def test_a_fresh_process_needs_only_the_import(tmp_path):
    expected = {}
    for name, (make, batch) in MODELS.items():
        student = trained(crk.prepare(make(), recipe()), batch(), steps=1)
        expected[name] = numbers(student(batch()))
        student.save(tmp_path / f"{name}.keras")
        np.save(tmp_path / f"{name}_x.npy", batch())
    # The user's own class comes from the user's own module, as with any model.
    script = SCRIPT.format(folder=str(Path(__file__).parent), more="", names=[*MODELS])
    script = (
        script.replace("for name", "for step, name", 1).replace("in [", "in enumerate([", 1).replace("]:", "]):", 1)
    )
    script = script.replace("    model =", "    if name == 'subclassed': import small_networks\n    model =", 1)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in MODELS:
        np.testing.assert_array_equal(np.load(tmp_path / f"{name}.npy"), expected[name])


# --- files that do not fit -------------------------------------------------------------------------------------------


def saved(folder: Path) -> Path:
    student = trained(crk.prepare(mlp(), recipe()), vectors(), steps=1)
    student.save(folder / "student.keras")
    return folder / "student.keras"


def rewritten(path: Path, old: str, new: str) -> Path:
    """The file with another text in its config."""
    other = path.with_name("other.keras")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(other, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name == "config.json":
                assert old in data.decode()
                data = data.decode().replace(old, new).encode()
            target.writestr(name, data)
    return other


def test_a_file_of_another_version_names_the_remedy(tmp_path):
    path = saved(tmp_path)
    with zipfile.ZipFile(path) as file:
        found = json.loads(file.read("config.json"))
    assert "version" in json.dumps(found)
    with pytest.raises(
        cr.CRCoreError, match=r"version 1 is expected, got 99.*; load the file with the version.*upgrade"
    ):
        keras.saving.load_model(rewritten(path, '"version": 1', '"version": 99'))


def test_a_file_cut_in_half_says_so(tmp_path):
    path = saved(tmp_path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"ensure the file is an accessible `\.keras` zip file"):  # Keras' own words
        keras.saving.load_model(path)
    with pytest.raises(cr.CRCoreError, match=r"its end is missing.*save it again"):
        crk.load_model(path)


def test_a_file_that_is_missing_damaged_or_something_else_says_so(tmp_path):
    path = saved(tmp_path)
    crk.load_model(path)
    with pytest.raises(cr.CRCoreError, match="there is no file"):
        crk.load_model(tmp_path / "other.keras")
    data = bytearray(path.read_bytes())
    data[data.index(b"config.json") + 40] ^= 255
    path.write_bytes(data)
    with pytest.raises(cr.CRCoreError, match=r"cannot be loaded: .*config\.json"):
        crk.load_model(path)


# --- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("kind", ["Dense", "Conv2D", "DepthwiseConv2D", "SeparableConv2D", "Embedding", "EinsumDense"])
def test_mixed_precision_quantizes_the_float32_kernel_in_float32(policy, kind, tmp_path):
    make = {
        "Dense": lambda policy: layers.Dense(4, dtype=policy),
        "Conv2D": lambda policy: layers.Conv2D(4, 3, dtype=policy),
        "DepthwiseConv2D": lambda policy: layers.DepthwiseConv2D(3, dtype=policy),
        "SeparableConv2D": lambda policy: layers.SeparableConv2D(4, 3, dtype=policy),
        "Embedding": lambda policy: layers.Embedding(9, 4, dtype=policy),
        "EinsumDense": lambda policy: layers.EinsumDense("abcd,de->abce", (None, None, 4), dtype=policy),
    }[kind]
    wide = keras.Sequential([keras.Input((5, 5, 3)), make("float32")])
    narrow = keras.Sequential([keras.Input((5, 5, 3)), make(policy)])
    narrow.set_weights(wide.get_weights())
    mine, theirs = (crk.prepare(model, recipe(8)) for model in (narrow, wide))
    x = np.abs(random(2, 5, 5, 3))
    for student in (mine, theirs):
        student(x, training=True)
    assert keras.backend.standardize_dtype(mine(x).dtype) == policy.removeprefix("mixed_")
    for q, reference in zip(quantizers(mine), quantizers(theirs), strict=True):
        assert all(array.dtype == "float32" for array in q.arrays)
        if q.role == "weight":
            np.testing.assert_array_equal(numbers(q.scale), numbers(reference.scale))
    mine.save(tmp_path / "narrow.keras")
    loaded = keras.saving.load_model(tmp_path / "narrow.keras")
    assert_same_bits(snapshot(mine), snapshot(loaded))
    np.testing.assert_array_equal(numbers(loaded(x)), numbers(mine(x)))
    left, right = (crk.convert(student).layers[0] for student in (mine, theirs))
    np.testing.assert_array_equal(numbers(left.integer_weight.codes), numbers(right.integer_weight.codes))
    assert left.integer_weight.scale.dtype == "float32"
    np.testing.assert_array_equal(numbers(crk.convert(mine)(x)), numbers(mine(x)))


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_models_in_mixed_precision_train(policy):
    inputs = keras.Input((6, 6, 3))
    x = layers.SeparableConv2D(8, 3, activation="relu", dtype=policy)(inputs)
    x = layers.Reshape((16, 8))(x)
    x = layers.MultiHeadAttention(2, 4, dtype=policy)(x, x)
    x = layers.Dense(3, dtype=policy)(layers.GlobalAveragePooling1D(dtype=policy)(x))
    student = crk.prepare(keras.Model(inputs, layers.Activation("linear", dtype="float32")(x)), recipe())
    student.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=True)
    x = random(2, 6, 6, 3)
    student(x, training=True)
    before = [numbers(v) for v in student.trainable_variables if "key/bias" not in v.path]
    student.train_on_batch(x, random(2, 3))
    after = [v for v in student.trainable_variables if "key/bias" not in v.path]
    assert all(np.any(numbers(variable) != old) for variable, old in zip(after, before, strict=True))
    assert all(variable.dtype == "float32" for variable in after)


# --- FakeQuantize alone ----------------------------------------------------------------------------------------------


def test_a_fake_quantize_of_the_users_own_is_saved_with_its_model(tmp_path):
    x = random(8, 6)
    quantize = crk.FakeQuantize(cr.LSQ(4), name="mine")
    model = keras.Sequential([keras.Input((6,)), quantize, layers.ReLU()])
    with pytest.raises(cr.CRCoreError, match="'mine' is not initialized; call the student once on a batch"):
        model.predict(x, verbose=0)
    quantize = crk.FakeQuantize(cr.LSQ(4), name="mine")  # anew: on JAX a failed predict leaves a model without values
    model = keras.Sequential([keras.Input((6,)), quantize, layers.ReLU()])
    model(x, training=True)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
    again = crk.FakeQuantize.from_config(json.loads(json.dumps(quantize.get_config())))
    assert (again.quantizer, again.role, again.shape, again.initialized) == (cr.LSQ(4), "activation", (), False)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.zeros((0, 3)), "cannot take its scale from an empty tensor"),
        (np.array([1.0, np.nan]), "cannot take its scale from a tensor with NaN or infinity"),
        (np.array([1.0, np.inf]), "cannot take its scale from a tensor with NaN or infinity"),
    ],
)
def test_a_scale_is_not_taken_from_broken_data(data, message):
    quantize = crk.FakeQuantize(cr.LSQ(4))
    with pytest.raises(cr.CRCoreError, match=message):
        quantize.initialize(data)
    assert not quantize.initialized
    with pytest.raises(cr.CRCoreError, match="needs the shape of its scales"):
        crk.FakeQuantize(cr.LSQ(4, per_channel=True), role="weight")
