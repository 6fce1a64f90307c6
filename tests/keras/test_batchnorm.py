"""`reestimate_batchnorm`: the cumulative mean of each batch's statistics, and nothing else, on every engine."""

from __future__ import annotations

import crcore_keras as crk
import keras
import numpy as np
import pytest
from keras import ops
from small_trainings import assert_same, compiled, data, dense_net, fitted, recipe, weights

import crcore as cr


def batches(count=3, features=4):
    return [data(8, features, seed=seed)[0] for seed in range(count)]


def statistics(norm):
    return [ops.convert_to_numpy(statistic) for statistic in (norm.moving_mean, norm.moving_variance)]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_statistics_are_the_means_over_batches(count):
    network = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization()])
    (norm,) = network.layers
    norm.moving_mean.assign(np.full(4, np.inf))
    norm.moving_variance.assign(np.full(4, np.nan))
    crk.reestimate_batchnorm(network, batches(count))
    mean, variance = statistics(norm)
    np.testing.assert_allclose(mean, np.mean([x.mean(0) for x in batches(count)], axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(variance, np.mean([x.var(0) for x in batches(count)], axis=0), rtol=1e-5, atol=1e-6)


def test_layers_behind_see_what_batch_statistics_normalize_and_no_dropout():
    layers = [keras.Input((4,)), keras.layers.BatchNormalization(), keras.layers.Dropout(0.5)]
    network = keras.Sequential([*layers, keras.layers.Dense(3, "relu"), keras.layers.BatchNormalization(name="last")])
    kernel, bias = (ops.convert_to_numpy(variable) for variable in network.layers[2].weights)
    crk.reestimate_batchnorm(network, batches())
    hidden = [np.maximum((x - x.mean(0)) / np.sqrt(x.var(0) + 1e-3) @ kernel + bias, 0) for x in batches()]
    mean, variance = statistics(network.get_layer("last"))
    np.testing.assert_allclose(mean, np.mean([h.mean(0) for h in hidden], axis=0), rtol=1e-4)
    np.testing.assert_allclose(variance, np.mean([h.var(0) for h in hidden], axis=0), rtol=1e-4)


class Block(keras.layers.Layer):
    """A layer of a user's, which hands `training` on."""

    def __init__(self):
        super().__init__()
        self.dense, self.norm = keras.layers.Dense(4), keras.layers.BatchNormalization()

    def build(self, shape):
        self.dense.build(shape)
        self.norm.build(shape)

    def call(self, x, training=False):
        return self.norm(self.dense(x), training=training)


def test_nested_layers_are_measured():
    network = keras.Sequential([keras.Input((4,)), Block(), keras.Sequential([keras.layers.BatchNormalization()])])
    crk.reestimate_batchnorm(network, batches())
    assert np.abs(statistics(network.layers[0].norm)[0]).min() > 0
    np.testing.assert_allclose(statistics(network.layers[1].layers[0])[0], 0, atol=1e-6)  # what the first one leaves
    assert np.all(statistics(network.layers[1].layers[0])[1] < 1)


@pytest.mark.parametrize("quantizer", [cr.LSQ, cr.MinMax])
def test_nothing_else_changes_and_training_goes_on(quantizer):
    chosen = cr.Recipe(quantizer(4), quantizer(4), consistency=cr.Consistency(), ema=cr.EMA(0.5))
    model = compiled(dense_net(norm=True), chosen)
    fitted(model)
    before = [ops.convert_to_numpy(variable) for variable in model.variables]
    norms = [network.get_layer("norm") for network in (model.student, model.teacher)]
    flags = [(norm.momentum, norm.trainable, "call" in vars(norm)) for norm in norms]
    for network in (model.student, model.teacher):
        crk.reestimate_batchnorm(network, [(x, None) for x in batches()])
    assert [(norm.momentum, norm.trainable, "call" in vars(norm)) for norm in norms] == flags
    assert not any(variable.trainable for variable in model.teacher.variables)
    measured = {id(statistic) for norm in norms for statistic in (norm.moving_mean, norm.moving_variance)}
    for variable, old in zip(model.variables, before, strict=True):
        new = ops.convert_to_numpy(variable)
        assert np.any(new != old) if id(variable) in measured else np.array_equal(new, old), variable.path
    for network, norm in zip((model.student, model.teacher), norms, strict=True):  # each through its own weights
        hidden = [ops.convert_to_numpy(network.get_layer("hidden")(x, training=False)) for x in batches()]
        mean, variance = statistics(norm)
        np.testing.assert_allclose(mean, np.mean([h.mean(0) for h in hidden], axis=0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(variance, np.mean([h.var(0) for h in hidden], axis=0), rtol=1e-5, atol=1e-6)
    after = statistics(norms[0])
    fitted(model)
    assert np.any(statistics(norms[0])[0] != after[0])


def test_of_a_consistency_model_it_is_the_student():
    model = compiled(dense_net(norm=True), recipe())
    fitted(model)
    teacher = weights(model.teacher)
    student = statistics(model.student.get_layer("norm"))
    crk.reestimate_batchnorm(model, batches())
    assert_same(weights(model.teacher), teacher)
    assert np.any(statistics(model.student.get_layer("norm"))[0] != student[0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "there is no batch; give one at least"),
        (np.zeros((8, 4), "float32"), r"takes batches, got one array of shape \(8, 4\)"),
        ([np.ones((8, 4), "float32"), np.ones((8, 5), "float32")], None),
    ],
)
def test_after_an_error_the_network_is_as_it_was(given, message):
    network = dense_net(norm=True)
    before, norm = weights(network), network.get_layer("norm")
    with pytest.raises(cr.CRCoreError if message else Exception, match=message):
        crk.reestimate_batchnorm(network, given)
    assert_same(weights(network), before)
    assert (norm.momentum, "call" in vars(norm)) == (0.99, False)


def test_networks_that_cannot_be_measured_are_refused():
    with pytest.raises(cr.CRCoreError, match="has no BatchNormalization; leave the call out"):
        crk.reestimate_batchnorm(dense_net(), batches())
    network = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(renorm=True, name="again")])
    with pytest.raises(cr.CRCoreError, match="'again' has renorm=True"):
        crk.reestimate_batchnorm(network, batches())
