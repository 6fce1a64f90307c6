"""Which of a network's outputs are the logits that the consistency term compares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras
from keras import ops

from crcore import CRCoreError

# The smallest normal float32: its logarithm is finite, and no softmax output above it is changed.
_SMALLEST = 2.0**-126


def logits_function(model: Any, output: str | None) -> Callable[[Any], Any]:
    """A function of the model's outputs that gives the logits of the output named ``output``.

    Probabilities are recognised by the last layer of Functional and Sequential models, and become their logarithms,
    whose softmax they are. The outputs of subclassed models are taken for logits.

    Raises:
        CRCoreError: ``output`` names no output, is missing where there are several, or has a sigmoid.
    """
    names = list(getattr(model, "output_names", None) or [])
    if output is not None and names and output not in names:
        raise CRCoreError(f"output={output!r} is no output of {model.name!r}; it has {names}")
    if output is None and len(names) > 1:
        raise CRCoreError(
            f"{model.name!r} has the outputs {names}; say which one is held to the teacher: "
            f"ConsistencyModel(..., output={names[0]!r})"
        )
    index = names.index(output) if output in names else 0
    activation = _activation(model, index)
    if activation == "sigmoid":
        raise CRCoreError(
            f"the output of {model.name!r} ends in a sigmoid; the consistency term compares classes, so give one logit "
            "per class, two for a yes or no"
        )

    def logits(outputs: Any) -> Any:
        if isinstance(outputs, Mapping):
            if output not in outputs:
                raise CRCoreError(f"output={output!r} is no output of {model.name!r}; it gives {sorted(outputs)}")
            found = outputs[output]
        else:
            found = outputs[index] if isinstance(outputs, (tuple, list)) else outputs
        return ops.log(ops.maximum(found, _SMALLEST)) if activation == "softmax" else found

    return logits


def _activation(model: Any, index: int) -> str | None:
    """The name of the activation that the output ends in, where the graph tells."""
    outputs = getattr(model, "outputs", None)
    if not outputs:
        return None
    layer = outputs[index]._keras_history.operation
    if isinstance(layer, keras.Model):
        return _activation(layer, min(index, len(layer.outputs or [None]) - 1))
    if isinstance(layer, keras.layers.Softmax):
        return "softmax"
    return getattr(getattr(layer, "activation", None), "__name__", None)
