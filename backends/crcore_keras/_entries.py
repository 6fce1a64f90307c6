"""Layers as checkpoint files know them: the names and axis order of their variables, their kinds, settings, quantizers.

Files have PyTorch's names and axis order. A separable convolution is two layers there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from keras import layers, ops

from crcore_keras._fake_quantize import _FROZEN, _INITIALIZED, _SIGNED, _UNKNOWN_SIGN, FakeQuantize
from crcore_keras._integers import IntegerWeight
from crcore_keras._layers import Kernel, kernels_of
from crcore_keras._tree import walk

# For each axis in the file, the axes here that it is made of, in that order; () for an axis of size 1.
Layout = tuple[tuple[int, ...], ...]

# What a layer is called in a file; other layers are of kind "other".
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
# What files call a variable of those layers.
_ENTRIES = {
    "gamma": "weight",
    "scale": "weight",
    "alpha": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
HALF = ("float16", "bfloat16")


@dataclass(frozen=True)
class FileArray:
    """A variable, and how it lies in the file."""

    variable: Any
    layout: Layout

    def numpy(self) -> Any:
        """Its value as the file holds it."""
        return self.to_file(np.asarray(ops.convert_to_numpy(self.variable)))

    def to_file(self, value: Any) -> Any:
        """An array of the variable's axes as the file would hold it."""
        order = [axis for axes in self.layout for axis in axes]
        shape = [math.prod(value.shape[axis] for axis in axes) for axes in self.layout]
        return np.transpose(value, order).reshape(shape)

    def assign(self, value: Any) -> None:
        """Set it from what the file holds."""
        self.variable.assign(self.from_file(value))

    def from_file(self, value: Any) -> Any:
        """The inverse of `to_file`."""
        order = [axis for axes in self.layout for axis in axes]
        shape = [self.variable.shape[axis] for axis in order]
        return np.transpose(value.reshape(shape), np.argsort(order))


@dataclass(frozen=True)
class FileLayer:
    """One layer's variables by their entry in the file, what must agree, and its quantizers by their place.

    ``foreign``: of each entry whose axes have a meaning in Keras alone, a text that says so. A weight that is held as
    integers has its `IntegerWeight` in the place of a quantizer.
    """

    arrays: Mapping[str, FileArray]
    settings: Mapping[str, Any]
    quantizers: Mapping[str, Any]
    foreign: Mapping[str, str] = field(default_factory=dict)


def file_layers(model: Any) -> dict[str, FileLayer]:
    """Every layer of a model, float, prepared or converted, that holds something, by name."""
    found: dict[str, FileLayer] = {}
    attached: set[int] = set()
    for name, layer in walk(model):
        if id(layer) not in attached:  # its quantizers come after it
            parts = dict(_parts(name, layer))
            attached |= {id(quantizer) for part in parts.values() for quantizer in part.quantizers.values()}
            found |= {part: each for part, each in parts.items() if each.arrays or each.quantizers}
    return found


def flags_of(quantizer: FakeQuantize) -> dict[str, bool | None]:
    """What a quantizer has learned of its data."""
    is_initialized = quantizer.initialized  # which reads the flags
    return {"initialized": is_initialized, "signed": quantizer.quantizer.signed, "frozen": quantizer.frozen}


def set_flags(quantizer: FakeQuantize, flags: Mapping[str, Any]) -> None:
    """The inverse of `flags_of`."""
    values = np.zeros(3, "int8")
    values[[_INITIALIZED, _FROZEN]] = flags["initialized"], flags["frozen"]
    values[_SIGNED] = _UNKNOWN_SIGN if flags["signed"] is None else flags["signed"]
    quantizer.flags.assign(values)
    quantizer.read_flags()


def scale_shape(layer: Any, kernel: Kernel) -> tuple[int, ...]:
    """The shape in the file of one scale per output channel of a float layer."""
    shape = tuple(kernel.variable(layer).shape)
    axes = {axis % len(shape) for axis in kernel.channels(layer)}
    layout, _ = _layout("", layer, kernel, len(shape))
    return tuple(math.prod(shape[axis] for axis in group if axis in axes) for group in layout)


def _parts(name: str, layer: Any) -> Iterator[tuple[str, FileLayer]]:
    """The layer as files know it."""
    if isinstance(layer, FakeQuantize):
        yield name, _own_quantizer(name, layer)
        return
    settings = _settings(layer)
    kernels = kernels_of(layer)
    own, foreign = _vectors(name, layer, [kernel.variable(layer) for kernel in kernels], settings["kind"])
    if not kernels:
        yield name, FileLayer(own, settings, {}, foreign)
    for kernel in kernels:
        arrays, quantizers, unknown = _kernel(name, layer, kernel)
        is_last = kernel is kernels[-1]  # which adds the bias
        part = f"{name}.{kernel.part}".removeprefix(".") if kernel.part else name
        yield part, FileLayer(arrays | own if is_last else arrays, settings, quantizers, unknown | foreign)


