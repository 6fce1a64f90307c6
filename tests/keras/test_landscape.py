"""Derivatives of a network's loss on each engine: closed forms, PyTorch's, and what they must leave as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import crcore_keras as crk
import crcore_torch as crt
import keras
import numpy as np
import pytest
import torch
import twin_networks
from crcore_keras import _derivatives
from keras import layers, ops
from small_networks import assert_same_bits, mlp, recipe, snapshot, trained, vectors

import crcore as cr
from crcore.flatness import corruption_sensitivity, noise_sensitivity, sharpness, top_eigenvalues, weight_sensitivity

Y = np.array([0, 1, 2, 0, 1, 2, 2])


def prepared() -> Any:
    return trained(crk.prepare(mlp(), recipe()), vectors(7)[:3])


def dense(landscape: Any) -> np.ndarray:
    return np.array([landscape.hvp(row) for row in np.eye(landscape.size)])


X = np.array([-1.9, -1.0, -0.61, -0.2, 0.0, 0.3, 0.74, 1.0, 2.5], "float32")


@pytest.mark.parametrize(
    ("quantizer", "role", "inside"),
    [
        (cr.LSQ(3, signed=True), "activation", (X >= -4) & (X <= 3)),
        (cr.LSQ(2, signed=True), "weight", (X >= -2) & (X <= 1)),
        (cr.LSQPlus(1), "activation", (X >= 0) & (X <= 1)),
        (cr.PACT(2, signed=False), "activation", (X >= 0) & (X <= 1)),
        (cr.DoReFa(3, signed=False), "activation", (X >= 0) & (X <= 1)),
        (cr.MinMax(2, signed=True, symmetric=True), "activation", (X >= -2) & (X <= 1)),
    ],
    ids=["LSQ", "LSQ of a weight", "LSQ+", "PACT", "DoReFa", "MinMax"],
)
def test_a_quantizer_s_second_derivative_is_that_of_the_straight_through_surrogate(
    quantizer: Any, role: Any, inside: np.ndarray
) -> None:
    """Of ``sum(Q(x)**3)``: 6 Q(x) inside, else 0; by each engine's rules alone it would be zero, or infinite."""
    quantize = crk.FakeQuantize(quantizer, role=role)
    quantize.initialize(X)
    for name, array in zip(quantize.quantizer.parameters, quantize.arrays, strict=True):
        array.assign({"low": -2.0, "offset": 0.0}.get(name, 1.0))
    value = ops.convert_to_numpy(quantize(X))
    x, vector = ops.convert_to_tensor(X), np.random.default_rng(0).normal(size=X.shape).astype("float32")

    def f(weights: Any) -> Any:
        return ops.sum(quantize(weights[0]) ** 3)

    (slope,) = _derivatives.gradient(f)([x])
    np.testing.assert_allclose(ops.convert_to_numpy(slope), 3 * value**2 * inside, rtol=1e-6)
    (product,) = _derivatives.product(f)([x], [ops.convert_to_tensor(vector)])
    np.testing.assert_allclose(ops.convert_to_numpy(product), 6 * value * inside * vector, rtol=1e-6)


def test_the_second_derivative_through_dorefa_s_maximum_is_that_of_its_formula() -> None:
    """Of ``sum(c * tanh(x) / max|tanh(x)|)``, with all that the maximum depends on."""
    quantize = crk.FakeQuantize(cr.DoReFa(3), role="weight").initialize(X)
    c, vector = np.random.default_rng(0).normal(size=(2, *X.shape)).astype("float32")

    def smooth(x: torch.Tensor) -> torch.Tensor:
        return (torch.tensor(c) * x.tanh() / x.tanh().abs().max()).double().sum()

    expected = torch.autograd.functional.hessian(smooth, torch.tensor(X, dtype=torch.float64)).numpy() @ vector
    product = _derivatives.product(lambda weights: ops.sum(ops.convert_to_tensor(c) * quantize(weights[0])))
    (found,) = product([ops.convert_to_tensor(X)], [ops.convert_to_tensor(vector)])
    np.testing.assert_allclose(ops.convert_to_numpy(found), expected, atol=1e-5)


