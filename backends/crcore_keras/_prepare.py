"""`prepare`: the user's model, with fake quantization in it."""

from __future__ import annotations

import warnings
from typing import Any

import keras
import numpy as np

from crcore import CRCoreError, LayerQuantizers, Recipe
from crcore_keras._layers import FLOAT_LAYERS, OPAQUE_LAYERS, QuantizedLayer, attach, base_class, kernels_of
from crcore_keras._model import QuantizedModel, refresh
from crcore_keras._tree import walk


def prepare(model: keras.Model, recipe: Recipe, *, inplace: bool = False) -> Any:
    """Insert the recipe's fake quantization into ``model``.

    Dense, EinsumDense, Conv1-3D, DepthwiseConv1-2D, SeparableConv1-2D, Conv1-3DTranspose and Embedding layers,
    subclasses of them, and those inside of other layers (MultiHeadAttention's projections, nested models) get a
    ``weight_quantizer`` and an ``input_quantizer`` (an Embedding's input is integers, so it has none; a separable
    convolution has two of each). Weight scales are set here; input scales by the first batch of ``fit``.

    Layers are named by their ``name``, after those of the models and layers they are in: ``"encoder.attention.query"``.
    "First" and "last" layer are meant in the order of ``model.layers``.

    Args:
        model: Functional, Sequential or subclassed, built.
        recipe: what is quantized how. ``consistency`` and ``ema`` play no part here.
        inplace: change ``model`` itself instead of a copy, which is made through ``get_config``.

    Returns:
        the prepared model, not compiled.

    Raises:
        CRCoreError: the model has no weights yet, has variables that would silently stay in float (recurrent layers,
            kernels of layers of your own), is prepared already, cannot be copied, or does not fit the recipe. Nothing
            is changed then.

    >>> import crcore, keras
    >>> net = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, "relu"), keras.layers.Dense(2)])
    >>> student = prepare(net, crcore.Recipe(crcore.LSQ(bits=4), crcore.LSQ(bits=4), first_last_bits=None))
    >>> tuple(student.layers[0].weight_quantizer.scale.shape), student.layers[0].weight_quantizer.quantizer.bits
    ((), 4)
    """
    if not isinstance(model, keras.Model):
        raise CRCoreError(f"prepare takes a keras.Model, got {type(model).__name__}; build the model first")
    if not isinstance(recipe, Recipe):
        raise CRCoreError(
            f"prepare takes a crcore.Recipe, got {type(recipe).__name__}; for example Recipe(LSQ(4), LSQ(4))"
        )
    plan = _plan(model, recipe)  # raises before anything is copied or changed
    if not inplace:
        model = copied(model)
    attach(model, plan, QuantizedModel)
    return model


def copied(model: Any) -> Any:
    """A model like ``model``, with weights of its own that hold the same values."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The object being serialized includes a `lambda`")  # no file is made
            described = keras.saving.serialize_keras_object(model)
        described.pop("compile_config", None)
        copy: Any = keras.saving.deserialize_keras_object(described, custom_objects=_classes(model), safe_mode=False)
        copy.set_weights(model.get_weights())
        refresh(copy)
    except Exception as error:
        raise CRCoreError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {' '.join(str(error).split())[:300]}); "
            "give it get_config and from_config, as saving it needs too, or use prepare(..., inplace=True)"
        ) from error
    return copy


def _classes(model: Any) -> dict[str, type]:
    """Classes of the user's own in the model, so that making a copy does not ask that they be registered."""
    kinds = {base_class(layer) for layer in model._flatten_layers()}
    return {
        name: kind
        for kind in kinds
        if not kind.__module__.startswith(("keras.", "crcore_keras."))
        for name in (kind.__name__, keras.saving.get_registered_name(kind))
    }


