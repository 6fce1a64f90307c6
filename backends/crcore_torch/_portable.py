"""`save_portable` and `load_portable`: checkpoints that the other backend loads too."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import safetensors
import safetensors.numpy
import torch
from torch import Tensor, nn

from crcore import CRCoreError, PortableCheckpoint, PortableLayer
from crcore_torch._entries import (
    arrays_of,
    check_tied,
    flags_of,
    is_known_weight,
    is_matrix,
    own_tensors,
    quantizers_of,
    set_flags,
    settings_of,
)
from crcore_torch._fake_quantize import FakeQuantize
from crcore_torch._follow import unwrapped
from crcore_torch._layers import IntegerLayer
from crcore_torch._teacher import Teacher

Model = TypeVar("Model", bound=nn.Module)


def save_portable(model: nn.Module, path: str | os.PathLike[str], *, names: Mapping[str, str] | None = None) -> None:
    """Save a prepared model so that every backend of crcore loads it into the same architecture.

    A safetensors file with weights, BatchNorm statistics, and each quantizer with its state; no optimizer, step count
    or counters such as ``num_batches_tracked``. docs/parity.md has its form.

    Args:
        model: a model from `prepare`, wrapped or not, or a `Teacher`, whose average is saved.
        path: the file, replaced as a whole or not at all.
        names: from this model's layer names (``named_modules``) to those in the file, where they should differ.

    Raises:
        CRCoreError: the model is not prepared, or converted; a layer has tensors whose layout the file has no word
            for, or that are neither float32 nor float64; ``names`` does not fit; the file cannot be written.
    """
    PortableCheckpoint(path, names).write(_portable(_layers(model)), safetensors.numpy.save_file)


def load_portable(model: Model, path: str | os.PathLike[str], *, names: Mapping[str, str] | None = None) -> Model:
    """Fill a prepared model with what `save_portable` saved, of this backend or another.

    The model computes what the saved one computed, from the same integers. All is checked before anything is assigned:
    after an error the model is as it was. Nothing in the file is executed.

    Args:
        model: prepared with the recipe of the saved one, of the same architecture; or a `Teacher`, whose average is
            filled. Parameters stay the objects that they are, so optimizers keep working.
        path: the file.
        names: from this model's layer names to those in the file, for layers whose names differ.

    Returns:
        ``model``.

    Raises:
        CRCoreError: as for `save_portable`; or the file is missing, damaged, of another version, or does not fit.
    """
    layers = _layers(model)
    found = PortableCheckpoint(path, names).read(_portable(layers), safetensors.safe_open)
    assigned = [
        (f"{name}.{entry}", tensor, torch.from_numpy(found[name].arrays[entry]).reshape(tensor.shape))
        for name, layer in layers.items()
        for entry, tensor in layer.tensors.items()
    ]
    check_tied(assigned)
    with torch.no_grad():  # nothing below can fail
        for _, tensor, value in assigned:
            tensor.copy_(value)
        for name, layer in layers.items():
            for place, quantizer in layer.quantizers.items():
                set_flags(quantizer, found[name].flags[place])
    return model


@dataclass(frozen=True)
class _Layer:
    """One layer's tensors by their entry in the file, what must agree, and its quantizers by their place.

    ``vectors``: the entries that the file holds as vectors, whatever axes of size 1 they have here.
    """

    tensors: Mapping[str, Tensor]
    vectors: frozenset[str]
    settings: Mapping[str, Any]
    quantizers: Mapping[str, FakeQuantize]

    def portable(self) -> PortableLayer:
        """The layer in the file's form."""
        return PortableLayer(
            {entry: _array(tensor, entry in self.vectors) for entry, tensor in self.tensors.items()},
            {**self.settings, "enabled": all(quantizer.enabled for quantizer in self.quantizers.values())},
            {place: quantizer._given for place, quantizer in self.quantizers.items()},
            {place: flags_of(quantizer) for place, quantizer in self.quantizers.items()},
        )


def _layers(model: Any) -> dict[str, _Layer]:
    """Every layer of a prepared model that holds something, by name."""
    model = unwrapped(model.model if isinstance(model, Teacher) else model)
    modules = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    if any(isinstance(module, IntegerLayer) for module in modules.values()):
        raise CRCoreError(f"{type(model).__name__} is converted to integers; save the model that convert was given")
    if not any(isinstance(module, FakeQuantize) for module in modules.values()):
        raise CRCoreError(f"{type(model).__name__} is not prepared; portable checkpoints hold models from prepare(...)")
    attached = {
        id(each) for m in modules.values() if not isinstance(m, FakeQuantize) for each in quantizers_of(m).values()
    }
    layers = {name: _layer(name, module) for name, module in modules.items() if id(module) not in attached}
    return {name: layer for name, layer in layers.items() if layer.tensors or layer.quantizers}


def _layer(name: str, module: nn.Module) -> _Layer:
    quantizers = quantizers_of(module)
    if isinstance(module, FakeQuantize):
        if any(array.ndim for array in module._arrays()):
            raise CRCoreError(
                f"{name!r} has a scale per channel, whose axis in another backend is not known: only quantizers that "
                "prepare attached can be saved so"
            )
        return _Layer(arrays_of(quantizers), frozenset(), settings_of(module), quantizers)
    # Not counters, indices and masks, which are integers or made by the architecture.
    own = {entry: tensor for entry, tensor in own_tensors(module).items() if tensor.is_floating_point()}
    vectors = frozenset(entry for entry in own if not is_known_weight(entry, module))
    for entry in vectors:
        if is_matrix(own[entry]):
            raise CRCoreError(
                f"{entry} {list(own[entry].shape)} of layer {name!r} ({type(module).__name__}) has no place in a "
                "portable checkpoint: the order of its axes in another backend is not known. Use state_dict() within "
                "PyTorch"
            )
    return _Layer({**own, **arrays_of(quantizers)}, vectors, settings_of(module), quantizers)


def _portable(layers: Mapping[str, _Layer]) -> dict[str, PortableLayer]:
    return {name: layer.portable() for name, layer in layers.items()}


def _array(tensor: Tensor, as_vector: bool) -> Any:
    if tensor.dtype not in (torch.float32, torch.float64):
        return tensor  # NumPy has no bfloat16; the core refuses the dtype, and says of which layer
    array = tensor.detach().cpu().numpy()
    return array.reshape(-1) if as_vector else array