def test_the_landscape_is_that_of_the_same_network_in_pytorch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, y = twin_networks.images(6)
    x = (x - x.min()) / (x.max() - x.min())
    there = crt.prepare(twin_networks.TorchNet(), twin_networks.recipe_of("all of them")).train()
    there(twin_networks.channels_first(x))
    here = crk.prepare(twin_networks.keras_net(), twin_networks.recipe_of("all of them"))
    crt.save_portable(there, tmp_path / "net")
    crk.load_portable(here, tmp_path / "net")
    first = twin_networks.channels_first(x)
    mine, theirs = crk.Landscape(here, x, y), crt.Landscape(there, first, torch.tensor(y))
    np.testing.assert_array_equal(mine.weights, theirs.weights)
    numbers = {*zip(mine.filters.tolist(), theirs.filters.tolist(), strict=True)}
    assert len(numbers) == len({*mine.filters.tolist()}) == len({*theirs.filters.tolist()})
    vector = np.random.default_rng(0).normal(size=mine.size)
    for left, right in (
        (mine.evaluate()[0], theirs.evaluate()[0]),
        (mine.evaluate()[1], theirs.evaluate()[1]),
        (mine.gradient(), theirs.gradient()),
        (mine.hvp(vector), theirs.hvp(vector)),
    ):
        np.testing.assert_allclose(left, right, rtol=0, atol=3e-5 * np.abs(right).max())
    left, right = (top_eigenvalues(each, 3) for each in (mine, theirs))
    np.testing.assert_allclose(left, right, rtol=1e-4)
    left, right = (weight_sensitivity(each, draws=2, levels=[0.0, 0.1]).loss.mean for each in (mine, theirs))
    np.testing.assert_allclose(left, right, rtol=1e-3)  # the same noise; here and there a code flips
    left = corruption_sensitivity(mine, x, corruptions=["shot_noise"], channel_axis=-1, draws=2)["shot_noise"]
    right = corruption_sensitivity(theirs, first.numpy(), corruptions=["shot_noise"], draws=2)["shot_noise"]
    np.testing.assert_allclose(left.loss.mean, right.loss.mean, rtol=1e-3)


def test_eigenvalues_are_those_of_the_dense_hessian() -> None:
    net = keras.Sequential([keras.Input((6,)), layers.Dense(4, "tanh"), layers.Dense(3)])
    model = crk.prepare(net, cr.Recipe(cr.LSQ(3, per_channel=True), cr.LSQ(3), first_last_bits=None))
    model(vectors(7), training=True)
    landscape = crk.Landscape(model, vectors(7), Y)
    matrix = dense(landscape)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-6 * np.abs(matrix).max())
    found = top_eigenvalues(landscape, 5, tolerance=1e-6)
    np.testing.assert_allclose(found, np.linalg.eigvalsh(matrix)[::-1][:5], rtol=0, atol=1e-5 * found[0])


def test_nothing_about_the_network_is_changed() -> None:
    model = prepared()
    before = snapshot(model)
    trainable = [variable.trainable for variable in model.variables]
    grads = [id(getattr(variable.value, "grad", None)) for variable in model.variables]  # torch keeps them there
    x = (vectors(7) - vectors(7).min()) / 9
    landscape = crk.Landscape(model, x, Y)
    sharpness(landscape, steps=2)
    landscape.hvp(landscape.weights)
    with pytest.raises(ZeroDivisionError):
        weight_sensitivity(crk.Landscape(model, x, Y, loss=lambda logits, y: 1 / 0), draws=2, levels=[0.0, 0.5])
    assert_same_bits(before, snapshot(model))
    assert trainable == [variable.trainable for variable in model.variables]
    assert grads == [id(getattr(variable.value, "grad", None)) for variable in model.variables]


def test_a_landscape_is_of_the_network_as_it_was() -> None:
    model = prepared()
    landscape = crk.Landscape(model, vectors(7), Y)
    before = landscape.evaluate()[0], landscape.gradient()
    for variable in model.variables:
        if "float" in variable.dtype:
            variable.assign(variable + 1)
    landscape.evaluate(weights=landscape.weights + 1)
    for old, new in zip(before, (landscape.evaluate()[0], landscape.gradient()), strict=True):
        np.testing.assert_array_equal(old, new)
    now = crk.Landscape(model, vectors(7), Y)
    np.testing.assert_allclose(now.weights, (landscape.weights.astype("float32") + np.float32(1)))
    assert (now.evaluate()[0] != before[0]).any()


def test_weights_and_inputs_can_be_replaced() -> None:
    model, other = mlp(), mlp()
    landscape, wanted = crk.Landscape(model, vectors(7), Y), crk.Landscape(other, vectors(7, seed=1), Y)
    for left, right in zip(landscape.evaluate(vectors(7, seed=1), wanted.weights), wanted.evaluate(), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-6)
    wide = vectors(7, seed=1).astype("float64")
    np.testing.assert_array_equal(wanted.evaluate(wide)[0], wanted.evaluate()[0])
    expected = ops.convert_to_numpy(other(vectors(7, seed=1)))
    np.testing.assert_allclose(wanted.evaluate()[1], expected, rtol=1e-5)
    loss = keras.losses.sparse_categorical_crossentropy(Y, expected, from_logits=True)
    np.testing.assert_allclose(wanted.evaluate()[0], ops.convert_to_numpy(loss), rtol=1e-5)


