"""Gradients on each engine by its own means: what users' training steps do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np


def gradients_of(f: Callable[..., Any], inputs: list[Any], cotangent: Any) -> tuple[Any, list[Any]]:
    """``f(*inputs)`` and the gradients of ``sum(cotangent * f)`` with respect to each input, in NumPy; zeros for none."""
    found: Any
    match keras.backend.backend():
        case "tensorflow":
            import tensorflow as tf

            tensors = [tf.convert_to_tensor(np.asarray(each)) for each in inputs]
            with tf.GradientTape() as tape:
                tape.watch(tensors)
                y = f(*tensors)
            found = tape.gradient(y, tensors, output_gradients=tf.convert_to_tensor(np.asarray(cotangent)))
        case "jax":
            import jax

            y, vjp = jax.vjp(f, *[jax.numpy.asarray(each) for each in inputs])
            found = vjp(jax.numpy.asarray(cotangent))
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
