"""Networks that other people wrote: `keras.applications`, on small images, with random weights."""

from __future__ import annotations

from typing import Any

import crcore_keras as crk
import keras
import numpy as np
import pytest
from keras import applications
from small_networks import assert_same_bits, numbers, quantized, quantizers, random, recipe, snapshot

OPTIONS: dict[str, Any] = {"weights": None, "classes": 5, "classifier_activation": None}
# Name: the model, how many layers are quantized, the first and the last of them.
MODELS: dict[str, Any] = {
    "MobileNetV2": (
        lambda: applications.MobileNetV2(alpha=0.35, input_shape=(32, 32, 3), **OPTIONS),
        53,
        ("Conv1", "predictions"),
    ),
    "EfficientNetB0": (
        lambda: applications.EfficientNetB0(input_shape=(32, 32, 3), **OPTIONS),
        82,
        ("stem_conv", "predictions"),
    ),
    "ResNet50": (
        lambda: applications.ResNet50(input_shape=(32, 32, 3), **OPTIONS),
        54,
        ("conv1_conv", "predictions"),
    ),
    "ConvNeXtTiny": (
        lambda: applications.ConvNeXtTiny(input_shape=(32, 32, 3), **OPTIONS),
        59,
        None,
    ),
}


# A network of this size is half a minute of compiling on JAX, for the step as for inference.
HERE = ["MobileNetV2"] if keras.backend.backend() == "jax" else [*MODELS]


@pytest.mark.parametrize("name", HERE)
def test_prepare_train_save_and_load(name, tmp_path):
    make, count, ends = MODELS[name]
    student = crk.prepare(make(), recipe(), inplace=True)
    layers = quantized(student)
    assert len(layers) == count
    wide = [layer for layer, each in layers.items() if each.weight_quantizer.quantizer.bits == 8]
    assert ends is None or tuple(wide) == ends
    assert len(wide) == 2

    x = 100.0 * np.abs(random(2, 32, 32, 3))
    student.compile(keras.optimizers.SGD(1.0), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    student.run_eagerly = keras.backend.backend() != "jax"  # which knows compiled steps alone
    student(x, training=True)
    assert all(quantizer.initialized for quantizer in quantizers(student))
    before = [numbers(variable) for variable in student.trainable_variables]
    assert np.isfinite(student.train_on_batch(x, np.array([0, 3])))
    moved = [np.any(numbers(v) != old) for v, old in zip(student.trainable_variables, before, strict=True)]
    assert np.mean(moved) > 0.8  # ConvNeXt starts with branches of weight 1e-6

    student.save(tmp_path / "student.keras")
    loaded = keras.saving.load_model(tmp_path / "student.keras", compile=False)
    assert_same_bits(snapshot(student), snapshot(loaded))
    if name == "MobileNetV2":
        np.testing.assert_array_equal(numbers(loaded(x)), numbers(student(x)))
