"""Keras as the array namespace of the core, on whatever engine is active. The one file that renames array functions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import keras
from keras import ops


def _divide(x: Any, shared: Any) -> Any:
    # XLA turns the division by a number, and as JAX sets it up that by a broadcast array too, into a product with the
    # reciprocal, which differs in the last bit for many quotients. It does not look through a selection.
    if isinstance(shared, (int, float)) or keras.backend.backend() == "jax":
        shared = ops.where(x == x, shared, 1.0)
    return x / shared


def _logaddexp(x: Any, y: Any) -> Any:
    # TensorFlow's gradient of ops.logaddexp is wrong where both are equal: all of it goes to the first.
    return ops.logsumexp(ops.stack([x, y]), axis=0)


def derivatives() -> int:
    """How many custom gradients lie in each other, so that a quantizer can be differentiated twice."""
    # JAX differentiates the forward of a custom gradient by its own rules when it differentiates a gradient: through
    # `round`, whose derivative is zero. The other engines ask the custom gradient again.
    return 2 if keras.backend.backend() == "jax" else 1


xp = SimpleNamespace(
    abs=ops.abs,
    amax=ops.max,
    amin=ops.min,
    clip=ops.clip,
    cos=ops.cos,
    divide=_divide,
    exp=ops.exp,
    log=ops.log,
    logaddexp=_logaddexp,
    mean=ops.mean,
    reshape=ops.reshape,
    round=ops.round,
    sqrt=ops.sqrt,
    sum=ops.sum,
    tanh=ops.tanh,
    where=ops.where,
    zeros_like=ops.zeros_like,
)
