"""The portable checkpoint: one form of file for prepared networks, which every backend writes and reads.

A safetensors file. Its tensors are named ``<layer>.<entry>``, in PyTorch's names and axis order: ``weight``, ``bias``,
``running_mean``, ``running_var``, and a quantizer's arrays such as ``weight_quantizer.scale``. Its metadata have one
entry, ``crcore``, with JSON: ``kind``, ``version``, and for each layer the names of its tensors, the settings that must
be those of the network (its kind, epsilon, groups), its quantizers as recipes write them, and their flags.

Backends say what their layers are in this form and give safetensors' own functions; names, checks, messages and the
order of things stand here. Reading runs nothing that the file names.
"""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from crcore._errors import CRCoreError
from crcore._recipe import Recipe
from crcore._typing import Quantizer

KEY, KIND, VERSION = "crcore", "portable", 1  # one metadata entry, so that equal contents make equal files
_DTYPES = ("float32", "float64")
_FLAGS = {"initialized": (bool,), "signed": (bool, type(None)), "frozen": (bool,)}
_SHOWN = 12  # lines of one message


@dataclass(frozen=True)
class PortableLayer:
    """One layer as a portable checkpoint holds it.

    Args:
        arrays: NumPy arrays by their entry: ``weight``, ``bias``, ``weight_quantizer.scale``; float32 or float64, in
            PyTorch's axis order.
        settings: what must be the same in the file and the network: ``kind``, ``eps``, ``groups``, and ``enabled``
            (False in a float teacher); text and numbers.
        quantizers: the recipe's quantizers, by ``weight_quantizer`` and ``input_quantizer``; they must be the same too.
        flags: what a quantizer has learned of its data: ``initialized``, ``signed`` (None: not known yet), ``frozen``,
            by the same keys.
    """

    arrays: Mapping[str, Any]
    settings: Mapping[str, Any]
    quantizers: Mapping[str, Quantizer] = field(default_factory=dict)
    flags: Mapping[str, Mapping[str, bool | None]] = field(default_factory=dict)


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
        """Write a network, under a temporary name first, so that nobody ever reads half of it.

        Args:
            layers: the network's layers by name.
            save_file: `safetensors.numpy.save_file`.

        Raises:
            CRCoreError: ``names`` does not fit the network, arrays are neither float32 nor float64, a quantizer is
                none of crcore's, or the file cannot be written.
        """
        _check_dtypes(layers)
        renamed = {file: layers[name] for name, file in self._file_names(layers).items()}
        metadata = {"kind": KIND, "version": VERSION, "layers": {n: _described(each) for n, each in renamed.items()}}
        tensors = [(_key(n, entry), array) for n, each in renamed.items() for entry, array in each.arrays.items()]
        if len(dict(tensors)) < len(tensors):
            raise CRCoreError(f"two tensors of {self.path} would have one name; give layers other names with names=")
        path = Path(self.path)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        text = json.dumps(metadata, sort_keys=True, allow_nan=False)
        try:
            # In C order, because safetensors writes the memory as it lies.
            save_file({key: np.array(array, order="C") for key, array in tensors}, temporary, metadata={KEY: text})
            os.replace(temporary, path)
        except Exception as error:  # safetensors has errors of its own
            raise CRCoreError(f"{path} cannot be written ({_line(error)}); nothing was changed there") from error
        finally:
            temporary.unlink(missing_ok=True)

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
        file_names = self._file_names(layers)
        found = self._layers_of_file(safe_open)
        if set(file_names.values()) != set(found):
            lists = _unmatched(layers, file_names, found)
            raise CRCoreError(f"{self.path} and the network have different layers:{lists}")
        problems = [
            f"\n  layer {name!r}: {problem}"
            for name, file in file_names.items()
            for problem in _differences(name, layers[name], found[file])
        ]
        if problems:
            more = [f"\n  and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
            raise CRCoreError(f"{self.path} does not fit the network:{''.join(problems[:_SHOWN] + more)}")
        return {name: found[file] for name, file in file_names.items()}

    def _file_names(self, layers: Mapping[str, PortableLayer]) -> dict[str, str]:
        """The name in the file of each layer of the network."""
        names = {} if self.names is None else self.names
        if not isinstance(names, Mapping) or not all(isinstance(n, str) for pair in names.items() for n in pair):
            raise CRCoreError(f"names maps the network's layer names to those in the file, got {names!r}")
        for name in names:
            if name not in layers:
                near = difflib.get_close_matches(name, layers, n=3, cutoff=0.4) or list(layers)[:3]
                raise CRCoreError(
                    f"names has {name!r}, which is no layer with weights in this network; its layers are for example "
                    + ", ".join(map(repr, near))
                )
        found: dict[str, str] = {}
        for name in layers:
            file = names.get(name, name)
            if file in found.values():
                raise CRCoreError(f"names gives two layers the name {file!r} in the file; give each its own")
            found[name] = file
        return found

    def _layers_of_file(self, safe_open: Callable[..., Any]) -> dict[str, PortableLayer]:
        if not Path(self.path).is_file():
            raise CRCoreError(f"{self.path}: no such file; give a checkpoint that save_portable wrote")
        try:
            with safe_open(self.path, framework="numpy") as file:
                described = _checked((file.metadata() or {}).get(KEY), set(file.keys()))
                return {
                    name: _layer(each, {entry: file.get_tensor(_key(name, entry)) for entry in each["arrays"]})
                    for name, each in described.items()
                }
        except CRCoreError as error:
            raise CRCoreError(f"{self.path}: {error}") from None
        except Exception as error:  # safetensors has errors of its own
            raise CRCoreError(
                f"{self.path} cannot be read ({_line(error)}): it is damaged, cut short or no safetensors file; copy "
                "it again, or save it again with save_portable"
            ) from error


def _key(layer: str, entry: str) -> str:
    return f"{layer}.{entry}".removeprefix(".")  # of a network that is a single layer


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


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
        "quantizers": {place: _recipe(place, quantizer).to_dict() for place, quantizer in layer.quantizers.items()},
        "flags": {place: dict(flags) for place, flags in layer.flags.items()},
    }