def _plan(model: Any, recipe: Recipe) -> dict[str, LayerQuantizers]:
    layers: list[str] = []
    weights: dict[str, Any] = {}
    others: list[str] = []
    problems: list[str] = []
    ways_out: list[str] = []
    for name, layer in walk(model):
        shown = f"{name!r} ({type(layer).__name__})"
        if isinstance(layer, QuantizedLayer):
            raise CRCoreError(f"layer {name!r} is prepared already; prepare the float model instead")
        if isinstance(layer, OPAQUE_LAYERS) or _is_inside(name, ways_out):
            others.append(name)
            if isinstance(layer, OPAQUE_LAYERS) and not recipe.skips(name):
                problems.append(f"{shown}: a kind that prepare does not know")
                ways_out.append(name)
        elif kernels := kernels_of(layer):
            problem = _unfit(layer, kernels)
            found = {f"{name}.{kernel.part}".rstrip("."): kernel.variable(layer) for kernel in kernels}
            (others if problem else layers).extend(found)
            weights |= found
            if problem and not recipe.skips(name):
                problems.append(f"{shown}: {problem}")
                ways_out.append(name)
        else:
            others.append(name)
            unseen = {} if isinstance(layer, FLOAT_LAYERS) else _unseen_matrices(layer)
            if unseen and not recipe.skips(name):
                listed = ", ".join(f"{variable!r} {shape}" for variable, shape in unseen.items())
                problems.append(f"{listed} of {shown}: used by code that prepare cannot see")
                ways_out.append(name)
    if not model.built:
        raise CRCoreError(
            f"{type(model).__name__} {model.name!r} has no weights yet; call it on a batch, or "
            "model.build(input_shape), before prepare"
        )
    assigned = recipe.assign(layers, [name for name in others if name]) if layers or others else {}
    if problems:
        skip = ", ".join(map(repr, [*recipe.skip, *ways_out]))
        raise CRCoreError(
            "prepare cannot quantize\n  "
            + "\n  ".join(problems)
            + f"\nTo leave them in float, say so: Recipe(..., skip=({skip},)). To quantize a tensor that your own code "
            "multiplies with, apply a crcore_keras.FakeQuantize to it there, and skip it here."
        )
    if not layers:
        raise CRCoreError(
            f"{type(model).__name__} has no layer that prepare can quantize; it knows Dense, EinsumDense, Conv1-3D, "
            "DepthwiseConv1-2D, SeparableConv1-2D, Conv1-3DTranspose, Embedding and their subclasses"
        )
    plan = {name: quantizers for name, quantizers in assigned.items() if quantizers is not None}
    _check_finite(weights, plan)
    return plan


def _check_finite(weights: dict[str, Any], plan: dict[str, LayerQuantizers]) -> None:
    broken = [
        name
        for name, quantizers in plan.items()
        if quantizers.weights and not np.isfinite(keras.ops.convert_to_numpy(weights[name])).all()
    ]
    if broken:
        raise CRCoreError(f"the weights of {broken} hold NaN or infinity; prepare a model that has not diverged")


def _is_inside(name: str, outer: list[str]) -> bool:
    return any(name.startswith(f"{each}.") for each in outer)


def _unfit(layer: Any, kernels: tuple[Any, ...]) -> str | None:
    """Why a layer of a known kind cannot be quantized all the same."""
    if getattr(layer, "quantization_mode", None):
        return f"it is quantized by Keras already ({layer.quantization_mode}); prepare the float model instead"
    if getattr(layer, "lora_enabled", False):
        return "it has LoRA weights; merge them into its kernel first"
    for kernel in kernels:
        variable = kernel.variable(layer)
        if variable is None:
            return "it has no weights yet; call the model on a batch first"
        if not keras.backend.is_float_dtype(variable.dtype):
            return f"its {kernel.attribute} is {variable.dtype}"
    return None


def _unseen_matrices(layer: Any) -> dict[str, tuple[int, ...]]:
    """Variables that the layer itself holds and that look like matrices, by name."""
    return {
        variable.name: tuple(variable.shape)
        for variable in layer._trainable_variables
        if sum(size > 1 for size in variable.shape) >= 2
    }
