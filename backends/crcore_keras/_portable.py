"""`save_portable` and `load_portable`: checkpoints that the other backend loads too."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import safetensors
import safetensors.numpy
from keras import layers, ops

from crcore import CRCoreError, PortableCheckpoint, PortableLayer
from crcore_keras._consistency_model import ConsistencyModel
from crcore_keras._fake_quantize import _FROZEN, _INITIALIZED, _SIGNED, _UNKNOWN_SIGN, FakeQuantize
from crcore_keras._layers import IntegerLayer, Kernel, kernels_of
from crcore_keras._tree import walk

# For each axis in the file, the axes here that it is made of, in that order; () for an axis of size 1.
Layout = tuple[tuple[int, ...], ...]

# What a layer is called in the file; other layers are of kind "other".
_KINDS: dict[Any, str] = {
    (layers.Dense, layers.EinsumDense): "linear",
    (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose): "conv_transpose",
    (layers.Conv1D, layers.Conv2D, layers.Conv3D, layers.DepthwiseConv1D, layers.DepthwiseConv2D): "conv",
    (layers.SeparableConv1D, layers.SeparableConv2D): "conv",
    layers.Embedding: "embedding",
    layers.BatchNormalization: "batch_norm",
    layers.LayerNormalization: "layer_norm",
    layers.GroupNormalization: "group_norm",
    layers.RMSNormalization: "rms_norm",
    layers.PReLU: "prelu",
}
# What the file calls a variable of those layers.
_ENTRIES = {
    "gamma": "weight",
    "scale": "weight",
    "alpha": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


def save_portable(model: keras.Model, path: str | os.PathLike[str], *, names: Mapping[str, str] | None = None) -> None:
    """Save a prepared model so that every backend of crcore loads it into the same architecture.

    A safetensors file with weights, BatchNorm statistics, and each quantizer with its state; no optimizer, step count,
    metrics or seeds. docs/parity.md has its form.

    Args:
        model: a model from `prepare`, or the ``student`` or ``teacher`` of a `ConsistencyModel`.
        path: the file, replaced as a whole or not at all.
        names: from this model's layer names (as `prepare` gives them) to those in the file, where they should differ.

    Raises:
        CRCoreError: the model is not prepared, or converted; a layer has variables whose layout the file has no word
            for, or that are neither float32 nor float64; ``names`` does not fit; the file cannot be written.
    """
    PortableCheckpoint(path, names).write(_portable(_layers(model)), safetensors.numpy.save_file)


def load_portable(model: Any, path: str | os.PathLike[str], *, names: Mapping[str, str] | None = None) -> Any:
    """Fill a prepared model with what `save_portable` saved, of this backend or another.

    The model computes what the saved one computed, from the same integers. All is checked before anything is assigned:
    after an error the model is as it was. Nothing in the file is executed.

    Args:
        model: prepared with the recipe of the saved one, of the same architecture.
        path: the file.
        names: from this model's layer names to those in the file, for layers whose names differ.

    Returns:
        ``model``.

    Raises:
        CRCoreError: as for `save_portable`; or the file is missing, damaged, of another version, or does not fit.
    """
    mine = _layers(model)
    found = PortableCheckpoint(path, names).read(_portable(mine), safetensors.safe_open)
    assigned = [
        (each.variable, _from_file(found[name].arrays[entry], each.layout, tuple(each.variable.shape)))
        for name, layer in mine.items()
        for entry, each in layer.arrays.items()
    ]
    for variable, value in assigned:  # nothing below can fail
        variable.assign(value)
    for name, layer in mine.items():
        for place, quantizer in layer.quantizers.items():
            _set_flags(quantizer, found[name].flags[place])
    for _, layer in walk(model):
        if isinstance(layer, layers.Normalization):
            layer.finalize_state()
    return model


@dataclass(frozen=True)
class _Array:
    """A variable, and how it lies in the file."""

    variable: Any
    layout: Layout

    def numpy(self) -> Any:
        """Its value as the file holds it."""
        return _to_file(np.asarray(ops.convert_to_numpy(self.variable)), self.layout)


@dataclass(frozen=True)
class _Layer:
    """One layer's variables by their entry in the file, what must agree, and its quantizers by their place."""

    arrays: Mapping[str, _Array]
    settings: Mapping[str, Any]
    quantizers: Mapping[str, FakeQuantize]


