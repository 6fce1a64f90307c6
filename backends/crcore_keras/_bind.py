"""The core's forward and gradient, handed to Keras. The one file that touches autograd."""

from __future__ import annotations

from typing import Any

from keras import ops

from crcore import Quantizer
from crcore_keras._xp import xp


def fake_quantize(x: Any, quantizer: Quantizer, parameters: tuple[Any, ...], elements: Any) -> Any:
    """``quantizer.forward(x, *parameters)``, differentiated by ``quantizer.vjp``.

    Args:
        x: a tensor (a Keras Variable would be refused by custom_gradient), float32 or float64.
        quantizer: any quantizer of the core.
        parameters: its arrays, tensors with ``x.ndim`` dimensions and the dtype of ``x``.
        elements: how many elements share one scale; of an activation, within one sample. A number, or a 0-d tensor
            where the shape is known only at run time.
    """

    @ops.custom_gradient  # type: ignore[untyped-decorator]
    def quantize(x: Any, *parameters: Any) -> Any:
        def gradient(*arguments: Any, upstream: Any = None) -> Any:
            # torch hands in the inputs and the cotangent as a keyword, TensorFlow and JAX the cotangent alone.
            cotangent = arguments[0] if upstream is None else upstream
            found = quantizer.vjp(cotangent, x, *parameters, elements=elements, xp=xp)
            constants = [xp.zeros_like(array) for array in parameters[len(found) - 1 :]]
            return (*found, *constants)

        return quantizer.forward(x, *parameters, xp=xp), gradient

    return quantize(x, *parameters)


def stop_gradient(x: Any) -> Any:
    """``x`` as a constant."""
    return ops.stop_gradient(x)
