"""`convert`: integers that compute, bit for bit, what the fake-quantized model computed."""

from __future__ import annotations

from typing import Any

import crcore_keras as crk
import keras
import numpy as np
import pytest
from keras import layers
from small_networks import (
    MODELS,
    assert_same_bits,
    compiled,
    convnet,
    images,
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

WEIGHTS = {
    "LSQ": cr.LSQ(4),
    "LSQ per channel": cr.LSQ(4, per_channel=True),
    "LSQ narrow 2 bits": cr.LSQ(2, per_channel=True, narrow=True),
    "LSQ 1 bit": cr.LSQ(1, per_channel=True),
    "LSQ unsigned 8 bits": cr.LSQ(8, signed=False),
    "LSQ 16 bits": cr.LSQ(16),
    "DoReFa": cr.DoReFa(3),
    "DoReFa per channel": cr.DoReFa(4, per_channel=True),
    "DoReFa 8 bits": cr.DoReFa(8),
    "MinMax per channel": cr.MinMax(4, per_channel=True),
    "MinMax affine": cr.MinMax(4, symmetric=False, per_channel=True),
    "MinMax affine unsigned": cr.MinMax(8, symmetric=False, signed=False),
    "none": None,
} | {f"LSQ {bits} bits": cr.LSQ(bits, per_channel=True) for bits in (3, 5, 6, 7)}
ACTIVATIONS = {
    "LSQ": cr.LSQ(4),
    "LSQPlus": cr.LSQPlus(4),
    "PACT": cr.PACT(4),
    "DoReFa": cr.DoReFa(4),
    "MinMax": cr.MinMax(4),
    "none": None,
}
PAIRS = [(weights, "LSQ") for weights in WEIGHTS] + [("LSQ per channel", name) for name in ACTIVATIONS]


def small() -> Any:
    hidden = [layers.Conv2D(4, 3, strides=2, activation="relu"), layers.DepthwiseConv2D(2, activation="relu")]
    return keras.Sequential([keras.Input((8, 8, 3)), *hidden, layers.Flatten(), layers.Dense(3)])


def predicted(model: Any, x: np.ndarray) -> np.ndarray:
    return np.asarray(model.predict(x, batch_size=len(x), verbose=0))


@pytest.mark.parametrize(("weights", "activations"), PAIRS)
def test_a_trained_model_converts_to_the_bit(weights, activations):
    chosen = cr.Recipe(WEIGHTS[weights], ACTIVATIONS[activations], first_last_bits=None)
    student = crk.prepare(small(), chosen)
    student(images(), training=True)
    for array in [
        array for quantizer in quantizers(student) if quantizer.quantizer.learned for array in quantizer.arrays
    ]:
        array.assign(1.1 * numbers(array))  # as if trained: no longer what the data gave
    x = 3 * images(8, seed=9)
    converted = crk.convert(student)
    np.testing.assert_array_equal(numbers(converted(x)), numbers(student(x)))
    assert not converted.trainable_variables
    for layer in quantized(converted).values():
        integers = layer.integer_weight
        if integers is None:
            continue
        bits = WEIGHTS[weights].bits + weights.startswith("DoReFa")  # its codes are odd numerators
        codes = numbers(integers.codes).astype("int64")
        assert keras.backend.is_int_dtype(integers.codes.dtype)
        assert codes.max() - codes.min() <= 2**bits
        if bits <= 8 and "unsigned" not in weights:
            assert integers.codes.dtype == "int8"
        by_hand = (codes.astype("float32") - numbers(integers.zero_point).astype("float32")) * numbers(integers.scale)
        np.testing.assert_array_equal(numbers(layer.kernel), by_hand)
        assert layer.weight_quantizer is None
    assert any(layer.integer_weight is not None for layer in quantized(converted).values()) is (weights != "none")


@pytest.mark.parametrize("name", MODELS)
def test_predict_is_the_same_to_the_bit_and_the_model_is_left_as_it_was(name):
    make, batch = MODELS[name]
    student = trained(crk.prepare(make(), recipe()), batch())
    before, kinds = snapshot(student), [type(layer) for layer in student._flatten_layers()]
    converted = crk.convert(student)
    x = batch(8, seed=5)
    np.testing.assert_array_equal(predicted(converted, x), predicted(student, x))
    assert_same_bits(before, snapshot(student))
    assert [type(layer) for layer in student._flatten_layers()] == kinds
    student.train_on_batch(batch(), labels())
    names = [variable.path for variable in converted.variables]
    assert not [name for name in names if name.endswith(("kernel", "embeddings")) or "weight_quantizer" in name]
    weights = [name for name in before if "weight_quantizer/scale" in name]
    assert sum(variable.name == "codes" for variable in converted.variables) == len(weights) > 0


def test_a_consistency_model_converts_its_average():
    chosen = recipe(consistency=cr.Consistency(), ema=cr.EMA(0.5))
    model = crk.ConsistencyModel(crk.prepare(mlp(), chosen), chosen, augment=layers.GaussianNoise(0.1))
    compiled(model).fit(vectors(8), labels(8), batch_size=4, verbose=0)
    x = vectors(8, seed=3)
    np.testing.assert_array_equal(numbers(crk.convert(model)(x)), numbers(model.teacher(x)))
    np.testing.assert_array_equal(numbers(crk.convert(model.student)(x)), numbers(model.student(x)))
    assert np.any(numbers(model.teacher(x)) != numbers(model.student(x)))


def test_converted_ranges_stay_as_they_are_in_train_mode():
    student = trained(crk.prepare(convnet(), cr.Recipe(cr.MinMax(4), cr.MinMax(4))), images())
    converted = crk.convert(student)
    assert all(quantizer.frozen for quantizer in quantizers(converted))
    before = [numbers(v) for quantizer in quantizers(converted) for v in quantizer.variables]
    converted(100.0 * images(), training=True)
    for old, variable in zip(before, [v for q in quantizers(converted) for v in q.variables], strict=True):
        np.testing.assert_array_equal(old, numbers(variable))


def test_the_input_codes_are_integers_in_the_grid():
    converted = crk.convert(trained(crk.prepare(mlp(), cr.Recipe(cr.LSQ(4), cr.LSQPlus(4))), vectors()))
    quantizer = converted.get_layer("middle").input_quantizer
    x = 5 * random(7, 8)
    codes = numbers(quantizer.codes(x))
    np.testing.assert_array_equal(codes, codes.round())
    assert (codes.min(), codes.max()) == (0, 15)
    by_hand = (codes - numbers(quantizer.zero_point).astype("float32")) * numbers(quantizer.scale)
    np.testing.assert_array_equal(by_hand, numbers(quantizer(x)))
    assert not numbers(quantizer(np.zeros((1, 8), "float32"))).any()  # real zero


def test_a_converted_model_is_saved_and_loaded_as_integers(tmp_path):
    for name, (make, batch) in MODELS.items():
        converted = crk.convert(trained(crk.prepare(make(), recipe()), batch(), steps=1))
        converted.save(tmp_path / f"{name}.keras")
        loaded = keras.saving.load_model(tmp_path / f"{name}.keras")
        assert_same_bits(snapshot(converted), snapshot(loaded))
        np.testing.assert_array_equal(predicted(loaded, batch()), predicted(converted, batch()))
        converted.save_weights(tmp_path / "of.weights.h5")
        again = crk.convert(trained(crk.prepare(make(), recipe()), batch(), steps=1))
        again.load_weights(tmp_path / "of.weights.h5")
        np.testing.assert_array_equal(predicted(again, batch()), predicted(converted, batch()))
        with pytest.raises(cr.CRCoreError, match="converted already"):
            crk.convert(loaded)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="what torch's own training loop sees")