def _portable(found: Mapping[str, _Layer]) -> dict[str, PortableLayer]:
    """The layers in the file's form."""
    return {
        name: PortableLayer(
            {entry: array.numpy() for entry, array in layer.arrays.items()},
            {**layer.settings, "enabled": all(quantizer.enabled for quantizer in layer.quantizers.values())},
            {place: quantizer._given for place, quantizer in layer.quantizers.items()},
            {place: _flags(quantizer) for place, quantizer in layer.quantizers.items()},
        )
        for name, layer in found.items()
    }


def _layers(model: Any) -> dict[str, _Layer]:
    """Every layer of a prepared model that holds something, by name."""
    if isinstance(model, ConsistencyModel):
        raise CRCoreError("a ConsistencyModel holds two networks; give model.student or model.teacher")
    named = dict(walk(model)) if isinstance(model, keras.Model) else {}
    if any(isinstance(layer, IntegerLayer) for layer in named.values()):
        raise CRCoreError(f"{model.name!r} is converted to integers; save the model that convert was given")
    if not any(isinstance(layer, FakeQuantize) for layer in named.values()):
        raise CRCoreError(f"{type(model).__name__} is not prepared; portable checkpoints hold models from prepare(...)")
    found: dict[str, _Layer] = {}
    attached: set[int] = set()
    for name, layer in named.items():
        if id(layer) not in attached:  # its quantizers come after it
            parts = dict(_parts(name, layer))
            attached |= {id(quantizer) for part in parts.values() for quantizer in part.quantizers.values()}
            found |= {part: each for part, each in parts.items() if each.arrays or each.quantizers}
    return found


def _parts(name: str, layer: Any) -> Iterator[tuple[str, _Layer]]:
    """The layer as the file knows it: a separable convolution is two."""
    if isinstance(layer, FakeQuantize):
        yield name, _own_quantizer(name, layer)
        return
    settings = _settings(layer)
    kernels = kernels_of(layer)
    own = _vectors(name, layer, [kernel.variable(layer) for kernel in kernels], settings["kind"])
    if not kernels:
        yield name, _Layer(own, settings, {})
    for kernel in kernels:
        layout = _layout(name, layer, kernel)
        places = {"weight_quantizer": kernel.weight_quantizer, "input_quantizer": kernel.input_quantizer}
        found = {place: getattr(layer, attribute, None) for place, attribute in places.items()}
        quantizers = {place: quantizer for place, quantizer in found.items() if quantizer is not None}
        arrays = {"weight": _Array(kernel.variable(layer), layout), **_arrays(quantizers, layout)}
        is_last = kernel is kernels[-1]  # which adds the bias
        part = f"{name}.{kernel.part}".removeprefix(".") if kernel.part else name
        yield part, _Layer({**arrays, **own} if is_last else arrays, settings, quantizers)


def _own_quantizer(name: str, quantizer: FakeQuantize) -> _Layer:
    """A quantizer of the user's, in code that `prepare` does not see."""
    if quantizer.shape:
        raise CRCoreError(
            f"{name!r} has a scale per channel, whose axis in another backend is not known: only quantizers that "
            "prepare attached can be saved so"
        )
    quantizers = {"weight_quantizer" if quantizer.role == "weight" else "input_quantizer": quantizer}
    return _Layer(_arrays(quantizers, ()), {"kind": "quantizer"}, quantizers)


def _arrays(quantizers: Mapping[str, FakeQuantize], layout: Layout) -> dict[str, _Array]:
    """Arrays per channel have the weight's axes, others none."""
    return {
        f"{place}.{name}": _Array(array, layout if quantizer.shape else ())
        for place, quantizer in quantizers.items()
        for name, array in zip(quantizer.quantizer.parameters, quantizer.arrays, strict=True)
    }


