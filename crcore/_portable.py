"""The portable checkpoint: one form of file for prepared networks, which every backend writes and reads.

Its tensors are named ``<layer>.<entry>``, in PyTorch's names and axis order: ``weight``, ``bias``, ``running_mean``,
``running_var``, and a quantizer's arrays such as ``weight_quantizer.scale``. Its metadata hold for each layer the names
of its tensors, the settings that must be those of the network (its kind, epsilon, groups), its quantizers as recipes
write them, and their flags.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from crcore._checkpoints import (
    KEY,
    Form,
    PortableLayer,
    array_differences,
    decoded,
    encoded,
    file_names,
    key,
    matched,
    setting_differences,
    write,
)
from crcore._errors import CRCoreError

_FORM = Form("portable", 1, "save_portable")
_DTYPES = ("float32", "float64")
_FLAGS = {"initialized": (bool,), "signed": (bool, type(None)), "frozen": (bool,)}


@dataclass(frozen=True)
class PortableCheckpoint:
    """A safetensors file that carries a prepared network from one backend to another.

    Args:
        path: the file.
        names: from the network's layer names to those in the file, for layers whose names differ.
    """

    path: str | os.PathLike[str]
    names: Mapping[str, str] | None = None

    def write(self, layers: Mapping[str, PortableLayer], save_file: Callable[..., None]) -> None:
        """Write a network; the file is replaced as a whole or not at all.

        Args:
            layers: the network's layers by name; their arrays are float32 or float64.
            save_file: `safetensors.numpy.save_file`.

        Raises:
            CRCoreError: ``names`` does not fit the network, arrays are neither float32 nor float64, a quantizer is
                none of crcore's, or the file cannot be written.
        """
        _check_dtypes(layers)
        renamed = {file: layers[name] for name, file in file_names(layers, self.names).items()}
        metadata = _FORM.described(layers={name: _described(each) for name, each in renamed.items()})
        tensors = [(key(n, entry), array) for n, each in renamed.items() for entry, array in each.arrays.items()]
        if len(dict(tensors)) < len(tensors):
            raise CRCoreError(f"two tensors of {self.path} would have one name; give layers other names with names=")
        write(self.path, dict(tensors), metadata, save_file)

    def read(self, layers: Mapping[str, PortableLayer], safe_open: Callable[..., Any]) -> dict[str, PortableLayer]:
        """What the file holds for each layer of a network, checked to fit it in full.

        Args:
            layers: the network's layers by name, as `write` would be given them.
            safe_open: `safetensors.safe_open`.

        Returns:
            by the network's names, layers with the same entries and shapes as those given.

        Raises:
            CRCoreError: the file is missing, damaged, or no portable checkpoint of this version; it or the network has
                layers that the other lacks; a layer's kind, arrays, settings or quantizers differ.
        """
        _check_dtypes(layers)
        names = file_names(layers, self.names)
        with _FORM.opened(self.path, safe_open) as file:
            described = _checked((file.metadata() or {}).get(KEY), set(file.keys()))
            found = {
                name: _layer(each, {entry: file.get_tensor(key(name, entry)) for entry in each["arrays"]})
                for name, each in described.items()
            }
        return matched(self.path, layers, names, found, _differences)


def _check_dtypes(layers: Mapping[str, PortableLayer]) -> None:
    for name, layer in layers.items():
        for entry, array in layer.arrays.items():
            if str(array.dtype) not in _DTYPES:
                raise CRCoreError(
                    f"{entry} of layer {name!r} is {array.dtype}; portable checkpoints hold float32 and float64, which "
                    "lose nothing on the way: cast the network to float32 first"
                )


def _described(layer: PortableLayer) -> dict[str, Any]:
    """The layer's part of the metadata."""
    return {
        "arrays": sorted(layer.arrays),
        "settings": dict(layer.settings),
        "quantizers": {place: encoded(place, quantizer) for place, quantizer in layer.quantizers.items()},
        "flags": {place: dict(flags) for place, flags in layer.flags.items()},
    }


def _layer(described: Mapping[str, Any], arrays: Mapping[str, Any]) -> PortableLayer:
    quantizers = {place: decoded(place, each) for place, each in described["quantizers"].items()}
    return PortableLayer(arrays, described["settings"], quantizers, described["flags"])


def _checked(text: str | None, keys: set[str]) -> dict[str, Any]:
    """The layers that the metadata describe, whose form is as expected and whose tensors are all there."""
    layers = _FORM.checked(text).get("layers")
    if not isinstance(layers, dict) or not all(_is_described(each) for each in layers.values()):
        raise _FORM.damaged("its metadata are damaged")
    expected = {key(name, entry) for name, each in layers.items() for entry in each["arrays"]}
    if expected != keys:
        raise CRCoreError(f"its tensors are not those of its metadata: {sorted(expected ^ keys)[:3]}; save it again")
    return layers


def _is_described(layer: Any) -> bool:
    """Whether one layer's metadata have the form that `_described` gives them."""
    kinds = {"arrays": list, "settings": dict, "quantizers": dict, "flags": dict}
    if not isinstance(layer, dict) or {key: type(value) for key, value in layer.items()} != kinds:
        return False
    return (
        all(isinstance(entry, str) for entry in layer["arrays"])
        and layer["flags"].keys() == layer["quantizers"].keys()
        and all(
            isinstance(flags, dict)
            and flags.keys() == _FLAGS.keys()
            and all(isinstance(flags[name], kinds) for name, kinds in _FLAGS.items())
            and (flags["signed"] is not None or not flags["initialized"])
            for flags in layer["flags"].values()
        )
    )


def _differences(name: str, mine: PortableLayer, theirs: PortableLayer) -> list[str]:
    """In what a layer of the network and its counterpart in the file differ; the first kind of it."""
    quantizers = [
        f"{place} is {theirs.quantizers.get(place)!r} in the file, {mine.quantizers.get(place)!r} in the network; "
        f"prepare the network with the recipe that was saved, or give this layer the file's by "
        f"Recipe(overrides={{{name!r}: ...}})"
        for place in sorted({*mine.quantizers, *theirs.quantizers})
        if mine.quantizers.get(place) != theirs.quantizers.get(place)
    ]
    if found := setting_differences(mine, theirs) or quantizers:
        return found
    signs = [
        f"the file says signed={flags['signed']} of {place}, which is {mine.quantizers[place]!r}; save it again"
        for place, flags in theirs.flags.items()
        if mine.quantizers[place].signed not in (None, flags["signed"])
    ]
    return signs or array_differences(mine.arrays, theirs.arrays)