def test_a_softmax_at_the_end_makes_no_difference() -> None:
    model = mlp()
    ended = keras.Sequential([keras.Input((6,)), model, layers.Softmax()])
    plain, softmax = (crk.Landscape(each, vectors(7), Y) for each in (model, ended))
    np.testing.assert_allclose(softmax.evaluate()[0], plain.evaluate()[0], rtol=1e-5)
    np.testing.assert_allclose(softmax.gradient(), plain.gradient(), atol=1e-6)


def test_of_a_teacher_all_that_a_student_trains_are_weights() -> None:
    student = crk.prepare(mlp(), recipe())
    model = crk.ConsistencyModel(student, recipe(ema=cr.EMA(0.5)))
    trained(model, vectors(7)[:3])
    mine, teacher = (crk.Landscape(each, vectors(7), Y) for each in (student, model.teacher))
    assert mine.size == teacher.size == sum(np.prod(each.shape) for each in mlp().trainable_variables)
    assert (mine.weights != teacher.weights).any()


def test_what_is_frozen_is_no_weight() -> None:
    model = mlp()
    model.layers[0].trainable = False
    assert crk.Landscape(model, vectors(7), Y).size == 8 * 8 + 8 + 8 * 3 + 3


def test_filters_are_output_channels() -> None:
    net = keras.Sequential([
        keras.Input((4, 4, 2)), layers.SeparableConv2D(3, 2, depth_multiplier=2), layers.BatchNormalization(),
        layers.Conv2DTranspose(2, 2), layers.GlobalAveragePooling2D(), layers.Dense(2),
    ])  # fmt: skip
    landscape = crk.Landscape(net, np.zeros((2, 4, 4, 2), "float32"), np.array([0, 1]))
    depthwise, pointwise = np.repeat(np.arange(4), 4), 4 + np.repeat(np.arange(3), 4)
    up, head = 7 + np.tile(np.repeat([0, 1], 4), 3), 9 + np.repeat([0, 1], 2)
    expected = [depthwise, pointwise, [-1] * 9, up, [-1, -1], head, [-1, -1]]
    np.testing.assert_array_equal(landscape.filters, np.concatenate(expected))


def test_a_loss_of_ones_own() -> None:
    net = keras.Sequential([keras.Input((3,)), layers.Dense(1, use_bias=False)])
    x, y = vectors(20)[:, :3], np.ones(20, "float32")
    landscape = crk.Landscape(net, x, y, loss=lambda out, y: (out[:, 0] - y) ** 2, batch_size=7)
    np.testing.assert_allclose(dense(landscape), 2 * x.T @ x / 20, rtol=1e-5, atol=1e-6)
    linear = crk.Landscape(net, x, y, loss=lambda out, y: out[:, 0])
    np.testing.assert_array_equal(linear.hvp(np.ones(3)), np.zeros(3))
    assert weight_sensitivity(landscape, draws=2, levels=[0.1]).accuracy is None


def test_what_cannot_be_a_landscape_is_refused() -> None:
    model, x = prepared(), vectors(7)
    inputs = keras.Input((3,))
    two = keras.Model(inputs, [layers.Dense(2)(inputs), layers.Dense(2)(inputs)])
    cases: list[Any] = [
        ((object(), x, Y), {}, "takes a built keras.Model"),
        ((model, x, Y[:3]), {}, "of the same samples, at least one; got 7 and 3"),
        ((model, x, Y), {"batch_size": 0}, "batch_size must"),
        ((keras.Sequential([keras.Input((6,)), layers.ReLU()]), x, Y), {}, "no trainable variables"),
        ((crk.convert(model), x, Y), {}, "integers for weights"),
        ((two, x[:, :3], Y), {}, "has the outputs"),
    ]
    for given, options, message in cases:
        with pytest.raises(cr.CRCoreError, match=message):
            crk.Landscape(*given, **options)
    with pytest.raises(cr.CRCoreError, match="one value per sample"):
        crk.Landscape(model, x, Y, loss=lambda out, y: ops.mean(out)).gradient()
    with pytest.raises(cr.CRCoreError, match=r"labels \[N\], got \[7, 3\] and float32 \[7\]"):
        crk.Landscape(model, x, Y.astype("float32")).evaluate()
    landscape = crk.Landscape(model, x, Y)
    for call in (landscape.hvp, landscape.gradient, lambda v: landscape.evaluate(weights=v)):
        with pytest.raises(cr.CRCoreError, match="must have the shape"):
            call(np.ones(3))
    with pytest.raises(cr.CRCoreError, match=r"x must have the shape \[7, 6\]"):
        landscape.evaluate(x[:2])
    with pytest.raises(cr.CRCoreError, match="four axes"):
        noise_sensitivity(landscape, x)
