"""What the tests of prepare, convert and saving share: small models, one training step, comparisons to the bit."""

from __future__ import annotations

from typing import Any

import crcore_keras as crk
import keras
import numpy as np
from keras import layers, ops

import crcore as cr


def recipe(bits: int = 4, **options: Any) -> cr.Recipe:
    return cr.Recipe(cr.LSQ(bits, per_channel=True), cr.LSQ(bits), **options)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def numbers(value: Any) -> np.ndarray:
    """A tensor or variable in NumPy; bfloat16, which NumPy lacks, as float32."""
    dtype = keras.backend.standardize_dtype(value.dtype)
    return np.array(ops.convert_to_numpy(ops.cast(value, "float32") if dtype == "bfloat16" else value))


def mlp() -> Any:
    """Vectors [N, 6] to three classes."""
    hidden = [layers.Dense(8, "relu", name="first"), layers.Dense(8, "relu", name="middle")]
    return keras.Sequential([keras.Input((6,)), *hidden, layers.Dense(3, name="last")], name="mlp")


def convnet() -> Any:
    """Images [N, 8, 8, 3] to three classes: a branch, a nested model, a shared layer, a separable convolution."""
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, strides=2, padding="same", activation="relu", name="stem")(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    shared = layers.Conv2D(8, 1, activation="gelu", name="shared")
    x = layers.Add()([x, shared(shared(x))])
    block = [layers.DepthwiseConv2D(3, name="depthwise"), layers.SeparableConv2D(4, 2, name="separable")]
    x = keras.Sequential([keras.Input((4, 4, 8)), *block], name="block")(x)
    return keras.Model(inputs, layers.Dense(3, name="head")(layers.Flatten()(x)), name="convnet")


def transformer() -> Any:
    """Tokens [N, 5] of 11 kinds to three classes."""
    inputs = keras.Input((5,), dtype="int32")
    x = layers.Embedding(11, 8, name="embed")(inputs)
    x = layers.Add()([x, layers.MultiHeadAttention(2, 4, name="attention")(x, x)])
    x = layers.LayerNormalization(name="norm")(x)
    x = layers.TimeDistributed(layers.Dense(8, "relu", name="each"), name="over_time")(x)
    x = layers.EinsumDense("btd,de->bte", (5, 8), bias_axes="e", name="einsum")(x)
    return keras.Model(inputs, layers.Dense(3, name="head")(layers.GlobalAveragePooling1D()(x)), name="transformer")


@keras.saving.register_keras_serializable("small_models")
class Subclassed(keras.Model):
    """Vectors [N, 6] to three classes, by code; a list of layers and a layer that holds others."""

    def __init__(self, width: int = 8, **options: Any) -> None:
        super().__init__(**options)
        self.width = width
        self.stem = layers.Dense(width, "relu", name="stem")
        self.blocks = [Residual(width, name=f"block_{n}") for n in range(2)]
        self.head = layers.Dense(3, name="head")

    def call(self, x: Any, training: bool = False) -> Any:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, training=training)
        return self.head(x)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"width": self.width}


@keras.saving.register_keras_serializable("small_models")
class Residual(layers.Layer):
    def __init__(self, width: int, **options: Any) -> None:
        super().__init__(**options)
        self.width = width
        self.dense = layers.Dense(width, "relu", name="dense")
        self.dropout = layers.Dropout(0.1)

    def build(self, shape: Any) -> None:
        self.dense.build(shape)

    def call(self, x: Any, training: bool = False) -> Any:
        return x + self.dropout(self.dense(x), training=training)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"width": self.width}


def subclassed() -> Any:
    model = Subclassed(name="subclassed")
    model(np.zeros((1, 6), "float32"))
    return model


def vectors(n: int = 4, seed: int = 0) -> np.ndarray:
    return random(n, 6, seed=seed)


def images(n: int = 4, seed: int = 0) -> np.ndarray:
    return random(n, 8, 8, 3, seed=seed)


def tokens(n: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 11, (n, 5)).astype("int32")


MODELS = {
    "Sequential": (mlp, vectors),
    "Functional": (convnet, images),
    "attention": (transformer, tokens),
    "subclassed": (subclassed, vectors),
}


def labels(n: int = 4) -> np.ndarray:
    return np.arange(n) % 3


def compiled(model: Any, optimizer: Any = None, **options: Any) -> Any:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # Compiling takes longer than the few steps of a test; not on JAX, which compiles each operation by itself then.
    options.setdefault("run_eagerly", keras.backend.backend() != "jax")
    model.compile(optimizer or keras.optimizers.SGD(0.05, momentum=0.9), loss, **options)
    return model


def trained(model: Any, batch: np.ndarray, steps: int = 2) -> Any:
    """After some steps on one batch."""
    compiled(model)
    for _ in range(steps):
        model.train_on_batch(batch, labels(len(batch)))
    return model


def quantized(model: Any) -> dict[str, Any]:
    """The layers with a quantizer, by name."""
    found = {layer.name: layer for layer in model._flatten_layers() if hasattr(layer, "weight_quantizer")}
    return {name: found[name] for name in found}


def kernel_of(layer: Any) -> Any:
    """The float kernel that a layer holds, also where a quantizer stands in front of it."""
    return vars(layer).get("_kernel", vars(layer).get("kernel"))


def quantizers(model: Any) -> list[Any]:
    return [layer for layer in model._flatten_layers() if isinstance(layer, crk.FakeQuantize)]


def snapshot(model: Any) -> dict[str, np.ndarray]:
    """Every variable, by place and name; no state of a random generator, which Keras saves for some layers only."""
    kept = [variable for variable in model.variables if "seed_generator" not in variable.path]
    return {f"{place} {variable.path}": numbers(variable) for place, variable in enumerate(kept)}


def assert_same_bits(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert len(left) == len(right), left.keys() ^ right.keys()
    for (name, mine), theirs in zip(left.items(), right.values(), strict=True):
        assert mine.dtype == theirs.dtype, name
        np.testing.assert_array_equal(mine, theirs, err_msg=name)
