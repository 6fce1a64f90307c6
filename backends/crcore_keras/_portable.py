"""`save_portable` and `load_portable`: checkpoints that the other backend loads too."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import keras
import safetensors
import safetensors.numpy

from crcore import CRCoreError, PortableCheckpoint, PortableLayer
from crcore_keras._consistency_model import ConsistencyModel
from crcore_keras._entries import FileLayer, file_layers, flags_of, set_flags
from crcore_keras._fake_quantize import FakeQuantize
from crcore_keras._layers import IntegerLayer
from crcore_keras._model import refresh
from crcore_keras._tree import walk


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
    for name, layer in mine.items():  # nothing below can fail
        for entry, array in layer.arrays.items():
            array.assign(found[name].arrays[entry])
        for place, quantizer in layer.quantizers.items():
            set_flags(quantizer, found[name].flags[place])
    refresh(model)
    return model


def _portable(found: Mapping[str, FileLayer]) -> dict[str, PortableLayer]:
    """The layers in the file's form."""
    return {
        name: PortableLayer(
            {entry: array.numpy() for entry, array in layer.arrays.items()},
            {**layer.settings, "enabled": all(quantizer.enabled for quantizer in layer.quantizers.values())},
            {place: quantizer._given for place, quantizer in layer.quantizers.items()},
            {place: flags_of(quantizer) for place, quantizer in layer.quantizers.items()},
        )
        for name, layer in found.items()
    }


def _layers(model: Any) -> dict[str, FileLayer]:
    """Every layer of a prepared model that holds something, by name."""
    if isinstance(model, ConsistencyModel):
        raise CRCoreError("a ConsistencyModel holds two networks; give model.student or model.teacher")
    named = dict(walk(model)) if isinstance(model, keras.Model) else {}
    if any(isinstance(layer, IntegerLayer) for layer in named.values()):
        raise CRCoreError(f"{model.name!r} is converted to integers; save the model that convert was given")
    if not any(isinstance(layer, FakeQuantize) for layer in named.values()):
        raise CRCoreError(f"{type(model).__name__} is not prepared; portable checkpoints hold models from prepare(...)")
    found = file_layers(model)
    for layer in found.values():
        for text in layer.foreign.values():
            raise CRCoreError(text)
    return found