def test_parameters_of_torch_are_those_of_keras():
    student = crk.prepare(convnet(), recipe())
    assert {id(p) for p in student.parameters()} == {id(variable.value) for variable in student.variables}
    student(images(), training=True)
    converted = crk.convert(student)
    assert {id(p) for p in converted.parameters()} == {id(variable.value) for variable in converted.variables}


def test_what_cannot_be_converted_is_named():
    with pytest.raises(cr.CRCoreError, match="Functional has no quantized layer; convert takes a model from prepare"):
        crk.convert(convnet())
    with pytest.raises(cr.CRCoreError, match="NoneType has no quantized layer"):
        crk.convert(None)
    with pytest.raises(cr.CRCoreError, match=r"'first.input_quantizer'.*have not seen data yet"):
        crk.convert(crk.prepare(mlp(), recipe()))
    with pytest.raises(cr.CRCoreError, match="is converted already"):
        crk.convert(crk.convert(trained(crk.prepare(mlp(), recipe()), vectors())))
    chosen = recipe(consistency=cr.Consistency(), ema=cr.EMA(quantized=False))
    model = crk.ConsistencyModel(crk.prepare(mlp(), chosen), chosen, augment=layers.GaussianNoise(0.1))
    model.student(vectors(), training=True)
    with pytest.raises(cr.CRCoreError, match=r"float teacher.*convert the student"):
        crk.convert(model.teacher)