def _settings(layer: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"kind": next((kind for c, kind in _KINDS.items() if isinstance(layer, c)), "other")}
    if settings["kind"].endswith("norm"):
        settings["eps"] = layer.epsilon
    if settings["kind"] == "group_norm":
        settings["groups"] = layer.groups
    if getattr(layer, "rms_scaling", False):  # a LayerNormalization that computes something else
        settings["rms_scaling"] = True
    return settings


def _vectors(name: str, layer: Any, kernels: Iterable[Any], kind: str) -> dict[str, _Array]:
    """The layer's variables but for its kernels, which the file holds as vectors; integers are counters and seeds."""
    found: dict[str, _Array] = {}
    for variable in [*layer._trainable_variables, *layer._non_trainable_variables]:
        if any(variable is kernel for kernel in kernels) or not keras.backend.is_float_dtype(variable.dtype):
            continue
        entry = variable.name if kind == "other" else _ENTRIES.get(variable.name, variable.name)
        is_bias = isinstance(layer, layers.EinsumDense) and entry == "bias"  # axes as in the merged rows of the kernel
        if (not is_bias and sum(size > 1 for size in variable.shape) > 1) or entry in found:
            raise CRCoreError(
                f"{variable.name} {list(variable.shape)} of layer {name!r} ({type(layer).__name__}) has no place in a "
                "portable checkpoint: the order of its axes in another backend is not known. Use model.save() within "
                "Keras"
            )
        found[entry] = _Array(variable, (tuple(range(len(variable.shape))),))
    return found


def _layout(name: str, layer: Any, kernel: Kernel) -> Layout:
    """How the kernel lies in the file."""
    n = len(kernel.variable(layer).shape)
    if isinstance(layer, layers.Embedding):
        return (0,), (1,)
    if isinstance(layer, layers.EinsumDense):
        return _einsum_layout(name, layer)
    spatial = tuple((axis,) for axis in range(n - 2))
    if kernel.part == "depthwise" or isinstance(layer, (layers.DepthwiseConv1D, layers.DepthwiseConv2D)):
        return (n - 2, n - 1), (), *spatial
    return (n - 1,), (n - 2,), *spatial  # [*k, in, out] -> [out, in, *k]; a transposed one has in and out the other way


def _einsum_layout(name: str, layer: Any) -> Layout:
    """The matrix of an EinsumDense: its rows are the axes of the output, its columns those that are summed over."""
    inputs, output = layer.equation.replace("...", "").replace(" ", "").split("->")
    inputs, kernel = inputs.split(",")
    rows = tuple(kernel.index(label) for label in output if label in kernel)
    columns = tuple(kernel.index(label) for label in inputs if label in kernel)
    if sorted([*rows, *columns]) != list(range(len(kernel))):
        raise CRCoreError(
            f"the kernel of layer {name!r}, EinsumDense({layer.equation!r}), is no matrix, and has no place in a "
            "portable checkpoint. Use model.save() within Keras"
        )
    return rows, columns


def _to_file(value: Any, layout: Layout) -> Any:
    order = [axis for axes in layout for axis in axes]
    return np.transpose(value, order).reshape([math.prod(value.shape[axis] for axis in axes) for axes in layout])


def _from_file(value: Any, layout: Layout, shape: tuple[int, ...]) -> Any:
    """The inverse of `_to_file`; ``shape``: the variable's."""
    order = [axis for axes in layout for axis in axes]
    return np.transpose(value.reshape([shape[axis] for axis in order]), np.argsort(order))


def _flags(quantizer: FakeQuantize) -> dict[str, bool | None]:
    is_initialized = quantizer.initialized  # which reads the flags
    return {"initialized": is_initialized, "signed": quantizer.quantizer.signed, "frozen": quantizer.frozen}


def _set_flags(quantizer: FakeQuantize, flags: Mapping[str, Any]) -> None:
    values = np.zeros(3, "int8")
    values[[_INITIALIZED, _FROZEN]] = flags["initialized"], flags["frozen"]
    values[_SIGNED] = _UNKNOWN_SIGN if flags["signed"] is None else flags["signed"]
    quantizer.flags.assign(values)
    quantizer.read_flags()