def _kernel(name: str, layer: Any, kernel: Kernel) -> tuple[dict[str, FileArray], dict[str, Any], dict[str, str]]:
    """Arrays, quantizers and what is foreign of one kernel."""
    integers, variable = getattr(layer, kernel.integer_weight, None), kernel.variable(layer)
    weight = variable if integers is None else integers.codes
    if weight is None:  # a layer that has not been built
        return {}, {}, {}
    layout, foreign = _layout(name, layer, kernel, len(weight.shape))
    places = {"weight_quantizer": kernel.weight_quantizer, "input_quantizer": kernel.input_quantizer}
    found = {place: getattr(layer, attribute, None) for place, attribute in places.items()}
    quantizers = {place: quantizer for place, quantizer in found.items() if quantizer is not None}
    arrays = {"weight": FileArray(weight, layout), **_arrays(quantizers, layout)}
    if integers is not None:
        of_scale = layout if integers.quantizer.per_channel else ()
        for entry in ("scale", "zero_point"):
            arrays[f"weight_quantizer.{entry}"] = FileArray(getattr(integers, entry), of_scale)
        quantizers["weight_quantizer"] = integers
    return arrays, quantizers, foreign


def _own_quantizer(name: str, quantizer: FakeQuantize) -> FileLayer:
    """A quantizer of the user's, in code that `prepare` does not see."""
    quantizers = {"weight_quantizer" if quantizer.role == "weight" else "input_quantizer": quantizer}
    arrays = _arrays(quantizers, _identity(quantizer.shape))
    text = (
        f"{name!r} has a scale per channel, whose axis in another backend is not known: only quantizers that "
        "prepare attached can be saved so"
    )
    return FileLayer(arrays, {"kind": "quantizer"}, quantizers, dict.fromkeys(arrays, text) if quantizer.shape else {})


def _arrays(quantizers: Mapping[str, FakeQuantize], layout: Layout) -> dict[str, FileArray]:
    """Arrays per channel have the weight's axes, others none."""
    return {
        f"{place}.{name}": FileArray(array, layout if quantizer.shape else ())
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
    if layer.variable_dtype in HALF:
        settings["dtype"] = layer.variable_dtype
    return settings


def _vectors(name: str, layer: Any, kernels: Iterable[Any], kind: str) -> tuple[dict[str, FileArray], dict[str, str]]:
    """The layer's variables but for its kernels, which the file holds as vectors, and which of them are foreign."""
    found: dict[str, FileArray] = {}
    foreign: dict[str, str] = {}
    for variable in [*layer._trainable_variables, *layer._non_trainable_variables]:
        is_counter = isinstance(layer, layers.Normalization) and variable.name == "count"
        if any(variable is kernel for kernel in kernels) or is_counter or isinstance(layer, IntegerWeight):
            continue
        entry = variable.name if kind == "other" else _ENTRIES.get(variable.name, variable.name)
        is_bias = isinstance(layer, layers.EinsumDense) and entry == "bias"  # axes as in the merged rows of the kernel
        is_matrix = not is_bias and sum(size > 1 for size in variable.shape) > 1
        axes = tuple(range(len(variable.shape)))
        if is_matrix or entry in found:
            entry = entry if entry not in found else f"{entry}_{len(found)}"
            foreign[entry] = (
                f"{variable.name} {list(variable.shape)} of layer {name!r} ({type(layer).__name__}) has no place in a "
                "portable checkpoint: the order of its axes in another backend is not known. Use model.save() within "
                "Keras"
            )
        found[entry] = FileArray(variable, _identity(axes) if is_matrix else (axes,))
    return found, foreign


def _identity(shape: tuple[int, ...]) -> Layout:
    return tuple((axis,) for axis in range(len(shape)))


def _layout(name: str, layer: Any, kernel: Kernel, n: int) -> tuple[Layout, dict[str, str]]:
    """How a kernel of ``n`` axes lies in the file, and what is foreign in that."""
    if isinstance(layer, layers.Embedding):
        return ((0,), (1,)), {}
    if isinstance(layer, layers.EinsumDense):
        return _einsum_layout(name, layer)
    spatial = tuple((axis,) for axis in range(n - 2))
    if kernel.part == "depthwise" or isinstance(layer, (layers.DepthwiseConv1D, layers.DepthwiseConv2D)):
        return ((n - 2, n - 1), (), *spatial), {}
    # [*k, in, out] -> [out, in, *k]; a transposed one has in and out the other way
    return ((n - 1,), (n - 2,), *spatial), {}


def _einsum_layout(name: str, layer: Any) -> tuple[Layout, dict[str, str]]:
    """The matrix of an EinsumDense: its rows are the axes of the output, its columns those that are summed over."""
    inputs, output = layer.equation.replace("...", "").replace(" ", "").split("->")
    inputs, kernel = inputs.split(",")
    rows = tuple(kernel.index(label) for label in output if label in kernel)
    columns = tuple(kernel.index(label) for label in inputs if label in kernel)
    if sorted([*rows, *columns]) == list(range(len(kernel))):
        return (rows, columns), {}
    text = (
        f"the kernel of layer {name!r}, EinsumDense({layer.equation!r}), is no matrix, and has no place in a "
        "portable checkpoint. Use model.save() within Keras"
    )
    return _identity(tuple(range(len(kernel)))), {"weight": text}
