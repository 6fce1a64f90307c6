"""Activations in a graph, however Keras says them: ``activation="relu"``, a layer, or a function on tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import layers

from crcore_keras._graph_network import Network, Shape, Tensor

# Functions without settings, by their name without "_": the operator, and its attributes.
_PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "hardsigmoid": ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}),
    "hardsilu": ("HardSwish", {}),
    "selu": ("Selu", {}),
    "sigmoid": ("Sigmoid", {}),
    "softplus": ("Softplus", {}),
    "softsign": ("Softsign", {}),
    "tanh": ("Tanh", {}),
}
KINDS = frozenset({*_PLAIN, "elu", "gelu", "leakyrelu", "linear", "relu", "relu6", "silu", "softmax"})
_LAYERS = (layers.ELU, layers.LeakyReLU, layers.ReLU, layers.Softmax)


def activated(net: Network, function: Any, x: Tensor) -> Tensor:
    """What an ``activation`` of a layer gives: None, a function of `keras.activations`, or one of Keras' layers.

    Raises:
        CRCoreError: another function, or settings that the graph has no operator for.
    """
    if function is None:
        return x
    if type(function) in _LAYERS:
        return by_name(net, type(function).__name__, vars(function), x)
    name = getattr(function, "__name__", type(function).__name__)
    if getattr(keras.activations, name, None) is not function or _key(name) not in KINDS:
        raise net.error(f"has the activation {name!r}, which exported graphs do not know; they know {known()}")
    return by_name(net, name, {}, x)


def by_name(net: Network, name: str, settings: Mapping[str, Any], x: Tensor) -> Tensor:
    """The activation of that name, of a function or a class; what ``settings`` lacks is Keras' default."""
    key = _key(name)
    if key in _PLAIN:
        op, attributes = _PLAIN[key]
        return _unary(net, op, x, attributes)
    match key:
        case "linear":
            return x
        case "relu":
            return _relu(net, x, settings)
        case "relu6":
            return _clipped(net, x, 6.0)
        case "leakyrelu":
            return _unary(net, "LeakyRelu", x, {"alpha": float(settings.get("negative_slope", 0.2))})
        case "elu":
            return _unary(net, "Elu", x, {"alpha": float(settings.get("alpha", 1.0))})
        case "gelu":
            return _unary(net, "Gelu", x, {"approximate": "tanh" if settings.get("approximate", False) else "none"})
        case "silu":
            return net.add("Mul", [x, _unary(net, "Sigmoid", x)], x.shape, moved=x.moved)
        case _:
            return _softmax(net, x, settings.get("axis", -1))


def activation(net: Network, layer: Any, shape: Shape, x: Tensor) -> Tensor:
    """``Activation``."""
    return activated(net, layer.activation, x)


def activation_layer(net: Network, layer: Any, shape: Shape, x: Tensor) -> Tensor:
    """``ReLU``, ``LeakyReLU``, ``ELU`` and ``Softmax``."""
    kind = next(kind for kind in _LAYERS if isinstance(layer, kind))
    return by_name(net, kind.__name__, vars(layer), x)


def prelu(net: Network, layer: Any, shape: Shape, x: Tensor) -> Tensor:
    """``PReLU``."""
    return net.add("PRelu", [x, net.beside(x, layer.alpha, "alpha")], shape, moved=x.moved)


def known() -> str:
    """The activations, for error messages."""
    return ", ".join(sorted(KINDS))


def _key(name: str) -> str:
    return name.replace("_", "").lower()


def _unary(net: Network, op: str, x: Tensor, attributes: Mapping[str, Any] | None = None) -> Tensor:
    return net.add(op, [x], x.shape, moved=x.moved, attributes=attributes or {})


def _relu(net: Network, x: Tensor, settings: Mapping[str, Any]) -> Tensor:
    slope, highest = float(settings.get("negative_slope") or 0.0), settings.get("max_value")
    if settings.get("threshold") or (slope and highest is not None):
        raise net.error(
            "is a ReLU with a threshold, or with both negative_slope and max_value, which exported graphs do not know; "
            "use ReLU(), ReLU(max_value) or LeakyReLU(negative_slope)"
        )
    if slope:
        return _unary(net, "LeakyRelu", x, {"alpha": slope})
    return _unary(net, "Relu", x) if highest is None else _clipped(net, x, float(highest))


def _clipped(net: Network, x: Tensor, highest: float) -> Tensor:
    ends = [net.constant(np.float32(end), name) for end, name in ((0.0, "lowest"), (highest, "highest"))]
    return net.add("Clip", [x, *ends], x.shape, moved=x.moved)


def _softmax(net: Network, x: Tensor, axis: Any) -> Tensor:
    axes = [axis] if isinstance(axis, int) else list(axis)
    if len(axes) != 1:
        raise net.error(f"is a softmax over the axes {axes}, exported graphs have one over a single axis; use axis=-1")
    x = net.as_in_keras(x)
    return net.add("Softmax", [x], x.shape, attributes={"axis": axes[0] if axes[0] < 0 else axes[0] - x.rank})
