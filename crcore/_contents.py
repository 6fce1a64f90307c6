"""The tensors of a quantized checkpoint: what lies where, and the way there and back.

There are few of them, because a name, type and shape for each array of a network of many small layers
would take more room than its integers do:

========================  =============================================================================================
tensor                    content
========================  =============================================================================================
``codes``                 uint8: the integers of every quantized weight, each layer's from a whole byte on, see
                          `crcore._packing`
``float32``, ``int32``    one for each type, named by it: all arrays of that type, one after the other
``layers``                uint8: JSON, compressed by zlib, that says what the others hold
========================  =============================================================================================

The JSON has ``quantizers``, a list in the form that recipes are saved in, and ``layers``. A layer has ``settings`` that
must be those of the network, ``quantizers`` (place -> index in that list), ``live`` (places whose range is not frozen),
and ``arrays``: entry -> shape, with its type in front if that is not float32, or ``["tied", layer, entry]`` for one and
the same array in an earlier layer. Sorted by layer and entry, that is the order in which they lie in the tensors. The
``weight`` of a layer with a ``weight_quantizer`` is packed; a ``weight_quantizer.zero_point`` of zeros is left out.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from crcore._checkpoints import Form, PortableLayer, decoded, encoded
from crcore._errors import CRCoreError
from crcore._packing import packed_codes, packed_size, unpacked_codes
from crcore._typing import Quantizer

FORM = Form("quantized", 1, "save_quantized")
WEIGHT, SCALE, ZERO_POINT = "weight", "weight_quantizer.scale", "weight_quantizer.zero_point"
_CODES, _LAYERS, _TIED = "codes", "layers", "tied"
_DTYPES = ("float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool")
_LONGEST = 2**26  # bytes of JSON: so much for a million layers, and no more from a few bytes that claim to be gigabytes


def tensors_of(layers: Mapping[str, PortableLayer]) -> dict[str, Any]:
    """The tensors of the file that holds these layers, by name."""
    contents = _Contents()
    for name, layer in sorted(layers.items()):
        try:
            contents.add(name, layer)
        except CRCoreError as error:
            raise CRCoreError(f"layer {name!r} {error}") from None
    return contents.tensors()


def layers_of(tensors: Mapping[str, Any]) -> dict[str, PortableLayer]:
    """The layers that the tensors of a file hold."""
    expected = {name: name if name in _DTYPES else "uint8" for name in tensors}
    if expected.keys() - {_CODES, _LAYERS, *_DTYPES} or any(
        tensor.ndim != 1 or str(tensor.dtype) != expected[name] for name, tensor in tensors.items()
    ):
        raise FORM.damaged(f"its tensors {sorted(tensors)} are not of this form")
    content = _content(tensors.get(_LAYERS, np.zeros(0, np.uint8)))
    rest = _Tensors({name: tensor for name, tensor in tensors.items() if name != _LAYERS})
    found: dict[str, PortableLayer] = {}
    for name, described in content[_LAYERS].items():
        quantizers = {place: decoded(place, content["quantizers"][n]) for place, n in described["quantizers"].items()}
        arrays: dict[str, Any] = {}
        flags = {place: _flags(each, place in described["live"]) for place, each in quantizers.items()}
        found[name] = PortableLayer(arrays, described["settings"], quantizers, flags)
        try:
            for entry, shape in described["arrays"].items():
                arrays[entry] = _array(entry, shape, quantizers, rest, found)
            if WEIGHT in arrays and _is_packed(WEIGHT, quantizers) and SCALE in arrays:
                arrays.setdefault(ZERO_POINT, np.zeros(arrays[SCALE].shape, np.int32))
            _check_weight(found[name])
        except CRCoreError as error:
            raise CRCoreError(f"layer {name!r} {error}") from None
    rest.check_empty()
    return found


@dataclass
class _Contents:
    """What goes into the tensors of a file, layer by layer."""

    parts: dict[str, list[Any]] = field(default_factory=lambda: {_CODES: []})
    layers: dict[str, Any] = field(default_factory=dict)
    quantizers: list[dict[str, Any]] = field(default_factory=list)
    seen: dict[int, tuple[str, str]] = field(default_factory=dict)  # where an array, by its identity, is stored

    def add(self, name: str, layer: PortableLayer) -> None:
        _check_weight(layer)
        self.layers[name] = {
            "settings": dict(layer.settings),
            "arrays": {
                entry: self._array(name, entry, layer)
                for entry in sorted(layer.arrays)
                if entry != ZERO_POINT or np.any(layer.arrays[entry])
            },
            "quantizers": {place: self._quantizer(place, each) for place, each in sorted(layer.quantizers.items())},
            "live": sorted(place for place, flags in layer.flags.items() if not flags["frozen"]),
        }

    def tensors(self) -> dict[str, Any]:
        text = json.dumps({_LAYERS: self.layers, "quantizers": self.quantizers}, separators=(",", ":"), allow_nan=False)
        packed = {name: np.concatenate(parts) for name, parts in self.parts.items() if parts}
        return packed | {_LAYERS: np.frombuffer(zlib.compress(text.encode(), 9), np.uint8)}

    def _array(self, name: str, entry: str, layer: PortableLayer) -> list[Any]:
        array = layer.arrays[entry]
        first = self.seen.setdefault(id(array), (name, entry))
        if first != (name, entry):
            return [_TIED, *first]
        dtype = str(array.dtype)
        if _is_packed(entry, layer.quantizers):
            self.parts[_CODES].append(packed_codes(array, layer.quantizers["weight_quantizer"]))
            return list(array.shape)
        if dtype not in _DTYPES:
            raise CRCoreError(f"has {entry} of type {dtype}; a quantized checkpoint holds {', '.join(_DTYPES)}")
        self.parts.setdefault(dtype, []).append(array.reshape(-1))
        return [*([] if dtype == "float32" else [dtype]), *array.shape]

    def _quantizer(self, place: str, quantizer: Quantizer) -> int:
        described = encoded(place, quantizer)
        if described not in self.quantizers:
            self.quantizers.append(described)
        return self.quantizers.index(described)


@dataclass
class _Tensors:
    """The tensors of a file, from which arrays are taken in order."""

    tensors: Mapping[str, Any]
    taken: dict[str, int] = field(default_factory=dict)

    def take(self, name: str, count: int) -> Any:
        start = self.taken.get(name, 0)
        part = self.tensors.get(name, np.zeros(0, np.uint8))[start : start + count]
        if len(part) < count:
            raise FORM.damaged(f"it has fewer {name} than its layers say")
        self.taken[name] = start + count
        return part

    def check_empty(self) -> None:
        more = [name for name, each in self.tensors.items() if len(each) > self.taken.get(name, 0)]
        if more:
            raise FORM.damaged(f"it has more {more} than its layers say")


def _array(
    entry: str, shape: list[Any], quantizers: Mapping[str, Any], rest: _Tensors, found: Mapping[str, PortableLayer]
) -> Any:
    if shape and shape[0] == _TIED:
        _, layer, earlier = shape
        return found[layer].arrays[earlier]
    dtype, shape = (shape[0], shape[1:]) if shape and isinstance(shape[0], str) else ("float32", shape)
    if not all(type(size) is int and size >= 0 for size in shape) or dtype not in _DTYPES:
        raise FORM.damaged(f"has {entry} of shape {str(shape)[:80]}")
    count = math.prod(shape)
    if _is_packed(entry, quantizers):
        quantizer = quantizers["weight_quantizer"]
        return unpacked_codes(rest.take(_CODES, packed_size(count, quantizer.bits)), quantizer, count).reshape(shape)
    return rest.take(dtype, count).reshape(shape)


def _content(compressed: Any) -> dict[str, Any]:
    """The JSON that describes the layers, whose form is as expected."""
    stream = zlib.decompressobj()
    text = stream.decompress(compressed.tobytes(), _LONGEST)
    if not stream.eof:
        raise FORM.damaged("the description of its layers does not end")
    content = json.loads(text)
    if (
        not isinstance(content, dict)
        or not isinstance(content.get("quantizers"), list)
        or not isinstance(content.get(_LAYERS), dict)
        or not all(_is_described(each, len(content["quantizers"])) for each in content[_LAYERS].values())
    ):
        raise FORM.damaged("the description of its layers is damaged")
    return content


def _is_described(layer: Any, quantizers: int) -> bool:
    """Whether a layer has the form that `_Contents.add` gives it; ``quantizers``: how many the file has."""
    kinds = {"settings": dict, "arrays": dict, "quantizers": dict, "live": list}
    return (
        isinstance(layer, dict)
        and {key: type(value) for key, value in layer.items()} == kinds
        and all(isinstance(each, (str, bool, int, float)) for each in layer["settings"].values())
        and all(isinstance(shape, list) for shape in layer["arrays"].values())
        and layer["quantizers"].keys() <= {"weight_quantizer", "input_quantizer"}
        and all(type(n) is int and 0 <= n < quantizers for n in layer["quantizers"].values())
    )


def _is_packed(entry: str, quantizers: Mapping[str, Any]) -> bool:
    return entry == WEIGHT and "weight_quantizer" in quantizers


def _flags(quantizer: Any, is_live: bool) -> dict[str, bool | None]:
    return {"initialized": True, "signed": quantizer.signed, "frozen": not is_live}


def _check_weight(layer: PortableLayer) -> None:
    """That a quantizer knows its sign, and that codes have a scale that makes weights of them."""
    unknown = [place for place, quantizer in layer.quantizers.items() if quantizer.signed is None]
    if unknown:
        raise CRCoreError(f"has {unknown} that do not know whether their codes are signed: they have not seen data yet")
    if not _is_packed(WEIGHT, layer.quantizers) or WEIGHT not in layer.arrays:
        return
    if SCALE not in layer.arrays:
        raise CRCoreError(f"has integers for a weight and no {SCALE}")
    shape, scale = layer.arrays[WEIGHT].shape, layer.arrays[SCALE]
    zero_point = layer.arrays.get(ZERO_POINT, np.zeros(scale.shape, np.int32))
    fits = scale.ndim == 0 or (
        scale.ndim == len(shape) and all(n in (1, size) for n, size in zip(scale.shape, shape, strict=True))
    )
    if not fits or zero_point.shape != scale.shape or zero_point.dtype != np.int32 or scale.dtype.kind != "f":
        raise CRCoreError(
            f"has a scale {scale.dtype} {list(scale.shape)} and a zero point {zero_point.dtype} "
            f"{list(zero_point.shape)} for a weight {list(shape)}; both are 0-d, or one per channel"
        )
    if not np.all((scale > 0) & np.isfinite(scale)):
        raise CRCoreError("has a scale that is not a positive number; the network diverged, or the file is damaged")
