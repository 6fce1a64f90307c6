"""What the Keras backend hands to `crcore report`, and its page, on the engine of this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import crcore_keras as crk
import keras
import numpy as np
import pytest
import torch
from keras import layers

import crcore as cr
from crcore.cli import main
from crcore.cli._backends import open_backend
from crcore.cli._quantizer_statistics import Quantized

torch.set_num_threads(1)


def network() -> Any:
    """A branch, a layer that runs twice, and a model within a model."""
    inner = keras.Sequential([keras.Input((6, 6, 4)), layers.Conv2D(4, 3, padding="same", name="conv")], name="inner")
    image = keras.Input((6, 6, 3))
    x = layers.Conv2D(4, 1, name="first")(image)
    x = layers.Add()([inner(layers.ReLU()(x)), inner(x)])
    return keras.Model(image, layers.Dense(2, name="last")(layers.Flatten()(x)))


@pytest.mark.parametrize("quantizer", [cr.LSQ(4, per_channel=True), cr.MinMax(4), cr.DoReFa(4)], ids=repr)
def test_each_quantizer_is_visited_once_with_what_it_makes(quantizer) -> None:
    activations = cr.LSQ(4) if isinstance(quantizer, cr.LSQ) else quantizer
    student = crk.prepare(network(), cr.Recipe(weights=quantizer, activations=activations, first_last_bits=None))
    images = np.random.default_rng(0).normal(size=(5, 3, 6, 6)).astype("float32")
    batch = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    student(batch, training=True)
    expected = keras.ops.convert_to_numpy(student(batch, training=False))
    found: dict[tuple[str, str], Quantized] = {}

    def visit(layer: str, place: str, tensor: Quantized) -> None:
        assert (layer, place) not in found
        found[layer, place] = tensor

    open_backend("keras", device="auto").visit_quantizers(student, torch.from_numpy(images), visit)
    names = ("first", "inner.conv", "last")
    assert found.keys() == {(layer, place) for layer in names for place in ("weight", "input")}
    assert np.array_equal(found["first", "input"].values, batch)
    kernels = {"first": student.get_layer("first"), "last": student.get_layer("last")}
    for name, layer in kernels.items():
        tensor = found[name, "weight"]
        made = (tensor.codes - tensor.zero_point) * tensor.scale
        np.testing.assert_allclose(made, keras.ops.convert_to_numpy(layer.kernel), rtol=1e-6)
        assert "call" not in vars(layer.weight_quantizer)
    assert np.array_equal(keras.ops.convert_to_numpy(student(batch, training=False)), expected)
    assert len(found) == 6


def test_a_run_of_keras_has_a_page(capsys, tmp_path: Path) -> None:
    options = ["--methods", "qat", "--epochs", "1", "--float-epochs", "1", "--seeds", "1", "--labels", "40"]
    common = ["compare", "--backend", "keras", "--batch-size", "20", "--out", str(tmp_path / "run")]
    assert main([*common, *options]) == 0
    assert main(["report", str(tmp_path / "run")]) == 0, capsys.readouterr().err
    page = (tmp_path / "run/report.html").read_text()
    engine = json.loads((tmp_path / "run/results.json").read_text())["engine"]
    assert f"KERAS_BACKEND={engine} crcore compare" in page
    assert "weight of blocks_0_residual_0, qat" in page
