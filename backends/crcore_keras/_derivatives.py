"""Derivatives of a network's loss by its weights, on the engine that runs.

Keras has no gradient that is the same on every engine, so this one file asks each by its own means, and imports the one
that runs when it is asked. Beside `_bind`, which gives quantizers their two derivatives, it is the one that touches
autograd. The Hessian is taken by reverse over reverse differentiation: custom gradients have no forward mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras

Tensors = Sequence[Any]
# f(weights, *data): with the weights as a list of tensors and the rest as tensors.
Function = Callable[..., Any]


def compiled(f: Function) -> Function:
    """``f`` as the engine runs it best, without derivatives."""
    match keras.backend.backend():
        case "jax":
            import jax

            return jax.jit(f)  # type: ignore[no-any-return]
        case "tensorflow":
            import tensorflow as tf

            return tf.function(f, autograph=False)  # type: ignore[no-any-return]
        case _:
            import torch

            return torch.no_grad()(f)  # type: ignore[no-any-return]


def gradient(f: Function) -> Callable[..., Tensors]:
    """``df / dweights`` as a function of ``(weights, *data)``, for an ``f`` that gives a number."""
    match keras.backend.backend():
        case "jax":
            import jax

            return jax.jit(jax.grad(f))  # type: ignore[no-any-return]
        case "tensorflow":
            import tensorflow as tf

            return tf.function(_tensorflow_gradient(f), autograph=False)  # type: ignore[no-any-return]
        case _:
            return lambda weights, *data: _torch_gradient(f, _leaves(weights), data)


def product(f: Function) -> Callable[..., Tensors]:
    """The Hessian of ``f`` times a vector, as a function of ``(weights, vector, *data)``."""
    match keras.backend.backend():
        case "jax":
            import jax

            def times_jax(weights: Tensors, vector: Tensors, *data: Any) -> Tensors:
                _, pull_back = jax.vjp(lambda weights: jax.grad(f)(weights, *data), weights)
                return pull_back(vector)[0]  # type: ignore[no-any-return]

            return jax.jit(times_jax)  # type: ignore[no-any-return]
        case "tensorflow":
            import tensorflow as tf

            def times_tensorflow(weights: Tensors, vector: Tensors, *data: Any) -> Tensors:
                with tf.GradientTape() as tape:
                    tape.watch(weights)
                    found = _tensorflow_gradient(f)(weights, *data)
                return tape.gradient(found, weights, vector, tf.UnconnectedGradients.ZERO)  # type: ignore[no-any-return]

            return tf.function(times_tensorflow, autograph=False)  # type: ignore[no-any-return]
        case _:
            return lambda weights, vector, *data: _torch_product(f, _leaves(weights), vector, data)


def _tensorflow_gradient(f: Function) -> Function:
    import tensorflow as tf

    def gradient(weights: Tensors, *data: Any) -> Tensors:
        with tf.GradientTape() as tape:
            tape.watch(weights)
            value = f(weights, *data)
        return tape.gradient(value, weights, unconnected_gradients=tf.UnconnectedGradients.ZERO)  # type: ignore[no-any-return]

    return gradient


def _leaves(weights: Tensors) -> Tensors:
    return [weight.detach().requires_grad_() for weight in weights]


def _torch_gradient(f: Function, weights: Tensors, data: Sequence[Any], *, differentiable: bool = False) -> Tensors:
    import torch

    value = f(weights, *data)
    return torch.autograd.grad(value, weights, create_graph=differentiable, materialize_grads=True)


def _torch_product(f: Function, weights: Tensors, vector: Tensors, data: Sequence[Any]) -> Tensors:
    import torch

    gradient = _torch_gradient(f, weights, data, differentiable=True)
    pairs = [(g, v) for g, v in zip(gradient, vector, strict=True) if g.requires_grad]  # not of what is linear
    if not pairs:
        return [torch.zeros_like(weight) for weight in weights]
    outputs, cotangents = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, weights, cotangents, materialize_grads=True)