def _layer(described: Mapping[str, Any], arrays: Mapping[str, Any]) -> PortableLayer:
    quantizers = {place: _quantizer(place, Recipe.from_dict(q)) for place, q in described["quantizers"].items()}
    return PortableLayer(arrays, described["settings"], quantizers, described["flags"])


def _recipe(place: str, quantizer: Quantizer) -> Recipe:
    pair = (quantizer, None) if place == "weight_quantizer" else (None, quantizer)
    return Recipe(*pair, first_last_bits=None)


def _quantizer(place: str, recipe: Recipe) -> Any:
    return recipe.weights if place == "weight_quantizer" else recipe.activations


def _checked(text: str | None, keys: set[str]) -> dict[str, Any]:
    """The layers that the metadata describe, whose form is as expected and whose tensors are all there."""
    if text is None:
        raise CRCoreError("a safetensors file that save_portable has not written; save the network with save_portable")
    try:
        metadata = json.loads(text)
        kind, version = metadata["kind"], metadata.get("version")
    except (ValueError, TypeError, KeyError, AttributeError):
        raise CRCoreError("its metadata are damaged; save it again with save_portable") from None
    if kind != KIND:
        raise CRCoreError(f"a checkpoint of kind {kind!r}, no portable one; save the network with save_portable")
    if version != VERSION:
        raise CRCoreError(
            f"a portable checkpoint of version {version!r}, this crcore reads version {VERSION}; save it again with "
            "this one, or read it with the one that wrote it"
        )
    layers = metadata.get("layers")
    if not isinstance(layers, dict) or not all(_is_described(each) for each in layers.values()):
        raise CRCoreError("its metadata are damaged; save it again with save_portable")
    expected = {_key(name, entry) for name, each in layers.items() for entry in each["arrays"]}
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


def _unmatched(
    layers: Mapping[str, PortableLayer], file_names: Mapping[str, str], found: Mapping[str, PortableLayer]
) -> str:
    here = [name for name, file in file_names.items() if file not in found]
    there = [file for file in found if file not in file_names.values()]
    text = f"\n  only in the network: {_listed(here)}\n  only in the file: {_listed(there)}"
    if here and there:
        like = next((file for file in there if not _differences("", layers[here[0]], found[file])), there[0])
        return f"{text}\nLayers with other names are matched by names={{network's: file's}}: {{{here[0]!r}: {like!r}}}"
    return f"{text}\nThe network must be the one that was saved; where it is, its layers are matched by names="


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names[:_SHOWN])) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _differences(name: str, mine: PortableLayer, theirs: PortableLayer) -> list[str]:
    """In what a layer of the network and its counterpart in the file differ; the first kind of it."""
    settings = [
        f"{key} is {theirs.settings.get(key)!r} in the file, {mine.settings.get(key)!r} in the network; make them equal"
        for key in sorted({*mine.settings, *theirs.settings})
        if not _is_equal(mine.settings.get(key), theirs.settings.get(key))
    ]
    if settings:
        return settings
    quantizers = [
        f"{place} is {theirs.quantizers.get(place)!r} in the file, {mine.quantizers.get(place)!r} in the network; "
        f"prepare the network with the recipe that was saved, or give this layer the file's by "
        f"Recipe(overrides={{{name!r}: ...}})"
        for place in sorted({*mine.quantizers, *theirs.quantizers})
        if mine.quantizers.get(place) != theirs.quantizers.get(place)
    ]
    if quantizers:
        return quantizers
    signs = [
        f"the file says signed={flags['signed']} of {place}, which is {mine.quantizers[place]!r}; save it again"
        for place, flags in theirs.flags.items()
        if mine.quantizers[place].signed not in (None, flags["signed"])
    ]
    return signs or [
        f"{entry} is {_shape(theirs.arrays.get(entry))} in the file, {_shape(mine.arrays.get(entry))} in the network"
        for entry in sorted({*mine.arrays, *theirs.arrays})
        if _shape(mine.arrays.get(entry)) != _shape(theirs.arrays.get(entry))
    ]


def _is_equal(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, float) and isinstance(theirs, (int, float)):
        return math.isclose(mine, theirs, rel_tol=1e-6)
    return bool(mine == theirs)


def _shape(array: Any) -> str:
    return "missing" if array is None else f"{array.dtype} {list(array.shape)}"
