"""`save_quantized` and `load_quantized`: converted networks as small files, their integers packed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import keras
import safetensors
import safetensors.numpy

from crcore import CRCoreError, LayerQuantizers, PortableLayer, QuantizedCheckpoint
from crcore_keras._consistency_model import ConsistencyModel
from crcore_keras._convert import convert
from crcore_keras._entries import HALF, FileArray, FileLayer, file_layers, flags_of, scale_shape, set_flags
from crcore_keras._fake_quantize import FakeQuantize
from crcore_keras._layers import IntegerLayer, QuantizedLayer, attach, kernels_of, to_integers
from crcore_keras._model import QuantizedModel, refresh
from crcore_keras._prepare import copied
from crcore_keras._tree import walk


def save_quantized(model: keras.Model, path: str | os.PathLike[str], *, names: Mapping[str, str] | None = None) -> None:
    """Save the integer form of a trained model in a file of the size of its integers.

    A safetensors file: a weight of ``b`` bits takes ``b`` bits per element, DoReFa's too; scales, zero points, input
    quantizers, biases, statistics and layers left in float are float32 (float64 in float64 models). docs/parity.md has
    its form.

    Args:
        model: from `prepare`, trained; a `ConsistencyModel`, whose average is saved if it has one; or from `convert`.
        path: the file, replaced as a whole or not at all.
        names: from this model's layer names (as `prepare` gives them) to those in the file, where they should differ.

    Raises:
        CRCoreError: as for `convert`; ``names`` does not fit; the file cannot be written.
    """
    is_converted = isinstance(model, keras.Model) and any(isinstance(each, IntegerLayer) for _, each in walk(model))
    layers = _portable(model if is_converted else convert(model))
    QuantizedCheckpoint(path, names).write(layers, safetensors.numpy.save_file)


def load_quantized(model: Any, path: str | os.PathLike[str], *, names: Mapping[str, str] | None = None) -> Any:
    """The integer form of a model, from what `save_quantized` saved; no recipe, training or data are needed.

    On one engine it computes exactly, bit for bit, what the saved model computed. All is checked before anything is
    built. Nothing in the file is executed.

    Args:
        model: the float architecture, built, as `prepare` took it. Its values play no part.
        path: the file.
        names: from this model's layer names to those in the file, for layers whose names differ.

    Returns:
        a new model, as from `convert`, that is not trainable; ``model`` is left as it is.

    Raises:
        CRCoreError: the file is missing, damaged, of another version, or does not fit the model; the model is prepared,
            converted, not built, or cannot be copied.
    """
    channels = _channels(model)
    found = QuantizedCheckpoint(path, names).read_for(_portable(model), channels, safetensors.safe_open)
    plan = {
        name: LayerQuantizers(*(layer.quantizers.get(place) for place in ("weight_quantizer", "input_quantizer")))
        for name, layer in found.items()
        if layer.quantizers and name in channels
    }
    loaded = copied(model)
    attach(loaded, plan, QuantizedModel)
    to_integers(loaded)
    for name, layer in file_layers(loaded).items():
        for entry, array in layer.arrays.items():
            array.assign(found[name].arrays[entry])
        for place, quantizer in layer.quantizers.items():
            if isinstance(quantizer, FakeQuantize):
                set_flags(quantizer, found[name].flags[place])
    refresh(loaded)
    loaded.trainable = False
    return loaded


def _channels(model: Any) -> dict[str, tuple[int, ...]]:
    """Of each weight of a float model that can be quantized, the shape of one scale per channel."""
    if not isinstance(model, keras.Model) or not model.built:
        raise CRCoreError(f"load_quantized takes the float network as a built keras.Model, got {type(model).__name__}")
    found: dict[str, tuple[int, ...]] = {}
    for name, layer in walk(model):
        if isinstance(layer, (QuantizedLayer, ConsistencyModel)):
            raise CRCoreError(
                f"layer {name!r} is prepared or converted already; load_quantized takes the float model, as prepare "
                "does"
            )
        for kernel in kernels_of(layer):
            if kernel.variable(layer) is not None:
                part = f"{name}.{kernel.part}".removeprefix(".") if kernel.part else name
                found[part] = scale_shape(layer, kernel)
    return found


def _portable(model: Any) -> dict[str, PortableLayer]:
    """The layers of a converted or a float model in the file's form."""
    return {name: _layer(layer) for name, layer in file_layers(model).items()}


def _layer(layer: FileLayer) -> PortableLayer:
    settings = dict(layer.settings)
    if layer.foreign:
        settings["axes"] = "crcore_keras"
    quantizers = {place: each for place, each in layer.quantizers.items() if isinstance(each, FakeQuantize)}
    return PortableLayer(
        {entry: _array(array) for entry, array in layer.arrays.items()},
        settings,
        {place: each.quantizer for place, each in layer.quantizers.items()},
        {place: flags_of(quantizer) for place, quantizer in quantizers.items()},
    )


def _array(array: FileArray) -> Any:
    """In NumPy, half precision as float32, which loses nothing."""
    value = array.numpy()
    return value.astype("float32") if str(value.dtype) in HALF else value
