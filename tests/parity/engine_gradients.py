"""Gradients on each engine by its own means: what users' training steps do."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import keras
import numpy as np


def gradients_of(
    f: Callable[..., Any], inputs: list[Any], cotangent: Any, *, compiled: bool = False
) -> tuple[Any, list[Any]]:
    """``f(*inputs)`` and the gradients of ``sum(cotangent * f)`` with respect to each input, in NumPy; zeros for none.

    ``compiled``: by the engine's compiler, as the steps of ``fit`` are.
    """
    found: Any
    match keras.backend.backend():
        case "tensorflow":
            import tensorflow as tf

            tensors = [tf.convert_to_tensor(np.asarray(each)) for each in inputs]

            def tape(cotangent: Any, *tensors: Any) -> Any:
                with tf.GradientTape() as tape:
                    tape.watch(tensors)
                    y = f(*tensors)
                return y, tape.gradient(y, tensors, output_gradients=cotangent)

            step = tf.function(tape, jit_compile=True, autograph=False) if compiled else tape
            y, found = step(tf.convert_to_tensor(np.asarray(cotangent)), *tensors)
        case "jax":
            import jax

            # Operation by operation, which are compiled once for each shape, whatever f is; or the whole of f.
            with nullcontext() if compiled else jax.disable_jit():
                step = jax.jit(_step(f)) if compiled else _step(f)
                y, found = step(jax.numpy.asarray(cotangent), *[jax.numpy.asarray(each) for each in inputs])
        case _:
            import torch

            tensors = [torch.tensor(np.asarray(each), requires_grad=True) for each in inputs]
            y = f(*tensors)
            if y.requires_grad:
                y.backward(torch.tensor(np.asarray(cotangent)))
            found = [tensor.grad for tensor in tensors]
    arrays = [
        np.zeros_like(each) if gradient is None else keras.ops.convert_to_numpy(gradient)
        for each, gradient in zip(inputs, found, strict=True)
    ]
    return keras.ops.convert_to_numpy(y), arrays


def compiled(f: Callable[..., Any]) -> Callable[..., Any]:
    """``f`` as the engine's compiler makes it; torch has none that Keras uses by default."""
    match keras.backend.backend():
        case "tensorflow":
            import tensorflow as tf

            return tf.function(f, jit_compile=True, autograph=False)
        case "jax":
            import jax

            return jax.jit(f)
        case _:
            return f


def _step(f: Callable[..., Any]) -> Callable[..., Any]:
    import jax

    def step(cotangent: Any, *inputs: Any) -> Any:
        y, vjp = jax.vjp(f, *inputs)
        return y, vjp(cotangent)

    return step
