"""The core's forward and gradient, handed to Keras. Beside `_derivatives`, the one file that touches autograd."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from keras import ops

from crcore import Quantizer
from crcore_keras._xp import derivatives, xp


def fake_quantize(x: Any, quantizer: Quantizer, parameters: tuple[Any, ...], elements: Any) -> Any:
    """``quantizer.forward(x, *parameters)``, differentiated by ``quantizer.vjp``; twice differentiable.

    Args:
        x: a tensor (a Keras Variable would be refused by custom_gradient), float32 or float64.
        quantizer: any quantizer of the core.
        parameters: its arrays, tensors with ``x.ndim`` dimensions and the dtype of ``x``.
        elements: how many elements share one scale; of an activation, within one sample. A number, or a 0-d tensor
            where the shape is known only at run time.
    """

    return _differentiable(quantizer, elements, derivatives())(x, *parameters)


def _differentiable(quantizer: Quantizer, elements: Any, times: int) -> Callable[..., Any]:
    """The quantizer as an operation whose forward has a gradient of its own ``times`` levels deep."""
    if times == 0:
        return functools.partial(quantizer.forward, xp=xp)
    forward = _differentiable(quantizer, elements, times - 1)

    @ops.custom_gradient  # type: ignore[untyped-decorator]
    def quantize(x: Any, *parameters: Any) -> Any:
        def gradient(*arguments: Any, upstream: Any = None) -> Any:
            # torch hands in the inputs and the cotangent as a keyword, TensorFlow and JAX the cotangent alone.
            cotangent = arguments[0] if upstream is None else upstream
            found = quantizer.vjp(cotangent, x, *parameters, elements=elements, xp=xp)
            constants = [xp.zeros_like(array) for array in parameters[len(found) - 1 :]]
            return (*found, *constants)

        return forward(x, *parameters), gradient

    return quantize  # type: ignore[no-any-return]


def stop_gradient(x: Any) -> Any:
    """``x`` as a constant."""
    return ops.stop_gradient(x)
