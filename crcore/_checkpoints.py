"""What the forms of checkpoint share: layers, their names, how two of them differ, and how files are opened.

A checkpoint is a safetensors file. Its metadata have one entry, ``crcore``, with JSON that says its ``kind`` and
``version``. Backends say what their layers are in the form of `PortableLayer` and give safetensors' own functions.
Reading runs nothing that the file names.
"""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from crcore._errors import CRCoreError
from crcore._files import as_path, cause, replaced
from crcore._recipe import Recipe
from crcore._typing import Quantizer

KEY = "crcore"  # one metadata entry, so that equal contents make equal files
_SHOWN = 12  # lines of one message


@dataclass(frozen=True)
class PortableLayer:
    """One layer as a checkpoint holds it.

    Args:
        arrays: NumPy arrays by their entry: ``weight``, ``bias``, ``weight_quantizer.scale``; in PyTorch's axis order.
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
class Form:
    """One kind of checkpoint: ``kind`` and ``version`` as files have them, ``saver`` as messages name who writes it."""

    kind: str
    version: int
    saver: str

    def described(self, **more: Any) -> dict[str, Any]:
        """The metadata of a file."""
        return {"kind": self.kind, "version": self.version} | more

    def checked(self, text: str | None) -> dict[str, Any]:
        """The metadata of a file that is of this form."""
        if text is None:
            raise CRCoreError(
                f"a safetensors file that {self.saver} has not written; save the network with {self.saver}"
            )
        try:
            metadata: dict[str, Any] = json.loads(text)
            kind, version = metadata["kind"], metadata.get("version")
        except (ValueError, TypeError, KeyError, AttributeError):
            raise self.damaged("its metadata are damaged") from None
        if kind != self.kind:
            raise CRCoreError(f"a checkpoint of kind {kind!r}, no {self.kind} one; save the network with {self.saver}")
        if version != self.version:
            raise CRCoreError(
                f"a {self.kind} checkpoint of version {version!r}, this crcore reads version {self.version}; save it "
                "again with this one, or read it with the one that wrote it"
            )
        return metadata

    def damaged(self, what: str) -> CRCoreError:
        """The error for a file whose content contradicts itself."""
        return CRCoreError(f"{what}; save it again with {self.saver}")

    @contextmanager
    def opened(self, path: str | os.PathLike[str], safe_open: Callable[..., Any]) -> Iterator[Any]:
        """The file, open; whatever goes wrong while it is read becomes an error that names it."""
        if not as_path(path).is_file():
            raise CRCoreError(f"{path}: no such file; give a checkpoint that {self.saver} wrote")
        try:
            with safe_open(path, framework="numpy") as file:
                yield file
        except CRCoreError as error:
            raise CRCoreError(f"{path}: {error}") from None
        except Exception as error:  # safetensors has errors of its own
            raise CRCoreError(
                f"{path} cannot be read ({cause(error)}): it is damaged, cut short or no safetensors file; copy "
                f"it again, or save it again with {self.saver}"
            ) from error


def write(
    path: str | os.PathLike[str],
    arrays: Mapping[str, Any],
    metadata: Mapping[str, Any],
    save_file: Callable[..., None],
) -> None:
    """Write a file of any form, replaced as a whole or not at all; ``save_file``: `safetensors.numpy.save_file`."""
    with replaced(path) as temporary:
        text = json.dumps(metadata, sort_keys=True, allow_nan=False)
        # In C order, because safetensors writes the memory as it lies.
        save_file({name: np.array(a, order="C") for name, a in arrays.items()}, temporary, metadata={KEY: text})


def key(layer: str, entry: str) -> str:
    """The name of a tensor."""
    return f"{layer}.{entry}".removeprefix(".")  # of a network that is a single layer


def file_names(layers: Mapping[str, PortableLayer], names: Mapping[str, str] | None) -> dict[str, str]:
    """The name in the file of each layer of the network."""
    names = {} if names is None else names
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


def matched(
    path: str | os.PathLike[str],
    layers: Mapping[str, PortableLayer],
    names: Mapping[str, str],
    found: Mapping[str, PortableLayer],
    differences: Callable[[str, PortableLayer, PortableLayer], Sequence[str]],
) -> dict[str, PortableLayer]:
    """By the network's names, the layers of the file, each of which fits its counterpart.

    Args:
        path: the file, for messages.
        layers: the network's layers by name.
        names: of each of them in the file.
        found: the file's layers.
        differences: in what the network's layer of that name and the file's differ; empty where they fit.
    """
    if set(names.values()) != set(found):
        lists = _unmatched(layers, names, found, differences)
        raise CRCoreError(f"{path} and the network have different layers:{lists}")
    problems = [
        f"\n  layer {name!r}: {problem}"
        for name, file in names.items()
        for problem in differences(name, layers[name], found[file])
    ]
    if problems:
        more = [f"\n  and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise CRCoreError(f"{path} does not fit the network:{''.join(problems[:_SHOWN] + more)}")
    return {name: found[file] for name, file in names.items()}


def setting_differences(mine: PortableLayer, theirs: PortableLayer) -> list[str]:
    """The settings in which two layers differ."""
    return [
        f"{key} is {theirs.settings.get(key)!r} in the file, {mine.settings.get(key)!r} in the network; make them equal"
        for key in sorted({*mine.settings, *theirs.settings})
        if not _is_equal(mine.settings.get(key), theirs.settings.get(key))
    ]


def array_differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """The arrays whose shapes or types differ."""
    return [
        f"{entry} is {_shape(theirs.get(entry))} in the file, {_shape(mine.get(entry))} in the network"
        for entry in sorted({*mine, *theirs})
        if _shape(mine.get(entry)) != _shape(theirs.get(entry))
    ]


def encoded(place: str, quantizer: Quantizer) -> dict[str, Any]:
    """A quantizer for JSON, in the form that recipes are saved in."""
    pair = (quantizer, None) if place == "weight_quantizer" else (None, quantizer)
    return Recipe(*pair, first_last_bits=None).to_dict()


def decoded(place: str, described: Mapping[str, Any]) -> Any:
    """The quantizer that `encoded` described."""
    recipe = Recipe.from_dict(described)
    return recipe.weights if place == "weight_quantizer" else recipe.activations


def _unmatched(
    layers: Mapping[str, PortableLayer],
    names: Mapping[str, str],
    found: Mapping[str, PortableLayer],
    differences: Callable[[str, PortableLayer, PortableLayer], Sequence[str]],
) -> str:
    here = [name for name, file in names.items() if file not in found]
    there = [file for file in found if file not in names.values()]
    text = f"\n  only in the network: {_listed(here)}\n  only in the file: {_listed(there)}"
    if here and there:
        like = next((file for file in there if not differences(here[0], layers[here[0]], found[file])), there[0])
        return f"{text}\nLayers with other names are matched by names={{network's: file's}}: {{{here[0]!r}: {like!r}}}"
    return f"{text}\nThe network must be the one that was saved; where it is, its layers are matched by names="


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names[:_SHOWN])) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _is_equal(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, float) and isinstance(theirs, (int, float)):
        return math.isclose(mine, theirs, rel_tol=1e-6)
    return bool(mine == theirs)


def _shape(array: Any) -> str:
    return "missing" if array is None else f"{array.dtype} {list(array.shape)}"
