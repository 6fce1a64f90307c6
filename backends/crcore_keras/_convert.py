"""`convert`: the deployable integer form of a trained student or teacher."""

from __future__ import annotations

from typing import Any

import keras

from crcore import CRCoreError
from crcore_keras._consistency_model import ConsistencyModel
from crcore_keras._layers import IntegerLayer, QuantizedLayer, quantizers_in, to_integers
from crcore_keras._prepare import copied
from crcore_keras._tree import walk


def convert(model: keras.Model) -> Any:
    """The integer form of a prepared model: integer weights, and scales and zero points for weights and inputs.

    Each quantized layer gets ``integer_weight`` (an `IntegerWeight`) in place of its float kernel; ``input_quantizer``
    stays, frozen, with ``scale``, ``zero_point`` and ``codes(x)``. The result computes what ``model.predict`` computes,
    from the same numbers; its weights are the integers.

    Args:
        model: a model from `prepare`, trained; or a `ConsistencyModel`, whose average is taken where it has one, else
            its student.

    Returns:
        a new model that is not trainable; ``model`` is left as it is.

    Raises:
        CRCoreError: nothing in ``model`` is quantized, a quantizer has not seen data yet, or it is a float teacher.

    >>> import crcore, keras
    >>> net = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> from crcore_keras import prepare
    >>> converted = convert(prepare(net, crcore.Recipe(crcore.LSQ(bits=4), None)))
    >>> converted.layers[0].integer_weight.bits, converted.layers[0].integer_weight.codes.dtype
    (8, 'int8')
    """
    if isinstance(model, ConsistencyModel):
        model = model.teacher if model.has_average else model.student
    named = list(walk(model)) if isinstance(model, keras.Model) else []
    if any(isinstance(layer, IntegerLayer) for _, layer in named):
        raise CRCoreError(f"{model.name!r} is converted already")
    if not any(isinstance(layer, QuantizedLayer) for _, layer in named):
        raise CRCoreError(f"{type(model).__name__} has no quantized layer; convert takes a model from prepare(...)")
    quantizers = quantizers_in(model)
    if not all(quantizer.enabled for quantizer in quantizers):
        raise CRCoreError(
            "a float teacher, EMA(quantized=False), computes nothing that integers could reproduce; convert the student"
        )
    waiting = [name for name, layer in named if layer in quantizers and not layer.initialized]
    if waiting:
        raise CRCoreError(
            f"{waiting} have not seen data yet; run a batch in train mode, then convert. A layer that is never called, "
            "because the model uses its weight in a function of its own, belongs in Recipe(skip=...)"
        )
    converted = copied(model)
    to_integers(converted)
    for quantizer in quantizers_in(converted):
        quantizer.freeze()
    converted.trainable = False
    return converted
