"""`save_quantized` and `load_quantized`: converted networks as small files, their integers packed."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import safetensors
import safetensors.numpy
import torch
from torch import Tensor, nn

from crcore import CRCoreError, PortableLayer, QuantizedCheckpoint
from crcore_torch._convert import IntegerWeight, convert, hold
from crcore_torch._entries import (
    arrays_of,
    check_tied,
    flags_of,
    is_matrix,
    own_tensors,
    quantizers_of,
    set_flags,
    settings_of,
)
from crcore_torch._fake_quantize import FakeQuantize
from crcore_torch._follow import unwrapped
from crcore_torch._layers import IntegerLayer, QuantizedLayer, channel_axis
from crcore_torch._prepare import attach
from crcore_torch._teacher import Teacher

_HALF = (torch.float16, torch.bfloat16)
# What NumPy or safetensors has no type for.
_FOREIGN = (torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2)

Model = TypeVar("Model", bound=nn.Module)


def save_quantized(model: nn.Module, path: str | os.PathLike[str], *, names: Mapping[str, str] | None = None) -> None:
    """Save the integer form of a trained model in a file of the size of its integers.

    A safetensors file: a weight of ``b`` bits takes ``b`` bits per element, DoReFa's too; scales, zero points, input
    quantizers, biases, statistics and layers left in float are float32 (float64 in float64 models). docs/parity.md has
    its form.

    Args:
        model: from `prepare`, trained, wrapped or not; a `Teacher`, whose average is saved; or from `convert`.
        path: the file, replaced as a whole or not at all.
        names: from this model's layer names (``named_modules``) to those in the file, where they should differ.

    Raises:
        CRCoreError: as for `convert`; ``names`` does not fit; a tensor is of a type that NumPy lacks; the file cannot
            be written.
    """
    source = unwrapped(model.model if isinstance(model, Teacher) else model)
    if not isinstance(source, nn.Module):
        raise CRCoreError(f"save_quantized takes a model from prepare(...) or convert(...), got {type(model).__name__}")
    is_converted = any(isinstance(module, IntegerLayer) for module in source.modules())
    layers = _layers(source if is_converted else convert(source))
    QuantizedCheckpoint(path, names).write(layers, safetensors.numpy.save_file)


def load_quantized(model: Model, path: str | os.PathLike[str], *, names: Mapping[str, str] | None = None) -> Model:
    """The integer form of a model, from what `save_quantized` saved; no recipe, training or data are needed.

    Within PyTorch it computes exactly, bit for bit, what the saved model computed. All is checked before anything is
    built. Nothing in the file is executed.

    Args:
        model: the float architecture, as `prepare` took it, of the dtype of the saved one. Its values play no part.
        path: the file.
        names: from this model's layer names to those in the file, for layers whose names differ.

    Returns:
        a new module, as from `convert`: in eval mode, without gradients; ``model`` is left as it is.

    Raises:
        CRCoreError: the file is missing, damaged, of another version, or does not fit the model; the model is prepared
            or converted, or its tensors have no values yet.
    """
    source = unwrapped(model)
    _check_float(source)
    channels = {name: _channels(m) for name, m in source.named_modules() if "weight" in _tensors(m) and _is_known(m)}
    found = QuantizedCheckpoint(path, names).read_for(_layers(source), channels, safetensors.safe_open)
    check_tied(_values(source, found))
    loaded = copy.deepcopy(source)
    quantized = {name: layer for name, layer in found.items() if layer.quantizers and name in channels}
    attach(loaded, [(name, nn.Identity(), _input_quantizer(name, loaded, each)) for name, each in quantized.items()])
    shared: dict[int, IntegerWeight] = {}
    for name, each in quantized.items():
        if "weight_quantizer" in each.quantizers:
            layer: Any = loaded.get_submodule(name)
            codes = each.arrays["weight"]
            if id(codes) not in shared:  # one array for all layers that share it
                shared[id(codes)] = _integers(each, layer._parameters["weight"])
            hold(layer, shared[id(codes)])
    with torch.no_grad():
        for _, tensor, value in _values(loaded, found):
            tensor.copy_(value)
    for name, each in found.items():
        for place, quantizer in quantizers_of(loaded.get_submodule(name)).items():
            set_flags(quantizer, each.flags[place])
    return loaded.eval().requires_grad_(False)  # type: ignore[return-value]


def _check_float(model: Any) -> None:
    if not isinstance(model, nn.Module) or isinstance(model, Teacher):
        raise CRCoreError(f"load_quantized takes the float network as a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, (QuantizedLayer, IntegerLayer)):
            raise CRCoreError(f"layer {name!r} is prepared or converted already; load_quantized takes the float model")
        for entry, tensor in own_tensors(module).items():
            if tensor.is_meta or nn.parameter.is_lazy(tensor):
                raise CRCoreError(
                    f"{entry} of layer {name!r} has no shape or no values yet; run a batch through a lazy model, and "
                    "move one on the meta device with to_empty(), first"
                )


def _layers(model: nn.Module) -> dict[str, PortableLayer]:
    """Every layer of a converted or a float model that holds something, by name."""
    modules = dict(model.named_modules())
    attached = {
        id(each) for m in modules.values() if not isinstance(m, FakeQuantize) for each in quantizers_of(m).values()
    }
    arrays: dict[Any, Any] = {}
    layers = {
        name: _layer(name, module, arrays)
        for name, module in modules.items()
        if id(module) not in attached and not isinstance(module, IntegerWeight)
    }
    return {name: layer for name, layer in layers.items() if layer.arrays or layer.quantizers}


def _layer(name: str, module: nn.Module, arrays: dict[Any, Any]) -> PortableLayer:
    """``arrays``: those of the model so far, so that a tensor of two layers is one array."""
    settings, attached = settings_of(module), quantizers_of(module)
    own = _tensors(module)
    tensors = own | arrays_of(attached)
    quantizers = {place: quantizer.quantizer for place, quantizer in attached.items()}
    dtypes = {str(tensor.dtype) for tensor in own.values() if tensor.dtype in _HALF}
    if isinstance(module, IntegerLayer):
        weight: Any = module.integer_weight
        if weight.scale.dtype in _HALF:
            raise CRCoreError(
                f"layer {name!r} was cast to {weight.scale.dtype} after convert; cast first, then convert"
            )
        quantizers["weight_quantizer"] = weight.quantizer
        dtypes |= {str(weight.dtype)} if weight.dtype in _HALF else set()
        tensors |= {f"weight_quantizer.{entry}": getattr(weight, entry) for entry in ("scale", "zero_point")}
        tensors["weight"] = weight.codes
    as_they_are = {entry for entry in tensors if entry not in own or (entry == "weight" and _is_known(module))}
    unknown = [entry for entry in own if is_matrix(own[entry]) and entry not in as_they_are]
    if unknown or (isinstance(module, FakeQuantize) and any(is_matrix(each) for each in tensors.values())):
        settings["axes"] = "crcore_torch"
    if dtypes:
        settings["dtype"] = ", ".join(sorted(dtype.removeprefix("torch.") for dtype in dtypes))
    found = {}
    for entry, tensor in tensors.items():
        as_vector = entry not in as_they_are and entry not in unknown
        key = id(tensor), as_vector
        if key not in arrays:
            arrays[key] = _array(tensor.reshape(-1) if as_vector else tensor)
        found[entry] = arrays[key]
    return PortableLayer(found, settings, quantizers, {place: flags_of(each) for place, each in attached.items()})


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """What a layer itself computes with; not the arrays of a quantizer, and not a counter that only training reads."""
    if isinstance(module, (FakeQuantize, IntegerWeight)):
        return {}
    return {entry: tensor for entry, tensor in own_tensors(module).items() if entry != "num_batches_tracked"}


def _array(tensor: Tensor) -> Any:
    """In NumPy, half precision as float32, which loses nothing; the core refuses what NumPy has no type for."""
    tensor = tensor.detach().cpu()
    wide = tensor.float() if tensor.dtype in _HALF else tensor
    return wide if wide.dtype in _FOREIGN or wide.layout != torch.strided else wide.numpy()


def _is_known(module: nn.Module) -> bool:
    return channel_axis(module) is not None


def _channels(module: nn.Module) -> tuple[int, ...]:
    """The shape of one scale per output channel."""
    axis, weight = channel_axis(module), own_tensors(module)["weight"]
    return tuple(size if i == axis else 1 for i, size in enumerate(weight.shape))


def _values(model: nn.Module, found: Mapping[str, PortableLayer]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Entry, tensor and new value of all that is not held as integers."""
    for name, layer in found.items():
        module = model.get_submodule(name)
        for entry, tensor in (_tensors(module) | arrays_of(quantizers_of(module))).items():
            if entry != "weight" or "weight_quantizer" not in layer.quantizers:
                yield f"{name}.{entry}", tensor, torch.from_numpy(layer.arrays[entry]).reshape(tensor.shape)


def _input_quantizer(name: str, model: nn.Module, layer: PortableLayer) -> nn.Module:
    quantizer, weight = layer.quantizers.get("input_quantizer"), own_tensors(model.get_submodule(name))["weight"]
    if quantizer is None:
        return nn.Identity()
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    made = FakeQuantize(quantizer, device=weight.device, dtype=dtype)
    made.name = f"{name}.input_quantizer".lstrip(".")
    return made


def _integers(layer: PortableLayer, weight: Tensor) -> IntegerWeight:
    """The integers of a layer, on the device and in the memory order of its float weight."""
    codes, scale, zero_point = (
        torch.from_numpy(layer.arrays[entry])
        for entry in ("weight", "weight_quantizer.scale", "weight_quantizer.zero_point")
    )
    return IntegerWeight(
        torch.empty_like(weight, dtype=codes.dtype, requires_grad=False).copy_(codes),
        scale.to(weight.device, copy=True),
        zero_point.to(weight.device, copy=True),
        quantizer=layer.quantizers["weight_quantizer"],
        dtype=weight.dtype,
    )
