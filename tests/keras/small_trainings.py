"""Networks and data of the tests of training: small, so that each fit() takes a moment."""

from __future__ import annotations

import crcore_keras as crk
import keras
import numpy as np

import crcore as cr

EMA = cr.EMA(0.9)


def recipe(weight=0.5, ema=EMA, bits=4, **options):
    return cr.Recipe(cr.LSQ(bits), cr.LSQ(bits), consistency=cr.Consistency(weight=weight), ema=ema, **options)


def data(n=8, features=4, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, features)).astype("float32"), rng.integers(0, 3, n).astype("int32")


def dense_net(softmax=False, norm=False, features=4):
    initializer = keras.initializers.GlorotUniform
    layers = [keras.Input((features,)), keras.layers.Dense(6, "relu", kernel_initializer=initializer(1), name="hidden")]
    if norm:
        layers.append(keras.layers.BatchNormalization(name="norm"))
    layers.append(keras.layers.Dense(3, kernel_initializer=initializer(2), name="head"))
    if softmax:
        layers.append(keras.layers.Softmax())
    return keras.Sequential(layers)


def compiled(net=None, chosen=None, augment=None, *, logits=True, optimizer=None, **options):
    """A compiled `ConsistencyModel`; options of the model and of compile."""
    chosen = recipe() if chosen is None else chosen
    ours = {key: options.pop(key) for key in ("output", "teacher") if key in options}
    if augment is None and chosen.consistency is not None:
        augment = keras.layers.GaussianNoise(0.3, seed=5)
    model = crk.ConsistencyModel(crk.prepare(net or dense_net(), chosen), chosen, augment, **ours)
    options.setdefault("loss", keras.losses.SparseCategoricalCrossentropy(from_logits=logits))
    model.compile(optimizer or keras.optimizers.SGD(0.1, momentum=0.9), **options)
    return model


def fitted(model, x=None, y=None, **options):
    """The History of a fit() on `data`, silent and in order."""
    if x is None:
        x, y = data()
    if isinstance(x, np.ndarray):
        options.setdefault("batch_size", 4)
    return model.fit(x, y, **{"verbose": 0, "shuffle": False} | options).history


def weights(model):
    return [np.array(array) for array in model.get_weights()]


def assert_same(left, right, tolerance=0.0):
    assert len(left) == len(right)
    for mine, other in zip(left, right, strict=True):
        np.testing.assert_allclose(mine, other, rtol=tolerance, atol=tolerance)


@keras.saving.register_keras_serializable("crcore_tests")
class Shift(keras.layers.Layer):
    """Adds a random number of its own to each call; keeps no state but the seed's."""

    def __init__(self, seed=3, **options):
        super().__init__(**options)
        self.seed = seed
        self.generator = keras.random.SeedGenerator(seed)

    def call(self, x):
        return x + keras.random.normal((1,), seed=self.generator)

    def get_config(self):
        return super().get_config() | {"seed": self.seed}
