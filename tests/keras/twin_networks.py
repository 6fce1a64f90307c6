"""Networks that are the same in PyTorch and in Keras, and recipes for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import torch
from keras import layers
from torch import nn

import crcore as cr

RECIPES = {
    "LSQ": (cr.LSQ(4, per_channel=True), cr.LSQ(4)),
    "LSQ+": (cr.LSQ(3), cr.LSQPlus(4)),
    "DoReFa and PACT": (cr.DoReFa(4), cr.PACT(4)),
    "MinMax": (cr.MinMax(4, per_channel=True), cr.MinMax(8)),
    "all of them": (cr.LSQ(4, per_channel=True), cr.LSQ(4)),
}
OVERRIDES = {
    "depthwise": {"weights": cr.MinMax(4, per_channel=True), "activations": cr.MinMax(8)},
    "grouped": {"weights": cr.DoReFa(4), "activations": cr.PACT(4)},
    "up": {"weights": cr.LSQ(3, per_channel=True), "activations": cr.LSQPlus(4)},
}


def recipe_of(name: str) -> cr.Recipe:
    overrides = OVERRIDES if name == "all of them" else {}
    return cr.Recipe(*RECIPES[name], overrides=overrides, consistency=cr.Consistency(), ema=cr.EMA(0.5))


class TorchNet(nn.Module):
    """Images [N, 3, 6, 6] to four classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(16, 8, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(8, 6, 3, stride=2)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Any) -> Any:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.grouped(torch.relu(self.depthwise(x)))
        return self.head(self.up(x).mean((2, 3)))


def keras_net() -> Any:
    """The same network; images are [N, 6, 6, 3]."""
    inputs = keras.Input((6, 6, 3))
    x = layers.Conv2D(8, 3, padding="same", use_bias=False, name="stem")(inputs)
    x = layers.ReLU()(layers.BatchNormalization(epsilon=1e-5, name="norm")(x))
    y = layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2, activation="relu", name="depthwise")(x)
    x = layers.Add()([x, layers.Conv2D(8, 3, padding="same", groups=2, name="grouped")(y)])
    x = layers.GlobalAveragePooling2D()(layers.Conv2DTranspose(6, 3, strides=2, name="up")(x))
    return keras.Model(inputs, layers.Dense(4, name="head")(x))


def images(n: int = 3, seed: int = 0) -> tuple[Any, Any]:
    random = np.random.default_rng(seed)
    return random.normal(size=(n, 6, 6, 3)).astype("float32"), random.integers(0, 4, n)


def channels_first(x: Any) -> Any:
    return torch.from_numpy(np.moveaxis(x, -1, 1).copy())


def predicted(model: Any, x: Any) -> Any:
    return model.predict(x, verbose=0)


class Mean(nn.Module):
    def forward(self, x: Any) -> Any:
        return x.mean(tuple(range(2, x.ndim)))


class Turned(nn.Module):
    """[N, T, C] to [N, C, T] and back, as Keras has it."""

    def forward(self, x: Any) -> Any:
        return x.transpose(1, 2)


def torch_1d() -> Any:
    return nn.Sequential(
        Turned(), nn.Conv1d(3, 4, 3), nn.PReLU(4), nn.ConvTranspose1d(4, 6, 2, stride=2), nn.GroupNorm(3, 6), Turned(),
        nn.LayerNorm(6), nn.RMSNorm(6, eps=1e-6), nn.Linear(6, 8), nn.Tanh(), Turned(), Mean(), nn.Linear(8, 2),
    )  # fmt: skip


def keras_1d() -> Any:
    return keras.Sequential([
        keras.Input((7, 3)), layers.Conv1D(4, 3, name="1"), layers.PReLU(shared_axes=[1], name="2"),
        layers.Conv1DTranspose(6, 2, strides=2, name="3"), layers.GroupNormalization(3, epsilon=1e-5, name="4"),
        layers.LayerNormalization(epsilon=1e-5, name="6"), layers.RMSNormalization(epsilon=1e-6, name="7"),
        layers.EinsumDense("abc,cd->abd", (None, 8), bias_axes="d", activation="tanh", name="8"),
        layers.GlobalAveragePooling1D(), layers.Dense(2, name="12"),
    ])  # fmt: skip


def torch_separable() -> Any:
    return nn.Sequential(nn.Conv2d(3, 6, 3, groups=3, bias=False), nn.Conv2d(6, 4, 1), Mean(), nn.Linear(4, 2))


def keras_separable() -> Any:
    return keras.Sequential([
        keras.Input((6, 6, 3)), layers.SeparableConv2D(4, 3, depth_multiplier=2, name="sep"),
        layers.GlobalAveragePooling2D(), layers.Dense(2, name="3"),
    ])  # fmt: skip


def torch_3d() -> Any:
    return nn.Sequential(nn.Conv3d(2, 3, 2), nn.ReLU(), nn.ConvTranspose3d(3, 4, 2), Mean(), nn.Linear(4, 2))


def keras_3d() -> Any:
    return keras.Sequential([
        keras.Input((4, 4, 4, 2)), layers.Conv3D(3, 2, activation="relu", name="0"),
        layers.Conv3DTranspose(4, 2, name="2"), layers.GlobalAveragePooling3D(), layers.Dense(2, name="4"),
    ])  # fmt: skip


def torch_tokens() -> Any:
    return nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 5), Turned(), Mean(), nn.Linear(5, 2))


def keras_tokens() -> Any:
    return keras.Sequential([
        keras.Input((7,), dtype="int32"), layers.Embedding(9, 6, name="0"), layers.Dense(5, name="1"),
        layers.GlobalAveragePooling1D(), layers.Dense(2, name="4"),
    ])  # fmt: skip


PAIRS: dict[str, tuple[Callable[[], Any], Callable[[], Any], Any, Mapping[str, str]]] = {
    "1d": (torch_1d, keras_1d, (7, 3), {}),
    "3d": (torch_3d, keras_3d, (4, 4, 4, 2), {}),
    "separable": (torch_separable, keras_separable, (6, 6, 3), {"sep.depthwise": "0", "sep.pointwise": "1"}),
    "tokens": (torch_tokens, keras_tokens, None, {}),
}
